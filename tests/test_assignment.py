"""The placement search beside plans that are known to be best."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from torchrec_mtrains.planner import budget
from torchrec_mtrains.planner.assignment import _Search, solve
from torchrec_mtrains.planner.budget import Budget
from torchrec_mtrains.planner.choices import Load, objective_ms
from torchrec_mtrains.planner.relaxation import relax

from _planner_oracles import brute_force, integer_program, random_case, small_case


def test_plans_are_close_to_the_best_of_all() -> None:
    ratios = []
    for seed in range(40):
        choices, ranks = small_case(seed)
        best = brute_force(choices, ranks)
        found = solve(choices, ranks, seconds=0.3)
        assert np.isinf(found.objective_ms) == np.isinf(best)
        if not np.isinf(best):
            ratios.append(found.objective_ms / best)
            assert found.relaxation.bound_ms <= best * (1 + 1e-6)
    assert len(ratios) > 30
    assert statistics.median(ratios) <= 1.02
    assert max(ratios) <= 1.10


@pytest.mark.parametrize("seed", range(3))
def test_the_full_integer_program_agrees_with_brute_force(seed: int) -> None:
    choices, ranks = small_case(seed)
    assert integer_program(choices, ranks) == pytest.approx(brute_force(choices, ranks), rel=1e-5)


def test_the_bound_prices_memory_as_more_memory_lowers_it() -> None:
    choices, ranks = random_case(np.random.default_rng(1), 30, 4, 2, 6)
    relaxation = relax(choices, ranks)
    more = ranks.capacity.copy()
    step = more[0, 0] * 1e-3
    more[:, 0] += step
    gained = relaxation.bound_ms - relax(choices, type(ranks)(more, ranks.base_busy_ms, ranks.shared, ranks.per_host)).bound_ms
    assert gained == pytest.approx(step * relaxation.memory_price[0], rel=0.2)


def test_a_load_is_the_sum_of_what_is_in_it_and_taken_out_leaves_nothing() -> None:
    choices, ranks = random_case(np.random.default_rng(2), 10, 3, 1, 2)
    found = solve(choices, ranks, seconds=0.2)
    load = Load.of(choices, ranks, found.assignment)
    assert load.fits()
    assert load.step_ms().max() == pytest.approx(objective_ms(choices, ranks, found.assignment))
    for candidate, rank in zip(found.assignment.candidate, found.assignment.rank, strict=True):
        load.add(int(candidate), int(rank), -1)
    assert np.abs(load.memory).max() < 1e-3
    assert load.busy == pytest.approx(np.tile(ranks.base_busy_ms, (ranks.count, 1)), abs=1e-9)


def test_a_relaxation_whose_time_is_up_before_anything_is_solved_has_no_bound_and_plans_still_fit() -> None:
    choices, ranks = random_case(np.random.default_rng(3), 40, 4, 2, 6)
    cut = relax(choices, ranks, time.perf_counter())
    assert cut.bound_ms == 0 < relax(choices, ranks).bound_ms
    assert np.add.reduceat(cut.share, choices.starts[:-1]) == pytest.approx(1.0)
    found = solve(choices, ranks, seconds=0.0)
    assert np.isfinite(found.objective_ms)
    assert Load.of(choices, ranks, found.assignment).fits()


def test_a_plan_is_the_same_however_busy_the_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_LAST_RESORT", 1e6)  # the work alone ends the search
    choices, ranks = random_case(np.random.default_rng(4), 30, 4, 2, 6)
    alone = solve(choices, ranks, seconds=0.5)
    ended = threading.Event()
    other = threading.Thread(target=lambda: [sum(range(1000)) for _ in iter(ended.is_set, True)])
    other.start()
    try:
        beside_another = solve(choices, ranks, seconds=0.5)
    finally:
        ended.set()
        other.join()
    assert (alone.assignment.candidate == beside_another.assignment.candidate).all()
    assert (alone.assignment.rank == beside_another.assignment.rank).all()


def test_more_work_never_makes_a_worse_plan() -> None:
    choices, ranks = random_case(np.random.default_rng(5), 20, 3, 1, 4)
    steps = [solve(choices, ranks, seconds).objective_ms for seconds in (0.05, 0.2, 0.8)]
    assert steps == sorted(steps, reverse=True)


def test_a_rank_that_cannot_be_made_to_fit_ends_the_cuts() -> None:
    rng = np.random.default_rng(0)
    for shape in ((4, 1, 1, 2), (20, 3, 3, 6), (30, 16, 8, 12)):
        random_case(rng, *shape)
    choices, ranks = random_case(rng, 20, 64, 8, 12)  # rounding left a candidate better than itself by 1e-16 of a rank
    search = _Search(choices, ranks, relax(choices, ranks), Budget(1.0))
    search.place(search._rounded(-1.0))
    assert len(search.assignment.candidate) == choices.tables
