"""After the placement: every rank pours what is left of its DDR into the pools of its tables, at a level of its own."""

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
from .sharding_options import TieredShardingOption


@dataclass
class _Resident:
    """One shard of a tiered table on a rank, and the table's option in memory, where the shard could stay there instead."""

    option: TieredShardingOption
    shard: int
    in_memory: ShardingOption | None

    @cached_property
    def full_level(self) -> float:
        return Table(self.option.name, self.in_memory, self.option).full_level

    def ddr_bytes(self, level: float) -> int:
        if self.in_memory is not None and level >= self.full_level:
            return self.in_memory.total_storage.ddr
        return self.option.ddr_bytes(self.shard, pool_rows(self.option, level))


def fill_pools(
    plan: Sequence[ShardingOption], capacity: Sequence[Storage], in_memory: Mapping[str, ShardingOption]
) -> tuple[list[ShardingOption], dict[str, float]]:
    """The placed plan with pools as large as each rank's DDR allows, and the level of every tiered table.

    A table-wise table whose pool would hold all of its rows stays in memory. A row-wise table, whose pools are of one size, takes
    the lowest of its ranks' levels.
    """
    free = [storage.ddr for storage in capacity]
    residents: dict[int, list[_Resident]] = defaultdict(list)
    for option in plan:
        for i, shard in enumerate(option.shards):
            if isinstance(option, TieredShardingOption):
                alternative = in_memory.get(option.fqn)
                whole = alternative is not None and (alternative.sharding_type, alternative.compute_kernel) == (TABLE_WISE, FUSED)
                residents[shard.rank].append(_Resident(option, i, alternative if whole and option.sharding_type == TABLE_WISE else None))
            else:
                free[shard.rank] -= shard.storage.ddr
    level_of_rank = {rank: _level(tables, free[rank]) for rank, tables in residents.items()}
    filled, levels = [], {}
    for option in plan:
        if isinstance(option, TieredShardingOption):
            level = min(level_of_rank[shard.rank] for shard in option.shards)
            resident = next(r for r in residents[option.shards[0].rank] if r.option is option)
            levels[option.fqn] = level
            filled.append(_at(resident, level))
        else:
            filled.append(option)
    return filled, levels


def _level(residents: Sequence[_Resident], free_ddr_bytes: int) -> float:
    top = max((full for r in residents if (full := full_pool_level(r.option)) < math.inf), default=0.0)
    level = highest([r.full_level for r in residents], top, lambda at: sum(r.ddr_bytes(at) for r in residents) <= free_ddr_bytes)
    assert level is not None, "the plan was placed with smaller pools"
    return level


def _at(resident: _Resident, level: float) -> ShardingOption:
    if resident.in_memory is None or level < resident.full_level:
        return resident.option.resized(pool_rows(resident.option, level))
    option = copy.deepcopy(resident.in_memory)
    option.shards[0].rank = resident.option.shards[0].rank
    return option
