"""The rule that shares DDR among tables: every table gets the same number of bytes per lookup, its *level*.

::

    pool_rows(level) = level × lookups of a step ÷ bytes of a slot,  between the smallest legal pool and all rows

A table whose share covers all of its rows stays in memory, without pool, directory and index; so the tables with most lookups
per byte are the ones in memory. Were popularity Zipf's law (the k-th row is looked up in proportion to 1/k), equal bytes per
lookup would be the split with the fewest misses: an additional byte then saves level⁻¹ lookups wherever it goes.

Within the levels between two tables' *full levels* the bytes needed only grow with the level; at a full level they may drop. So
the highest level that fits never falls when the budget rises, and neither do any table's rows in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torchrec.distributed.planner.types import ShardingOption, Storage

from .sharding_options import TieredShardingOption

BISECTIONS = 60  # halvings of an interval of levels: beyond the precision of a float


@dataclass
class Table:
    """One table: how it is kept in memory and how above the SSD; None where it cannot be."""

    name: str
    in_memory: ShardingOption | None
    tiered: TieredShardingOption | None

    @cached_property
    def full_level(self) -> float:
        """The level from which the table is in memory. Infinite where it must not be, 0 where the SSD would save no DDR."""
        if self.tiered is None:
            return 0.0
        if self.in_memory is None:
            return math.inf
        if self.tiered.storage_with(self.tiered.min_pool_rows).ddr >= self.in_memory.total_storage.ddr:
            return 0.0
        return full_pool_level(self.tiered)

    def at(self, level: float) -> ShardingOption:
        """The table's option at a level."""
        if self.tiered is None or level >= self.full_level:
            assert self.in_memory is not None
            return self.in_memory
        return self.tiered.resized(pool_rows(self.tiered, level))

    def storage_at(self, level: float) -> Storage:
        """Storage of all shards at a level."""
        if self.tiered is None or level >= self.full_level:
            return self.at(level).total_storage
        return self.tiered.storage_with(pool_rows(self.tiered, level))


def full_pool_level(tiered: TieredShardingOption) -> float:
    """The level at which a pool holds all rows of its shard."""
    return tiered.shard_rows * tiered.slot_bytes / tiered.lookups if tiered.lookups else math.inf


def pool_rows(tiered: TieredShardingOption, level: float) -> int:
    """Rows of each shard's pool at a level, as large as the table at most."""
    if level >= full_pool_level(tiered):
        return tiered.shard_rows
    return max(tiered.min_pool_rows, int(level * tiered.lookups / tiered.slot_bytes))


def breakpoints(full_levels: Iterable[float]) -> list[float]:
    """Where a table enters memory, highest first, and 0 last."""
    return [*sorted({level for level in full_levels if 0 < level < math.inf}, reverse=True), 0.0]


def highest(full_levels: Sequence[float], top: float, fits: Callable[[float], bool]) -> float | None:
    """The highest level up to ``top`` that ``fits``; None where not even 0 does."""
    if fits(top):
        return top
    above = top
    for start in breakpoints(full_levels):
        if fits(start):
            low, high = start, above
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                low, high = (middle, high) if fits(middle) else (low, middle)
            return low
        above = start
    return None
