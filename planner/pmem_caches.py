"""How a rank's PMem is shared among its tiered tables where nobody searches: by lookups. Plans made by hand go by it.

Every table gets the same number of PMem bytes per lookup, up to the rows that its pool leaves out; what it cannot use goes to the
others. A cache is exclusive, so pool and cache together hold that many more rows.

A cache's index costs DDR, 4 bytes for every row of the table and 32 for every row of the cache, and takes it from the pools. So
a cache must hold more rows than its index would hold as slots of the pool; one that does not (a small device below a long table)
is left out, and its share goes to the others. Where all indexes together exceed the DDR that the smallest pools leave, all
caches shrink by one factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from . import charges


@dataclass(frozen=True)
class Uncached:
    """One table shard on a rank: rows, how many of them its pool leaves out, and rows looked up in a step."""

    rows: int
    rows_below_pool: int
    record_bytes: int
    lookups: float

    def gain(self, cache_rows: int) -> float:
        """Rows that a cache holds ÷ rows that its index would hold as slots of the pool."""
        slots = charges.cache_index_bytes(self.rows, cache_rows) / charges.slot_bytes(self.record_bytes)
        return cache_rows / slots


def share(room: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """Room in proportion to the weights; nobody gets more than ``most`` of his, and what he leaves goes to the others.

    Shapes: weights (n,), most (n,) → (n,), of a sum of at most ``room``.
    """
    parts = [0] * len(most)
    wanting = sorted((i for i in range(len(most)) if weights[i] > 0), key=lambda i: most[i] / weights[i])
    left = list(accumulate(weights[i] for i in reversed(wanting)))  # the weight of everyone from here on, last first
    for i in wanting:
        parts[i] = min(most[i], room, int(room * (weights[i] / left.pop())))
        room -= parts[i]
    return parts


def cache_rows(shards: Sequence[Uncached], pmem_bytes: int, ddr_bytes: float = math.inf) -> list[int]:
    """Rows of each shard's cache, 0 for none, in so much PMem and with indexes of so much DDR. Shapes: shards (n,) → (n,)."""
    rows = [0] * len(shards)
    cached = [i for i, shard in enumerate(shards) if shard.rows_below_pool]
    while cached:
        room = pmem_bytes - len(cached) * charges.PAGE_BYTES  # a file takes whole pages
        most = [shards[i].rows_below_pool * shards[i].record_bytes for i in cached]
        parts = share(max(0, room), [shards[i].lookups for i in cached], most)
        got = {i: part // shards[i].record_bytes for i, part in zip(cached, parts, strict=True)}
        fixed = sum(charges.cache_index_bytes(shards[i].rows, 0) for i in cached)
        index = sum(charges.cache_index_bytes(shards[i].rows, got[i]) for i in cached)
        if index > ddr_bytes:
            got = {
                i: int(rows_of_i * max(0.0, ddr_bytes - fixed) / (index - fixed)) if index > fixed else 0 for i, rows_of_i in got.items()
            }
        worst = min(cached, key=lambda i: shards[i].gain(got[i]))
        if shards[worst].gain(got[worst]) > 1:
            for i in cached:
                rows[i] = got[i]
            return rows
        cached.remove(worst)
    return rows
