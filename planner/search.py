"""The search for the plan with the fastest predicted step: candidates, ``assignment.solve``, finer candidates, again, and the last bytes.

The grid of sizes is coarse at first. Each further round offers sizes between, near those of the best plan so far, and starts from it, so
that no round is worse than the one before. What is left of memory afterwards (``filling.py``) makes pools and caches larger.

Tables in memory are a group of their own, and one group more costs a step a fixed time, which no sum over tables shows. So the search
runs twice: with every rank charged for it, and with all tables above the SSD, where the hottest may be whole in their pools.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from torchrec.distributed.planner.types import ShardingOption, Storage

from .assignment import solve
from .candidates import TIERS, Candidates, Sizes, busy_of_shards, candidates, ranks_memory
from .choices import Assignment, Choices, Ints, Ranks, objective_ms
from .filling import fill
from .perf_model import CPU, SHARED, PerfModel, StepPrediction
from .relaxation import Relaxation, relax
from .sharding_options import TieredShardingOption
from .sizes_between import sizes_between

_FINER = (1.0, 0.25)  # of a step of the grid, in the rounds after the first
_FULL = 1e-6  # of a capacity: what the relaxation may lack by rounding
_FIRST_SHARE = 0.6  # of the time, for the first round


@dataclass(frozen=True)
class Capacity:
    """What the tables may take of each rank's memory; PMem of every rank alike."""

    storage: Sequence[Storage]
    pmem_bytes: int = 0

    def ranks(self, model: PerfModel) -> Ranks:
        """As ``choices`` has them."""
        return Ranks(ranks_memory(self.storage, self.pmem_bytes), model.base_ms.copy(), SHARED, model.ranks_per_host)


@dataclass(frozen=True)
class SearchResult:
    """``options``: every table's, placed. ``seconds``: that it took. Bounds are of the grid's sizes and those near this plan's."""

    options: list[ShardingOption]
    prediction: StepPrediction
    seconds: float
    _relaxation: Relaxation
    _choices: Choices
    _ranks: Ranks

    @property
    def bound_ms(self) -> float:
        """No plan has a faster step."""
        return self._relaxation.bound_ms

    @property
    def over_bound(self) -> float:
        """The plan's step ÷ the bound."""
        return self.prediction.step_ms / self.bound_ms if self.bound_ms else 1.0

    def bound_with(self, tier: str, capacity_bytes: float) -> float | None:
        """The bound, had every rank so much of a tier; None where the tables would not fit."""
        memory = self._ranks.capacity.copy()
        memory[:, TIERS.index(tier)] = capacity_bytes
        relaxation = relax(self._choices, replace(self._ranks, capacity=memory), near=self._relaxation)
        return None if (relaxation.excess > _FULL).any() else relaxation.bound_ms

    def capacity_bytes(self, tier: str) -> float:
        """What a rank has of a tier, on average."""
        return float(self._ranks.capacity[:, TIERS.index(tier)].mean())


def search(
    tables: Sequence[Sequence[ShardingOption]],
    capacity: Capacity,
    model: PerfModel,
    seconds: float,
    start: Callable[[], Sequence[ShardingOption] | None] = lambda: None,
) -> SearchResult | None:
    """The best plan found in about so many seconds; None where none was found to fit. ``tables``: the options of each. ``start`` finds a
    plan of some of them, with smallest pools, that is known to fit; it is asked where the candidates, which charge a rank for the largest
    shard of a table, leave no other."""
    began = time.perf_counter()
    above = [[o for o in of_table if isinstance(o, TieredShardingOption)] for of_table in tables]
    passes = [(tables, model.stock_group_ms, start)]
    if model.stock_group_ms and all(above):
        passes.append((above, 0.0, lambda: None))
    plans = [_plan(ways, capacity, model, more_ms, seconds / len(passes), known) for ways, more_ms, known in passes]
    steps = [float("inf") if plan is None else predicted(plan, model, len(capacity.storage)).step_ms for plan in plans]
    best = plans[int(np.argmin(steps))]
    return None if best is None else _result(best, tables, capacity, model, began)


def _plan(
    tables: Sequence[Sequence[ShardingOption]],
    capacity: Capacity,
    model: PerfModel,
    more_ms: float,
    seconds: float,
    start: Callable[[], Sequence[ShardingOption] | None],
) -> list[ShardingOption] | None:
    """The best plan found. ``more_ms``: of every rank's training thread, whatever the plan."""
    ranks = capacity.ranks(model)
    ranks.base_busy_ms[CPU] += more_ms
    pmem = capacity.pmem_bytes > 0
    offered = candidates(tables, model, pmem)
    solution = solve(offered.choices, ranks, _FIRST_SHARE * seconds)
    if not np.isfinite(solution.objective_ms):
        known = start()
        if known is None:
            return None
        solution = solve(offered.choices, ranks, _FIRST_SHARE * seconds, _found(offered, known))
        if not np.isfinite(solution.objective_ms):
            return fill(known, capacity.storage, capacity.pmem_bytes, 0 * model.base_ms)
    placed = offered.placed(solution.assignment.candidate, solution.assignment.rank)
    for finer in _FINER:
        chosen = [(offered.options[i], offered.sizes[i]) for i in solution.assignment.candidate]
        between = sizes_between(offered, ranks, solution.assignment)
        offered = candidates(tables, model, pmem, [sizes for _, sizes in between or chosen], finer, [sizes for _, sizes in chosen])
        starts = [Assignment(_indices(offered, plan), solution.assignment.rank) for plan in (chosen, between) if plan]
        steps = [objective_ms(offered.choices, ranks, start) for start in starts]
        finer_one = solve(offered.choices, ranks, (1 - _FIRST_SHARE) / len(_FINER) * seconds, starts[int(np.argmin(steps))])
        if not np.isfinite(finer_one.objective_ms):
            break  # it gave up where some bytes were still too many
        solution, placed = finer_one, offered.placed(finer_one.assignment.candidate, finer_one.assignment.rank)
    return fill(placed, capacity.storage, capacity.pmem_bytes, solution.relaxation.busy_price)


def _result(
    options: list[ShardingOption], tables: Sequence[Sequence[ShardingOption]], capacity: Capacity, model: PerfModel, began: float
) -> SearchResult:
    sizes = [Sizes(o.pool_rows, o.cache_rows) if isinstance(o, TieredShardingOption) else None for o in options]
    choices, ranks = candidates(tables, model, capacity.pmem_bytes > 0, sizes).choices, capacity.ranks(model)
    relaxation, prediction = relax(choices, ranks), predicted(options, model, len(capacity.storage))
    return SearchResult(options, prediction, time.perf_counter() - began, relaxation, choices, ranks)


def predicted(options: Sequence[ShardingOption], model: PerfModel, world_size: int) -> StepPrediction:
    """The step of a placed plan, from what each of its shards does."""
    tiered, stock = ({s.rank for o in options if isinstance(o, TieredShardingOption) is kind for s in o.shards} for kind in (True, False))
    busy = np.tile(model.base_of(tiered=bool(tiered)), (world_size, 1))
    busy[sorted(tiered & stock), CPU] += model.stock_group_ms
    for option in options:
        for shard, busy_ms in zip(option.shards, busy_of_shards(option, model), strict=True):
            busy[shard.rank] += busy_ms
    return model.predict(busy)


def _found(offered: Candidates, plan: Sequence[ShardingOption]) -> Assignment:
    chosen = [(o, Sizes(o.pool_rows) if isinstance(o, TieredShardingOption) else Sizes()) for o in plan]
    everywhere = offered.choices.spread[indices := _indices(offered, chosen)]
    return Assignment(indices, np.array([-1 if all_ranks else o.shards[0].rank for o, all_ranks in zip(plan, everywhere, strict=True)]))


def _indices(offered: Candidates, chosen: Sequence[tuple[ShardingOption, Sizes]]) -> Ints:
    found = []
    for (option, sizes), (first, last) in zip(chosen, pairwise(offered.choices.starts), strict=True):
        found.append(next(i for i in range(first, last) if offered.options[i] is option and offered.sizes[i] == sizes))
    return np.array(found)
