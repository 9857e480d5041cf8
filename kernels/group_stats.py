"""``GroupStats``: what a group of tiered tables says of its tiers and volumes since creation."""

from __future__ import annotations

from typing import Any

from ..tiers import Cache
from .caches import CachedVolume


class GroupStats:
    """Of a group that has pools, and what is below them."""

    tables: list[Any]
    pool_rows: list[int]
    _pool: Any
    _home_tables: list[Any]
    _below_pools: list[Any]
    _cached: dict[int, CachedVolume]

    def _native_caches(self, table: Any) -> tuple[Cache, ...]:
        """Those of the chain's caches that stand in front of the table's home."""
        caches: tuple[Cache, ...] = table.chain.caches
        return caches

    def volumes(self) -> list[Any]:
        """The volumes below this group, each once."""
        return list({id(h.volume): h.volume for h in self._home_tables}.values())

    def volume_stats(self) -> list[dict[str, Any]]:
        """One dict per volume below this group."""
        return [v.stats() for v in self.volumes()]

    def stats(self) -> list[dict[str, Any]]:
        """Per table: its sizes and counters since creation (rows, not bytes, unless the name says so)."""
        result = []
        for i, t in enumerate(self.tables):
            record_bytes = self._home_tables[i].record_bytes
            result.append(
                {"table": t.name, "rows": t.rows, "pool_rows": self.pool_rows[i], "record_bytes": record_bytes, **self._pool.stats(i)}
            )
        return result

    def tier_stats(self) -> list[list[dict[str, Any]]]:
        """Per table one dict a tier, from the pool down: reads that it answered (hits) and passed on (misses), rows that it gave away
        (evictions; write_backs of them changed), and the bytes of rows read from it and written to it.

        A pool's hits and misses are distinct rows of a batch; it also asks for the ``refetched_rows`` of ``stats``. Its home's I/O, shared
        with other tables, is in ``volume_stats``.
        """
        return [self._tiers_of(i) for i in range(len(self.tables))]

    def _tiers_of(self, table: int) -> list[dict[str, Any]]:
        chain, below = self.tables[table].chain, self._below_pools[table]
        record_bytes, pool = below.record_bytes, self._pool.stats(table)
        hits, misses, flushed = pool["unique_rows"] - pool["misses"], pool["misses"], pool["flushed_rows"]
        came = misses + pool["refetched_rows"]
        counters = {"hits": hits, "misses": misses, "evictions": pool["evictions"], "write_backs": pool["write_backs"]}
        moved = {"read_bytes": hits * record_bytes, "written_bytes": came * record_bytes}
        tiers = [{"tier": "pool", "rows": self.pool_rows[table], "resident_rows": pool["resident_rows"], **counters, **moved}]
        for tier in self._cache_tiers_of(table):
            flushed, came = flushed + tier.pop("flushed_rows"), tier["misses"]
            tiers.append(tier)
        home = {"tier": type(chain.home).__name__, "rows": self.tables[table].rows, "hits": came}
        moved = {"read_bytes": came * record_bytes, "written_bytes": (tiers[-1]["write_backs"] + flushed) * record_bytes}
        return [*tiers, {**home, **moved}]

    def _cache_tiers_of(self, table: int) -> list[dict[str, Any]]:
        """The tiers between the pool and the home, the fastest first; with the rows that a flush has put past them."""
        cached = self._cached.get(id(self._home_tables[table].volume))
        stats = cached.cache_stats(self._below_pools[table]) if cached else []
        return [{"tier": type(c).__name__, **s} for c, s in zip(self._native_caches(self.tables[table]), stats, strict=bool(cached))]
