"""What a plan says of itself: its numbers add up, and what they promise of other plans comes true when those are made."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchrec_mtrains.planner import CheckpointSchedule, PlanSummary, TieredShardingPlanner, chain_bytes
from torchrec_mtrains.planner.explanations import draw
from torchrec_mtrains.planner.perf_model import RESOURCES

from planner_cases import PLENTY, Case, TableCase, shards, tiered_tables
from torchrec_mtrains.errors import ConfigurationError
from torchrec_mtrains.sizes import parse_bytes

MIB, GIB = 1 << 20, 1 << 30
SMALL = Case([TableCase(50_000, 32, [3.0]), TableCase(50_000, 32), TableCase(2_000, 8)], batch_size=64)
LARGE = Case(
    [TableCase(50_000_000, 64, [4.0]), TableCase(20_000_000, 64, [2.0]), TableCase(10_000_000, 32, [8.0]), TableCase(1_000_000, 64)],
    batch_size=4096,
)


def planned(case: Case, ddr: int, pmem: int | None = None, **kwargs: Any) -> tuple[TieredShardingPlanner, Any, PlanSummary]:
    planner = case.planner(ddr, PLENTY, pmem, search_seconds=1, **kwargs)
    plan = planner.plan(case.model(), case.sharders())
    return planner, plan, planner.summary(plan)


@pytest.fixture(scope="module")
def large() -> tuple[TieredShardingPlanner, Any, PlanSummary]:
    return planned(LARGE, 8 * GIB)


@pytest.mark.parametrize("pmem", [None, 4 * MIB])
def test_the_bytes_of_every_tier_are_those_of_the_chains_and_batches(pmem: int | None) -> None:
    schedule = CheckpointSchedule(every_steps=50)
    planner, plan, _ = planned(SMALL, 5 * MIB, pmem, checkpoints=schedule)
    assert tiered_tables(plan) >= {"t0", "t1"}
    options = {o.name: o for o in planner._best_plan}
    for row in planner.plan_rows(plan):
        sharding, option = plan.plan["ebc"][row["table"]], options[row["table"]]
        if row["table"] not in tiered_tables(plan):
            continue
        record, lookups = SMALL.record_bytes(row["table"]), row["lookups"]
        costs = [
            chain_bytes(sharding.tiers, rows=rows, record_bytes=record, lookups=lookups, checkpoints=schedule)
            for _, rows in shards(SMALL, row["table"], sharding)
        ]
        assert row["ddr_bytes"] == sum(cost.ddr for cost in costs) + sum(option.batch_bytes)
        assert sum(option.batch_bytes) > planner._enumerator.waiting_ids.of_shard(lookups, 64) > 0
        assert row["pmem_bytes"] == sum(cost.pmem for cost in costs)
        assert row["ssd_bytes"] == sum(cost.ssd for cost in costs)
        assert all(n > 0 for n in option.batch_bytes)
    if pmem is not None:
        assert sum(row["pmem_bytes"] for row in planner.plan_rows(plan)) > 0


@pytest.mark.parametrize("prefetched", [True, False])
def test_the_step_is_that_of_the_busiest_resource_and_shares_are_of_it(prefetched: bool) -> None:
    planner, _, summary = planned(SMALL, 5 * MIB, prefetched=prefetched, dense_ms=0.05)
    busy = sum(
        (o.busy_ms(0) if o.compute_kernel == "customized_kernel" else planner._model.in_memory(o.uses[0])) for o in planner._best_plan
    )
    busy = busy + planner._model.base_ms
    assert summary.step_ms == pytest.approx(busy.max() if prefetched else busy.sum())
    assert summary.bottleneck == RESOURCES[int(busy.argmax())]
    assert list(summary.busy_share.values()) == pytest.approx(list(busy / summary.step_ms))
    assert max(summary.busy_share, key=lambda name: summary.busy_share[name]) == summary.bottleneck


def test_dense_compute_is_in_the_step() -> None:
    _, _, without = planned(SMALL, 5 * MIB)
    _, _, with_it = planned(SMALL, 5 * MIB, dense_ms=50.0)
    assert with_it.step_ms >= 50 > without.step_ms
    assert with_it.bottleneck == "cpu"


def test_what_one_more_gib_of_memory_saves_is_what_planning_with_it_saves(large: Any) -> None:
    _, _, summary = large
    _, _, more = planned(LARGE, 9 * GIB)
    saved = summary.step_ms - more.step_ms
    assert saved > 1
    assert summary.one_more_gib_ms["ddr"] == pytest.approx(saved, rel=0.1)
    assert summary.one_more_gib_ms["ssd"] == 0
    assert "pmem" not in summary.one_more_gib_ms


def test_what_one_more_gib_of_pmem_saves_is_what_planning_with_it_saves() -> None:
    _, _, summary = planned(LARGE, 4 * GIB, 4 * GIB)
    _, _, more = planned(LARGE, 4 * GIB, 5 * GIB)
    saved = summary.step_ms - more.step_ms
    assert saved > 1
    assert summary.one_more_gib_ms["pmem"] == pytest.approx(saved, rel=0.1)


def test_the_bound_with_other_memory_is_the_bound_of_a_plan_that_has_it(large: Any) -> None:
    planner, _, summary = large
    result = planner.search_result
    assert result is not None
    waiting_bytes = planner._enumerator.waiting_ids.of_rank  # of every rank's memory, whatever the plan
    assert result.bound_with("ddr", 8 * GIB - waiting_bytes) == pytest.approx(result.bound_ms)
    assert summary.bound_ms == result.bound_ms <= summary.step_ms
    bounds = [result.bound_with("ddr", gib * GIB) for gib in (2, 4, 8, 16, 64)]
    assert all(b is not None for b in bounds)
    assert bounds == sorted(bounds, reverse=True)
    for gib in (6, 12):
        other, _, _ = planned(LARGE, gib * GIB)
        assert other.search_result is not None
        assert result.bound_with("ddr", gib * GIB) == pytest.approx(other.search_result.bound_ms, rel=0.05)
    assert result.bound_with("ddr", 10 * MIB) is None, "not even the indexes fit"
    assert result.bound_with("ssd", 1 * GIB) is None


def test_the_steps_by_memory_have_the_plans_own_memory_among_them(large: Any) -> None:
    planner, _, summary = large
    for_tables = 8 * GIB - planner._enumerator.waiting_ids.of_rank
    assert (summary.memory, summary.memory_bytes) == ("ddr", for_tables)
    by_ddr = dict(summary.step_by_memory)
    assert by_ddr[for_tables] == pytest.approx(summary.bound_ms)
    assert np.all(np.diff(list(by_ddr.values())) <= 1e-9)


def test_what_another_place_would_cost_is_what_it_costs_there() -> None:
    """Forced there, beside the other one on the SSD, each table is charged the bytes and keeps the resource busy for the time that the plan
    said."""
    planner, plan, _ = planned(SMALL, 7 * MIB)
    before = {row["table"]: row for row in planner.plan_rows(plan)}
    options = {o.name: o for o in planner._best_plan}
    assert tiered_tables(plan) == {"t0", "t1"}
    for name in ("t0", "t1"):
        said = re.search(r"in memory: \+([\d.]+ \w+) DDR, ([-+][\d.e-]+) ms of (\w+)", before[name]["why"])
        assert said is not None, before[name]["why"]
        places = {"t0": {"compute_kernels": ["customized_kernel"]}, "t1": {"compute_kernels": ["customized_kernel"]}}
        places[name] = {"compute_kernels": ["fused"], "sharding_types": ["table_wise"]}
        other = Case(SMALL.tables, batch_size=64, extra=places)
        forced, its_plan, _ = planned(other, 64 * MIB)
        (row,) = [r for r in forced.plan_rows(its_plan) if r["table"] == name]
        (option,) = [o for o in forced._best_plan if o.name == name]
        assert parse_bytes(said[1]) == pytest.approx(row["ddr_bytes"] - before[name]["ddr_bytes"], rel=0.01)
        at = RESOURCES.index(said[3])
        more_ms = forced._model.in_memory(option.uses[0])[at] - options[name].busy_ms(0)[at]
        assert float(said[2]) == pytest.approx(more_ms, rel=0.01)


def test_a_place_that_a_table_cannot_have_is_explained() -> None:
    asked = {"t0": {"compute_kernels": ["customized_kernel"]}, "t2": {"compute_kernels": ["fused"]}}
    planner, plan, _ = planned(Case(SMALL.tables, batch_size=64, extra=asked), 5 * MIB)
    why = {row["table"]: row["why"] for row in planner.plan_rows(plan)}
    assert "in memory: its constraints forbid it" in why["t0"]
    assert "on the SSD: its constraints, module, optimizer or dimension forbid it" in why["t2"]
    planner, plan, _ = planned(SMALL, 3 * MIB)
    assert "in memory: no rank has room" in {row["table"]: row["why"] for row in planner.plan_rows(plan)}["t0"]


def test_the_summary_is_written_with_its_numbers(large: Any) -> None:
    _, _, summary = large
    first, bound, more, *notes = summary.lines()
    assert f"predicted step {summary.step_ms:.3g} ms" in first
    assert f"bottleneck {summary.bottleneck}" in first
    assert f"no plan is faster than {summary.bound_ms:.3g} ms (this one ÷ bound: {summary.step_ms / summary.bound_ms:.3f}" in bound
    assert f"ddr {summary.one_more_gib_ms['ddr']:.3g} ms" in more
    assert tuple(notes) == summary.notes


def test_where_all_is_in_memory_nothing_is_said_of_bounds_and_a_picture_is_refused(tmp_path: Path) -> None:
    planner, plan, summary = planned(SMALL, 1 * GIB)
    assert tiered_tables(plan) == set()
    assert planner.search_result is None
    assert (summary.bound_ms, summary.one_more_gib_ms, summary.step_by_memory) == (None, {}, ())
    assert math.isfinite(summary.step_ms)
    with pytest.raises(ConfigurationError, match="every table is in memory"):
        draw(summary, tmp_path / "plan.png")
