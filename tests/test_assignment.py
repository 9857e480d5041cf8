"""The placement search beside plans that are known to be best."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from torchrec_mtrains.planner.assignment import solve
from torchrec_mtrains.planner.choices import Load, objective_ms
from torchrec_mtrains.planner.relaxation import relax

from _planner_oracles import brute_force, integer_program, random_case, small_case


def test_plans_are_close_to_the_best_of_all() -> None:
    ratios = []
    for seed in range(40):
        choices, ranks = small_case(seed)
        best = brute_force(choices, ranks)
        found = solve(choices, ranks, time_limit_s=0.3)
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
    found = solve(choices, ranks, time_limit_s=0.2)
    load = Load.of(choices, ranks, found.assignment)
    assert load.fits()
    assert load.step_ms().max() == pytest.approx(objective_ms(choices, ranks, found.assignment))
    for candidate, rank in zip(found.assignment.candidate, found.assignment.rank, strict=True):
        load.add(int(candidate), int(rank), -1)
    assert np.abs(load.memory).max() < 1e-3
    assert load.busy == pytest.approx(np.tile(ranks.base_busy_ms, (ranks.count, 1)), abs=1e-9)
