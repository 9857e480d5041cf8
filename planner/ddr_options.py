"""Pools in DDR above an SSD, with a PMem cache between where there is PMem: tables that a CPU's memory does not hold."""

from __future__ import annotations

from typing import Any, ClassVar

from ..tiers import PmemCache, SsdHome, TierChain
from . import charges
from .perf_model import CPU, PMEM, SSD, TIERS, Floats, ShardUse
from .sharding_options import TieredShardingOption


class DdrOption(TieredShardingOption):
    """``cache_rows``: of the PMem cache of each shard; 0: it has none. A cache is exclusive, and the pools' memory has its index."""

    pool_tier: ClassVar[str] = "ddr"
    cache_tier: ClassVar[str] = "pmem"
    place: ClassVar[str] = "on the SSD"
    slot_number_bytes: ClassVar[int] = charges.SLOT_NUMBER_BYTES

    @property
    def slot_bytes(self) -> int:
        return charges.slot_bytes(self.record_bytes)

    @property
    def cached_index_bytes(self) -> int:
        return charges.DIRECTORY_BYTES_PER_SLOT

    def may_be_cached(self, pmem: bool) -> bool:
        return pmem

    def legal(self, pool_rows: int, cache_rows: int) -> tuple[int, int]:
        return pool_rows, max(0, min(cache_rows, self.shard_rows - pool_rows))

    def most_pool_rows(self, cache_rows: int) -> int:
        return self.shard_rows - cache_rows

    def worth(self, cache_rows: int) -> bool:
        """A cache has to hold more rows than its index would hold as slots of the pool."""
        index_bytes = charges.cache_index_bytes(self.shard_rows, cache_rows)
        return not cache_rows or cache_rows * self.slot_bytes > index_bytes

    def busy_of(self, use: ShardUse, pool_rows: Any, cache_rows: Any = 0) -> Floats:
        return self.model.tiered(use, pool_rows, cache_rows)

    def chain(self, ssd: SsdHome | None, pmem_path: str | None) -> TierChain:
        assert ssd is not None
        if not self.cache_rows:
            return TierChain(self.pool_rows, (ssd,))
        assert pmem_path is not None
        return TierChain(self.pool_rows, (PmemCache(pmem_path, self.cache_rows), ssd))

    def ddr_bytes(self, shard: int, pool_rows: Any, cache_rows: Any = 0) -> Any:
        rows = self.shards[shard].size[0]
        ddr = self.batch_bytes[shard] + charges.log_index_bytes(rows, self.record_bytes, snapshots=self.snapshots)
        ddr += charges.pool_bytes(rows, self.record_bytes, pool_rows)
        return ddr + charges.cache_index_bytes(rows, cache_rows) * (cache_rows > 0)

    def pmem_bytes_of(self, shard: int, cache_rows: Any) -> Any:
        return charges.cache_record_bytes(self.shards[shard].size[0], self.record_bytes, cache_rows)

    def ssd_bytes(self, shard: int) -> int:
        rows, lookups = self.shards[shard].size[0], self.uses[shard].lookups
        return charges.log_bytes(rows, self.record_bytes, lookups, self.model.checkpoints, snapshots=self.snapshots)

    def more_ms(self, shard: int) -> float:
        more = self.busy_ms(shard) - self.model.in_memory(self.uses[shard])
        return float(more[CPU] + more[TIERS] + max(more[PMEM], more[SSD]))
