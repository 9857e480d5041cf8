"""Sizes between those of the grid: every table stays in its place, and the step is the least that memory there allows.

``sizes_in_place.best_shares`` mixes the offered sizes of a table; a mixture of pools, and of caches, of one way above the SSD is a pool and
a cache, which misses no more than the mixture does. Not so across ways, nor with and without a cache, whose index is there or is not: of
these the largest share decides, or, where those do not fit together, the plan; a second program mixes what is left. Caches take whole
pages: what a rank lacks, pools and caches there give back.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
from torchrec.distributed.planner.types import ShardingOption

from .candidates import TIERS, Candidates, Sizes, memory_of
from .choices import Assignment, Floats, Ints, Ranks, fitting
from .sharding_options import TieredShardingOption
from .sizes_in_place import best_shares

_SHARE = 1e-6  # of a table: less is rounding
_WHOLE = 1e-3  # of a row: less is missing by rounding
_SPARE = 1e-5  # of a rank's memory: the program's own tolerance

Plan = list[tuple[ShardingOption, Sizes]]


def sizes_between(offered: Candidates, ranks: Ranks, plan: Assignment) -> Plan | None:
    """Way and sizes of every table, on the ranks of the plan; None where none were found that fit."""
    choices = offered.choices
    in_place = fitting(choices, ranks)
    in_place = np.union1d(in_place[choices.spread[in_place] == (plan.rank[choices.table[in_place]] < 0)], plan.candidate)
    share = best_shares(choices, ranks, plan.rank, in_place)
    if share is None:
        return None
    largest = np.array([first + int(np.argmax(share[first:last])) for first, last in pairwise(choices.starts)])
    for chosen in (largest, plan.candidate):
        found = _of_these_kinds(offered, ranks, plan.rank, chosen, in_place)
        if found is not None:
            return found
    return None


def _of_these_kinds(offered: Candidates, ranks: Ranks, rank_of: Ints, kinds: Ints, in_place: Ints) -> Plan | None:
    """``kinds``: of each table a candidate of the way that it goes."""
    choices = offered.choices
    of_kind = np.array([i for i in in_place if _one_kind(offered, i, kinds[choices.table[i]])])
    share = best_shares(choices, replace(ranks, capacity=(1 - _SPARE) * ranks.capacity), rank_of, of_kind)
    if share is None:
        return None
    parts = [first + np.flatnonzero(share[first:last] > _SHARE) for first, last in pairwise(choices.starts)]
    found = [_mixture(offered, of_table, share[of_table]) for of_table in parts]
    held = np.zeros_like(ranks.capacity)
    for (option, sizes), rank in zip(found, rank_of, strict=True):
        held[_places(rank)] += memory_of(option, [sizes])[0]
    for table in sorted(range(choices.tables), key=lambda t: -found[t][1].pool_rows):
        option, sizes = found[table]
        where = _places(rank_of[table])
        lacking = dict(zip(TIERS, np.maximum(0.0, (held - ranks.capacity)[where].max(axis=0)), strict=True))
        if not isinstance(option, TieredShardingOption) or not (lacking[option.pool_tier] or lacking[option.cache_tier]):
            continue
        least = min(offered.sizes[i].pool_rows for i in parts[table])
        pool = max(least, sizes.pool_rows - math.ceil(lacking[option.pool_tier] / option.slot_bytes))
        cache = max(0, sizes.cache_rows - math.ceil(lacking[option.cache_tier] / option.record_bytes))
        found[table] = option, Sizes(*option.legal(pool, cache if option.worth(cache) else 0))
        held[where] += (memory_of(option, [found[table][1]]) - memory_of(option, [sizes]))[0]
    return found


def _places(rank: int) -> slice:
    return slice(None) if rank < 0 else slice(rank, rank + 1)


def _one_kind(offered: Candidates, one: int, other: int) -> bool:
    return offered.options[one] is offered.options[other] and bool(offered.sizes[one].cache_rows) == bool(offered.sizes[other].cache_rows)


def _mixture(offered: Candidates, parts: Ints, share: Floats) -> tuple[ShardingOption, Sizes]:
    option, weights = offered.options[parts[0]], share / share.sum()
    if not isinstance(option, TieredShardingOption):
        return option, Sizes()
    pool, cache = (int(weights @ [getattr(offered.sizes[i], rows) for i in parts] + _WHOLE) for rows in ("pool_rows", "cache_rows"))
    return option, Sizes(*option.legal(pool, cache))
