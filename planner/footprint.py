"""The least that tables need: whether there is a plan at all, and what is short when there is none.

Of each table only two ways count here: whole in memory where that takes least DDR, and above the SSD with the smallest legal pool. A table
whose smallest pool would save no DDR stays in memory. The others leave memory one after the other, those first that save most DDR per
byte of SSD; so the *members* of this family need ever less DDR and ever more SSD, and on one rank there is a plan if and only if a
member fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torchrec.distributed.planner.types import ShardingOption, Storage

from .sharding_options import TieredShardingOption


@dataclass
class Table:
    """One table: how it is kept in memory and how above the SSD with the smallest pool; None where it cannot be."""

    name: str
    in_memory: ShardingOption | None
    tiered: TieredShardingOption | None

    @cached_property
    def leaves(self) -> bool:
        """Whether it may go to the SSD, and has a choice."""
        return self.tiered is not None and self.in_memory is not None and self._saved_bytes > 0

    @property
    def _saved_bytes(self) -> int:
        assert self.in_memory is not None
        assert self.tiered is not None
        return int(self.in_memory.total_storage.ddr - self.tiered.total_storage.ddr)

    @property
    def saved_per_ssd_byte(self) -> float:
        """DDR that the SSD saves, a byte of the SSD."""
        assert self.tiered is not None
        return self._saved_bytes / max(1, self.tiered.total_storage.ssd)

    def option(self, *, stays: bool) -> ShardingOption:
        """Its option in a member in which it stays in memory, or leaves."""
        kept = self.in_memory if self.tiered is None or (self.in_memory is not None and (stays or not self.leaves)) else self.tiered
        assert kept is not None
        return kept


class Footprint:
    """The family of a model's tables."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = tables
        order = sorted((i for i, table in enumerate(tables) if table.leaves), key=lambda i: tables[i].saved_per_ssd_byte)
        self._position = {i: at for at, i in enumerate(order)}

    def member(self, staying: int) -> list[ShardingOption]:
        """So many of the tables that have a choice stay in memory."""
        return [table.option(stays=self._position.get(i, math.inf) < staying) for i, table in enumerate(self.tables)]

    def totals(self) -> list[Storage]:
        """Storage of all shards of each member, from that in which all stay in memory to that in which none does."""
        order = sorted(self._position, key=self._position.__getitem__)
        total = sum((table.option(stays=True).total_storage for table in self.tables), Storage(0, 0, 0))
        result = [total]
        for i in reversed(order):
            total = total - self.tables[i].option(stays=True).total_storage + self.tables[i].option(stays=False).total_storage
            result.append(total)
        return result
