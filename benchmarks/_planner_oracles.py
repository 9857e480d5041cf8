"""Placements that are known to be best, for cases small enough: every plan tried, and the full integer program on HiGHS.

``measure`` holds the search against both, on cases that seeds 0, 1, 2, … draw; a range of them may be run by itself.
"""

from __future__ import annotations

import itertools
import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torchrec_mtrains.planner.assignment import solve
from torchrec_mtrains.planner.choices import Assignment, Choices, Ranks, objective_ms

from _common import Figure

_MIB = 1 << 20
_SEARCH_SECONDS = 0.5


def small_case(seed: int) -> tuple[Choices, Ranks]:
    """2 to 4 tables on 1 to 3 ranks, of one host or each of its own."""
    rng = np.random.default_rng(seed)
    ranks = int(rng.integers(1, 4))
    return random_case(rng, int(rng.integers(2, 5)), ranks, int(rng.choice([1, ranks])), int(rng.integers(1, 3)))


def random_case(rng: np.random.Generator, tables: int, world_size: int, per_host: int, points: int) -> tuple[Choices, Ranks]:
    """Tables of very uneven size and demand, each whole, split over all ranks, in memory or above an SSD with one of ``points`` pools and
    with or without a cache; memory for 20 to 80% of them. Busy times: CPU, SSD (shared), PMem (shared)."""
    table, spread, memory, busy = [], [], [], []
    for t in range(tables):
        rows, lookups, skew = 10 ** rng.uniform(3, 6), 10 ** rng.uniform(1.5, 4), rng.uniform(0.1, 0.9)
        for split in (False, True) if world_size > 1 else (False,):
            parts = world_size if split else 1
            ddr, cpu = rows * 132 / parts, lookups * 4e-4 / parts + (0.2 if split else 0.0)
            candidates = [((ddr, 0.0, 0.0), (cpu, 0.0, 0.0))]
            for kept, cached in itertools.product(np.geomspace(0.01, 0.8, points), (0.0, 0.3)):
                missed, cold = (lookups * max(0.0, 1 - share**skew) / parts for share in (kept, min(1.0, kept + cached)))
                index = rows * (12 + 4 * (cached > 0) + 32 * cached) / parts
                candidates.append(
                    (
                        (ddr * kept * 1.2 + index, rows * cached * 132 / parts, rows * 200 / parts),
                        (cpu + missed * 1.5e-3 + cold * 2e-3, cold * 1.3e-2, (missed - cold) * 1e-3),
                    )
                )
            for of_tiers, of_resources in candidates:
                table.append(t)
                spread.append(split)
                memory.append(of_tiers)
                busy.append(of_resources)
    choices = Choices(np.array(table), np.array(spread), np.array(memory), np.array(busy))
    whole = sum(choices.memory[(choices.table == t) & ~choices.spread][0, 0] for t in range(tables))
    ddr = whole / world_size * rng.uniform(0.2, 0.8)
    capacity = np.tile([ddr, ddr * rng.uniform(0.0, 1.0), 1e13], (world_size, 1))
    return choices, Ranks(capacity, np.array([rng.choice([0.0, 5.0]), 0.0, 0.0]), np.array([False, True, True]), per_host)


def brute_force(choices: Choices, ranks: Ranks) -> float:
    """The step of the best plan, every plan tried; infinite where none fits."""
    starts = choices.starts
    places = []
    for t in range(choices.tables):
        of_table = []
        for c in range(starts[t], starts[t + 1]):
            of_table += [(c, -1)] if choices.spread[c] else [(c, r) for r in range(ranks.count)]
        places.append(of_table)
    # Loads of every combination of all but the last table, then the last one added to each.
    shape = ranks.capacity.shape
    memory, busy = np.zeros((1, *shape)), np.tile(ranks.base_busy_ms, (1, ranks.count, 1))
    for of_table in places:
        extra_memory = np.zeros((len(of_table), *shape))
        extra_busy = np.zeros((len(of_table), *busy.shape[1:]))
        for i, (c, r) in enumerate(of_table):
            where = slice(None) if r < 0 else r
            extra_memory[i, where], extra_busy[i, where] = choices.memory[c], choices.busy[c]
        memory = (memory[:, None] + extra_memory[None]).reshape(-1, *shape)
        busy = (busy[:, None] + extra_busy[None]).reshape(-1, *busy.shape[1:])
        fits = (memory <= ranks.capacity * (1 + 1e-12)).all(axis=(1, 2))
        memory, busy = memory[fits], busy[fits]
    if not len(busy):
        return float("inf")
    host = busy[:, :, ranks.shared].reshape(len(busy), ranks.hosts, ranks.per_host, -1).sum(axis=2)
    own = busy[:, :, ~ranks.shared]
    return float(np.maximum(own.max(axis=(1, 2)), host.max(axis=(1, 2), initial=0.0)).min())


def integer_program(choices: Choices, ranks: Ranks, time_limit_s: float = 60.0) -> float:
    """The same from one binary a (candidate, rank) on HiGHS; infinite where none fits."""
    where = [(c, r) for c in range(len(choices.table)) for r in ([-1] if choices.spread[c] else range(ranks.count))]
    tiers, resources = choices.memory.shape[1], choices.busy.shape[1]
    entries: list[tuple[int, int, float]] = []
    lower, upper = [], []

    def row(cells: list[tuple[int, float]], least: float, most: float) -> None:
        entries.extend((len(lower), column, value) for column, value in cells)
        lower.append(least)
        upper.append(most)

    for t in range(choices.tables):
        row([(1 + i, 1.0) for i, (c, _) in enumerate(where) if choices.table[c] == t], 1.0, 1.0)
    for rank, tier in itertools.product(range(ranks.count), range(tiers)):
        cells = [(1 + i, choices.memory[c, tier] / _MIB) for i, (c, r) in enumerate(where) if r in (-1, rank)]
        row(cells, -np.inf, ranks.capacity[rank, tier] / _MIB)
    for rank, resource in itertools.product(range(ranks.count), range(resources)):
        crowd = [o for o in range(ranks.count) if ranks.host_of[o] == ranks.host_of[rank]] if ranks.shared[resource] else [rank]
        cells = [(1 + i, choices.busy[c, resource] * (len(crowd) if r < 0 else 1)) for i, (c, r) in enumerate(where) if r < 0 or r in crowd]
        row([(0, -1.0), *cells], -np.inf, -float(ranks.base_busy_ms[resource]) * len(crowd))
    rows, columns, values = zip(*entries, strict=True)
    matrix = coo_array((values, (rows, columns)), shape=(len(lower), 1 + len(where))).tocsr()
    solved = milp(
        np.array([1.0] + [0.0] * len(where)),
        constraints=LinearConstraint(matrix, np.array(lower), np.array(upper)),
        integrality=np.array([0] + [1] * len(where)),
        bounds=Bounds(np.zeros(1 + len(where)), np.array([np.inf] + [1.0] * len(where))),
        options={"time_limit": time_limit_s, "mip_rel_gap": 1e-6},
    )
    if solved.x is None:
        return float("inf")
    chosen = [at for at, x in zip(where, solved.x[1:], strict=True) if x > 0.5]
    plan = Assignment(np.array([c for c, _ in chosen]), np.array([r for _, r in chosen]))
    return objective_ms(choices, ranks, plan)


def measure(seeds: range, program_every: int, processes: int | None = None) -> list[dict[str, Any]]:
    """A line a case: the step of the search's plan, of the best of all, and its bound. Every so many cases one is solved as an integer
    program as well. Work of the search is counted, so that ``processes`` side by side (None: one a core) find what one would."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_line, seeds, [seed % program_every == 0 for seed in seeds]))


def _line(seed: int, program: bool) -> dict[str, Any]:
    choices, ranks = small_case(seed)
    found = solve(choices, ranks, _SEARCH_SECONDS)
    line = {"seed": seed, "found_ms": found.objective_ms, "best_ms": brute_force(choices, ranks), "bound_ms": found.relaxation.bound_ms}
    return line | ({"program_ms": integer_program(choices, ranks)} if program else {})


def figures(lines: list[dict[str, Any]]) -> list[Figure]:
    fit = [line for line in lines if math.isfinite(line["best_ms"])]
    ratios = [line["found_ms"] / line["best_ms"] for line in fit]
    agreed = [abs(line["program_ms"] / line["best_ms"] - 1) for line in fit if "program_ms" in line]
    missed = sum(math.isfinite(line["found_ms"]) != math.isfinite(line["best_ms"]) for line in lines)
    beaten = sum(line["bound_ms"] > line["best_ms"] * (1 + 1e-6) for line in fit)
    return [
        Figure("oracles: cases that have a plan", len(fit), "≥ 200", digits=0),
        Figure("oracles: our step ÷ the best, median", statistics.median(ratios), "≤ 1.02", digits=4),
        Figure("oracles: our step ÷ the best, worst", max(ratios), "≤ 1.10", digits=4),
        Figure("oracles: cases where only one of the two finds a plan", missed, "≤ 0", digits=0),
        Figure("oracles: cases whose best plan is below our bound", beaten, "≤ 0", digits=0),
        Figure("oracles: full integer program against brute force, worst difference", max(agreed), "≤ 0.0001", digits=6),
    ]
