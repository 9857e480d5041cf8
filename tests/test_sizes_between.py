"""Sizes between the grid's: the program that finds them beside plans of single candidates, and that they fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec_mtrains.planner import PerfModel, PmemDevice, TieredEnumerator, TieredTopology
from torchrec_mtrains.planner.assignment import solve
from torchrec_mtrains.planner.assumed_hardware import assumed_hardware
from torchrec_mtrains.planner.candidates import candidates, memory_of
from torchrec_mtrains.planner.choices import Choices, Ranks, fitting, objective_ms
from torchrec_mtrains.planner.search import Capacity
from torchrec_mtrains.planner.sharding_options import TieredShardingOption
from torchrec_mtrains.planner.sizes_between import sizes_between
from torchrec_mtrains.planner.sizes_in_place import best_shares

from test_assignment import small_case  # isort: skip (puts benchmarks/ on the path)

from planner_cases import PLENTY, Case, TableCase
from torchrec_mtrains import SsdHome


def test_a_mixture_in_place_is_no_slower_than_the_plan_and_fits_every_rank() -> None:
    tried = 0
    for seed in range(30):
        choices, ranks = small_case(seed)
        found = solve(choices, ranks, seconds=0.1)
        if not np.isfinite(found.objective_ms):
            continue
        here = fitting(choices, ranks)
        here = here[choices.spread[here] == (found.assignment.rank[choices.table[here]] < 0)]
        share = best_shares(choices, ranks, found.assignment.rank, here)
        assert share is not None
        assert np.add.reduceat(share, choices.starts[:-1]) == pytest.approx(1.0)
        assert step_of(choices, ranks, found.assignment.rank, share) <= found.objective_ms * (1 + 1e-6)
        tried += 1
    assert tried > 20


def step_of(choices: Choices, ranks: Ranks, rank_of: np.ndarray, share: np.ndarray) -> float:
    """Of shares of candidates in place, whose memory must fit."""
    memory, busy = np.zeros_like(ranks.capacity), np.tile(ranks.base_busy_ms, (ranks.count, 1))
    for i in np.flatnonzero(share):
        where = slice(None) if choices.spread[i] else slice(rank_of[choices.table[i]], rank_of[choices.table[i]] + 1)
        memory[where] += share[i] * choices.memory[i]
        busy[where] += share[i] * choices.busy[i]
    assert (memory <= ranks.capacity * (1 + 1e-6) + 1).all()
    host = np.add.reduceat(busy[:, ranks.shared], np.arange(0, ranks.count, ranks.per_host), axis=0)
    return float(max(busy[:, ~ranks.shared].max(), host.max()))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.floats(0.1, 0.6), st.sampled_from([None, 1 << 20, 4 << 20]))
def test_sizes_between_are_legal_and_fit_every_rank(ranks: int, share: float, pmem: int | None) -> None:
    case = Case([TableCase(n, 32, [3.0]) for n in (20_000, 9_000, 4_000, 700)], world_size=ranks, batch_size=16)
    device = PmemDevice("/pmem", pmem) if pmem else None
    ddr = int(share * 33_700 * 132 / ranks) + (1 << 20)
    topology = TieredTopology(ranks, ddr_budget_bytes=ddr, ssd=SsdHome(("/nowhere",), PLENTY), pmem=device)
    model = PerfModel(assumed_hardware(topology), topology.ranks_per_host)
    options = TieredEnumerator(topology, case.batch_size, case.constraints(), model).enumerate(case.model(), case.sharders())
    tables = [[o for o in options if o.name == f"t{i}" and isinstance(o, TieredShardingOption)] for i in range(len(case.tables))]
    offered = candidates(tables, model, bool(pmem))
    on = Capacity([d.storage for d in topology.devices], pmem or 0).ranks(model)
    found = solve(offered.choices, on, seconds=0.1)
    if not np.isfinite(found.objective_ms):
        return
    between = sizes_between(offered, on, found.assignment)
    assert between is not None
    held = np.zeros_like(on.capacity)
    for (option, sizes), rank in zip(between, found.assignment.rank, strict=True):
        assert option.min_pool_rows <= sizes.pool_rows <= option.shard_rows - sizes.cache_rows
        where = slice(None) if rank < 0 else slice(rank, rank + 1)
        held[where] += memory_of(option, [sizes])[0]
    assert (held <= on.capacity).all()


def test_candidates_that_no_rank_holds_are_left_out_unless_a_table_has_no_other() -> None:
    ranks = Ranks(np.array([[10.0], [8.0]]), np.zeros(1), np.array([False]))
    choices = Choices(np.array([0, 0, 1]), np.zeros(3, bool), np.array([[11.0], [9.0], [12.0]]), np.ones((3, 1)))
    assert fitting(choices, ranks).tolist() == [1, 2]
    assert np.isinf(objective_ms(choices, ranks, solve(choices, ranks, 0.05).assignment))
