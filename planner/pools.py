"""After the placement: every rank pours what is left of its DDR into the pools of its tables, at a level of its own.

With PMem, in rounds: pools as if there were no caches; caches for what those pools leave out; pools again, in the DDR that the
caches' indexes leave; caches again, for what the smaller pools leave out; and so on.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torchrec.distributed.planner.types import ShardingOption, Storage

from .enumerators import FUSED, TABLE_WISE
from .levels import Table, full_pool_level, highest, pool_rows
from .pmem_caches import Uncached, cache_rows
from .sharding_options import TieredShardingOption

CACHE_ROUNDS = 3  # a row that leaves a pool costs its cache an index entry of 32 bytes, so that each round is off by a part of the last


@dataclass
class _Resident:
    """One shard of a tiered table on a rank, and the table's option in memory, where the shard could stay there instead."""

    option: TieredShardingOption
    shard: int
    in_memory: ShardingOption | None

    @cached_property
    def full_level(self) -> float:
        return Table(self.option.name, self.in_memory, self.option).full_level

    def whole(self, level: float) -> bool:
        return self.in_memory is not None and level >= self.full_level

    def ddr_bytes(self, level: float) -> int:
        if self.in_memory is not None and self.whole(level):
            return self.in_memory.total_storage.ddr
        return self.option.ddr_bytes(self.shard, pool_rows(self.option, level))

    def uncached(self, level: float) -> Uncached:
        rows = self.option.shards[self.shard].size[0]
        below = 0 if self.whole(level) else max(0, rows - pool_rows(self.option, level))
        return Uncached(rows, below, self.option.record_bytes, self.option.lookups)


class _Ranks:
    """The tiered tables of a plan, by rank, and the level of each rank: the highest that fits."""

    def __init__(
        self, tables: Sequence[TieredShardingOption], in_memory: Mapping[str, ShardingOption], free_ddr_bytes: Sequence[int]
    ) -> None:
        self._tables, self._in_memory, self._free = tables, in_memory, free_ddr_bytes
        self.residents: dict[int, list[_Resident]] = defaultdict(list)
        for table in tables:
            for i, shard in enumerate(table.shards):
                self.residents[shard.rank].append(_Resident(table, i, self._alternative(table)))
        self.levels = {rank: _level(residents, free_ddr_bytes[rank]) for rank, residents in self.residents.items()}

    def _alternative(self, table: TieredShardingOption) -> ShardingOption | None:
        """The table's option in memory, if it is of the same shape: a table-wise table may stay there."""
        option = self._in_memory.get(table.fqn)
        whole = option is not None and (option.sharding_type, option.compute_kernel) == (TABLE_WISE, FUSED)
        return option if whole and table.sharding_type == TABLE_WISE else None

    def with_caches(self, pools: _Ranks, pmem_bytes: int) -> _Ranks:
        """The same with caches for what ``pools`` leave out."""
        least: dict[str, int] = {}
        for rank, residents in pools.residents.items():
            ddr_bytes = self._free[rank] - sum(resident.ddr_bytes(0.0) for resident in self.residents[rank])
            rows = cache_rows([resident.uncached(pools.levels[rank]) for resident in residents], pmem_bytes, ddr_bytes)
            for resident, of_rank in zip(residents, rows, strict=True):
                least[resident.option.fqn] = min(of_rank, least.get(resident.option.fqn, of_rank))
        return _Ranks([table.cached(least[table.fqn]) for table in self._tables], self._in_memory, self._free)

    def filled(self) -> dict[str, tuple[ShardingOption, float]]:
        """By table: its option at the lowest level of its ranks, and that level."""
        result = {}
        for residents in self.residents.values():
            for resident in residents:
                level = min(self.levels[shard.rank] for shard in resident.option.shards)
                result[resident.option.fqn] = (_at(resident, level), level)
        return result


def fill_pools(
    plan: Sequence[ShardingOption], capacity: Sequence[Storage], in_memory: Mapping[str, ShardingOption], pmem_bytes: int
) -> tuple[list[ShardingOption], dict[str, float]]:
    """The placed plan with pools as large as each rank's DDR allows, caches as its PMem does, and the level of every tiered table.

    A table-wise table whose pool would hold all of its rows stays in memory. A row-wise table, whose pools and caches are of one
    size, takes the lowest of its ranks' levels, and the least of their caches.
    """
    free = [storage.ddr for storage in capacity]
    tables = []
    for option in plan:
        if isinstance(option, TieredShardingOption):
            tables.append(option)
            continue
        for shard in option.shards:
            free[shard.rank] -= shard.storage.ddr
    ranks = bare = _Ranks(tables, in_memory, free)
    for _ in range(CACHE_ROUNDS if pmem_bytes else 0):
        ranks = bare.with_caches(ranks, pmem_bytes)
    filled = ranks.filled()
    return [filled[o.fqn][0] if o.fqn in filled else o for o in plan], {name: level for name, (_, level) in filled.items()}


def _level(residents: Sequence[_Resident], free_ddr_bytes: int) -> float:
    top = max((full for r in residents if (full := full_pool_level(r.option)) < math.inf), default=0.0)
    level = highest([r.full_level for r in residents], top, lambda at: sum(r.ddr_bytes(at) for r in residents) <= free_ddr_bytes)
    assert level is not None, "the plan was placed with smaller pools, and caches take what those leave"
    return level


def _at(resident: _Resident, level: float) -> ShardingOption:
    if resident.in_memory is None or not resident.whole(level):
        return resident.option.resized(pool_rows(resident.option, level))
    option = copy.deepcopy(resident.in_memory)
    option.shards[0].rank = resident.option.shards[0].rank
    return option
