"""From TorchRec's options to the arrays of ``choices.py``, and back.

A table's ways: its options in memory (table- or row-wise, data-parallel; a column-wise one as a whole on one rank), and above the SSD a
grid of pools × PMem caches for each sharding. The grid is geometric, from what batches in flight take to all rows, and finer round the
sizes of a plan that is to be improved. The smallest legal pool, into which nothing may be prefetched, is a way as well.

A shard on every rank is charged and timed on all of them like the largest and the busiest of them: never too little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torchrec.distributed.planner.types import PartitionByType, ShardingOption, Storage

from .alike_shards import alike, copied, of_shards
from .choices import Choices, Floats, Ints
from .estimators import uncharged_bytes
from .perf_model import PerfModel, ShardUse
from .sharding_options import TieredShardingOption

TIERS = ("ddr", "pmem", "ssd", "hbm")

POOLS = 12  # sizes of a table's pool, from one that can be prefetched into to all rows
CACHE_SHARES = (0.0, 0.03, 0.1, 0.3, 0.6, 1.0)  # of the rows that a pool leaves out
_FINER = np.array([-0.6, -0.3, 0.3, 0.6])  # of a step of the grid, beside the sizes of a plan


class Sizes(NamedTuple):
    """Rows of a pool and of a cache of each shard; (0, 0) for a table in memory."""

    pool_rows: int = 0
    cache_rows: int = 0


@dataclass(frozen=True)
class Candidates:
    """Every way of every table, in the order of the choices."""

    options: list[ShardingOption]
    sizes: list[Sizes]
    choices: Choices

    def placed(self, candidate: Ints, rank: Ints) -> list[ShardingOption]:
        """The options of an assignment, every shard with its rank, pools and caches of their sizes."""
        result = []
        for at, on in zip(candidate, rank, strict=True):
            option, sizes = self.options[at], self.sizes[at]
            option = option.resized(sizes.pool_rows, sizes.cache_rows) if isinstance(option, TieredShardingOption) else copied(option)
            for i, shard in enumerate(option.shards):
                shard.rank = i if on < 0 else int(on)
            result.append(option)
        return result


def candidates(
    tables: Sequence[Sequence[ShardingOption]],
    model: PerfModel,
    pmem: bool,
    around: Sequence[Sizes | None] | None = None,
    finer: float = 1.0,
    also: Sequence[Sizes] | None = None,
) -> Candidates:
    """``tables``: the options of each. ``around``: sizes of each table's pool and cache in a plan, round which
    the grid is finer by so much. ``also``: further sizes of each, as they are."""
    options: list[ShardingOption] = []
    sizes: list[Sizes] = []
    table: list[int] = []
    spread: list[bool] = []
    memory: list[Floats] = []
    busy: list[Floats] = []
    for t, of_table in enumerate(tables):
        for option in of_table:
            everywhere = is_spread(option)
            if isinstance(option, TieredShardingOption):
                found = _grid(option, pmem, around[t] if around else None, finer, also[t] if also else Sizes())
            else:
                found = [Sizes()]
            options += [option] * len(found)
            sizes += found
            table += [t] * len(found)
            spread += [everywhere] * len(found)
            memory.append(memory_of(option, found))
            busy.append(_busy(option, model, found))
    return Candidates(options, sizes, Choices(np.array(table), np.array(spread), np.concatenate(memory), np.concatenate(busy)))


def is_spread(option: ShardingOption) -> bool:
    """Whether the option has a shard on every rank; else all are on one."""
    return bool(option.partition_by == PartitionByType.UNIFORM.value)


def placeable(option: ShardingOption) -> bool:
    """Whether the search has a place for such an option."""
    return option.partition_by in (PartitionByType.UNIFORM.value, PartitionByType.DEVICE.value)


def busiest(option: ShardingOption) -> ShardUse:
    """Of the shards, the one with most lookups."""
    uses: list[ShardUse] = option.uses
    return max(uses, key=lambda use: use.lookups)


def busy_of_shards(option: ShardingOption, model: PerfModel) -> list[Floats]:
    """What a step keeps each resource busy for every shard. Shapes: (resources,)."""
    if isinstance(option, TieredShardingOption):
        return of_shards(option, option.busy_ms)
    return of_shards(option, lambda i: model.in_memory(option.uses[i]))


def memory_of(option: ShardingOption, sizes: Sequence[Sizes]) -> Floats:
    """Bytes of the largest shard in every tier, by sizes; of a table on one rank, of all its shards. Shape (sizes, tiers)."""
    memory = np.zeros((len(sizes), len(TIERS)))
    if not isinstance(option, TieredShardingOption):
        together = max if is_spread(option) else sum
        ddr = (shard.storage.ddr + missing for shard, missing in zip(option.shards, uncharged_bytes(option), strict=True))
        memory[:, TIERS.index("ddr")] = together(ddr)
        memory[:, TIERS.index("hbm")] = together(shard.storage.hbm for shard in option.shards)
        return memory
    pool, cache = _columns(sizes)
    for kind in alike(option):  # which takes most depends on the sizes: one of more rows, or one of more lookups
        i = kind[0]
        ddr, hbm = (bytes_of(i, pool, cache) for bytes_of in (option.ddr_bytes, option.hbm_bytes))
        for tier, of_tier in enumerate((ddr, option.pmem_bytes_of(i, cache), option.shards[i].storage.ssd, hbm)):
            np.maximum(memory[:, tier], of_tier, out=memory[:, tier])
    return memory


def _busy(option: ShardingOption, model: PerfModel, sizes: Sequence[Sizes]) -> Floats:
    """Shape (sizes, resources)."""
    if isinstance(option, TieredShardingOption):
        return option.busy_of(busiest(option), *_columns(sizes))
    if is_spread(option):
        return model.in_memory(busiest(option))[None]
    return np.sum(busy_of_shards(option, model), axis=0, keepdims=True)


def _columns(sizes: Sequence[Sizes]) -> tuple[Ints, Ints]:
    return np.array([s.pool_rows for s in sizes]), np.array([s.cache_rows for s in sizes])


def _grid(option: TieredShardingOption, pmem: bool, around: Sizes | None, finer: float, also: Sizes) -> list[Sizes]:
    rows, least = option.shard_rows, option.min_pool_rows
    first = max(least, math.ceil(max(use.rows_in_flight for use in option.uses)))
    step = (rows / first) ** (1 / (POOLS - 1))
    pools = {least, *np.rint(np.geomspace(first, rows, POOLS)).astype(int).tolist()}
    cached = option.may_be_cached(pmem)
    shares = set(CACHE_SHARES if cached else (0.0,))
    near: set[Sizes] = set()
    if around is not None and around.pool_rows:
        beside = [around.pool_rows, *(around.pool_rows * step ** (_FINER * finer))]
        near_pools = {min(rows, max(least, round(p))) for p in beside}
        caches = {0, *(round(around.cache_rows * f) for f in (1.0, *(1 + _FINER * finer)))} if cached else {0}
        near = {Sizes(*option.legal(p, c)) for p in near_pools for c in caches}
    if also.pool_rows:
        near.add(Sizes(*option.legal(min(rows, max(least, also.pool_rows)), also.cache_rows if cached else 0)))
    grid = {Sizes(*option.legal(p, int((rows - p) * share))) for p in pools for share in shares} | near
    return sorted(s for s in grid if option.worth(s.cache_rows))


def ranks_memory(storage: Sequence[Storage], pmem_bytes: int) -> Floats:
    """Capacities as ``choices.Ranks`` wants them. Shape (ranks, tiers)."""
    return np.array([[s.ddr, pmem_bytes, s.ssd, s.hbm] for s in storage], np.float64)
