"""The last bytes: what a plan leaves of each rank's memory makes caches, then pools, larger.

Always the table gets more that saves most time a byte, priced as the search's bound prices it; it gets an eighth of what is left, or what
it can use, and then the next one. Sizes only grow, and no rank's memory is exceeded.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torchrec.distributed.planner.types import ShardingOption, Storage

from . import charges
from .alike_shards import alike
from .estimators import uncharged_bytes
from .perf_model import Floats
from .sharding_options import TieredShardingOption

_TIERS = ("ddr", "hbm", "pmem")
_PART = 8
_ANY_WORK = 1e-3  # the price of time that is not the bottleneck's


@dataclass
class _Growing:
    """One tiered table while its sizes grow."""

    option: TieredShardingOption
    pool_rows: int
    cache_rows: int
    price: Floats
    kinds: list[list[int]]  # of shards: those alike

    @property
    def ranks(self) -> list[int]:
        """Of the shards, in their order."""
        return [shard.rank for shard in self.option.shards]

    def bytes_of(self, shard: int, pool_rows: int, cache_rows: int) -> Floats:
        """Of one shard with such sizes, to the byte: records of a cache are in whole pages. Shape (tiers,)."""
        o = self.option
        sizes = shard, pool_rows, cache_rows
        return np.array([o.ddr_bytes(*sizes), o.hbm_bytes(*sizes), o.pmem_bytes_of(shard, cache_rows)], np.float64)

    @property
    def room(self) -> int:
        """Rows that neither has."""
        return max(0, self.option.shard_rows - self.pool_rows - self.cache_rows)

    def gain(self, more_pool: int, more_cache: int) -> float:
        """Priced time that so many more rows save, on all ranks."""
        sizes = [self.pool_rows, self.pool_rows + more_pool], [self.cache_rows, self.cache_rows + more_cache]
        saved = 0.0
        for kind in self.kinds:
            now, then = self.option.busy_of(self.option.uses[kind[0]], *sizes) @ self.price
            saved += len(kind) * float(now - then)
        return saved


def fill(plan: Sequence[ShardingOption], capacity: Sequence[Storage], pmem_bytes: int, busy_price: Floats) -> list[ShardingOption]:
    """The placed plan with larger pools and caches. Shape: busy_price (resources,)."""
    free = np.array([[s.ddr, s.hbm, pmem_bytes] for s in capacity], np.float64)
    for option in plan:
        for i, (shard, missing) in enumerate(zip(option.shards, uncharged_bytes(option), strict=True)):
            pmem = option.pmem_bytes_of(i, option.cache_rows) if isinstance(option, TieredShardingOption) else 0
            free[shard.rank] -= shard.storage.ddr + missing, shard.storage.hbm, pmem
    price = busy_price + _ANY_WORK
    tables = [_Growing(o, o.pool_rows, o.cache_rows, price, alike(o)) for o in plan if isinstance(o, TieredShardingOption)]

    def left(t: _Growing, tier: str) -> float:
        return float(free[t.ranks, _TIERS.index(tier)].min())

    def grow(t: _Growing, pool_rows: int, cache_rows: int) -> None:
        for kind in t.kinds:
            more = t.bytes_of(kind[0], pool_rows, cache_rows) - t.bytes_of(kind[0], t.pool_rows, t.cache_rows)
            np.subtract.at(free, [t.option.shards[i].rank for i in kind], more)
        t.pool_rows, t.cache_rows = pool_rows, cache_rows

    def more_cache(t: _Growing, share: float) -> int:
        if not t.cache_rows:
            return 0  # the search found that its index costs more than it holds
        records = left(t, t.option.cache_tier) - charges.PAGE_BYTES
        rows = int(share * records) // t.option.record_bytes, int(share * left(t, t.option.pool_tier)) // t.option.cached_index_bytes
        return min(t.room, *rows)

    def more_pool(t: _Growing, share: float) -> int:
        most = min(t.room, t.option.most_pool_rows(t.cache_rows) - t.pool_rows)
        return min(most, t.option.more_slots(share * left(t, t.option.pool_tier)))

    _pour(
        tables,
        more_cache,
        lambda t, rows: grow(t, t.pool_rows, t.cache_rows + rows),
        lambda t, rows: t.gain(0, rows) / (rows * t.option.record_bytes),
    )
    _pour(
        tables,
        more_pool,
        lambda t, rows: grow(t, t.pool_rows + rows, t.cache_rows),
        lambda t, rows: t.gain(rows, 0) / (rows * t.option.slot_bytes),
    )
    grown = {t.option.fqn: t for t in tables}
    return [_resized(grown[o.fqn]) if o.fqn in grown else o for o in plan]


def _pour(
    tables: Sequence[_Growing],
    more: Callable[[_Growing, float], int],
    grow: Callable[[_Growing, int], None],
    gain: Callable[[_Growing, int], float],
) -> None:
    """Rank by rank; of a table on several ranks the first of them is its own."""
    by_rank: dict[int, list[_Growing]] = defaultdict(list)
    for table in tables:
        by_rank[table.option.shards[0].rank].append(table)
    for of_rank in by_rank.values():
        queue = [(-gain(t, rows), i) for i, t in enumerate(of_rank) if (rows := more(t, 1 / _PART) or more(t, 1.0)) > 0]
        heapq.heapify(queue)
        while queue:
            _, i = heapq.heappop(queue)
            rows = more(of_rank[i], 1 / _PART) or more(of_rank[i], 1.0)
            if rows > 0:
                grow(of_rank[i], rows)
                if (rows := more(of_rank[i], 1 / _PART) or more(of_rank[i], 1.0)) > 0:
                    heapq.heappush(queue, (-gain(of_rank[i], rows), i))


def _resized(table: _Growing) -> TieredShardingOption:
    option = table.option.resized(table.pool_rows, table.cache_rows)
    for new, old in zip(option.shards, table.option.shards, strict=True):
        new.rank = old.rank
    return option
