"""Ways to keep a table that HBM does not hold: our pools above host memory or above a DDR cache and an SSD, and TorchRec's UVM caching.

Each is a sharding option with a size that the search chooses: ``pool_rows``, rows in HBM, of every shard. What they cost is in
``gpu_charges.py``, what they do to a step in ``gpu_perf_model.py``. Above an SSD ``cache_rows`` are those of the DDR cache, through which
every record comes and goes, so it never has fewer rows than the pool.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import CacheParams

from ..errors import ConfigurationError
from ..tiers import DdrCache, DdrHome, SsdHome, TierChain
from . import charges, gpu_charges
from .gpu_perf_model import GpuPerfModel
from .perf_model import Floats, ShardUse
from .sharding_options import TieredShardingOption

UVM_CACHING = EmbeddingComputeKernel.FUSED_UVM_CACHING.value
_LEAST_CACHED_SHARE = 0.01  # of a table, in UVM caching


class HbmOption(TieredShardingOption):
    """What the three have in common. ``rowwise_bytes``: of a row's optimizer state, what is its own and not its elements'.
    ``graph_bytes``: of each shard's lookup, where it is ours."""

    pool_tier: ClassVar[str] = "hbm"
    cache_tier: ClassVar[str] = "ddr"
    model: GpuPerfModel
    rowwise_bytes: int
    graph_bytes: list[int]
    cache_params: CacheParams | None

    @property
    def weight_bytes(self) -> int:
        """Of a row."""
        return self.record_bytes - self.state_bytes

    @property
    def slot_bytes(self) -> int:
        return gpu_charges.slot_bytes(self.record_bytes)

    def _with_pool(self, shard: int, pool_rows: Any, host_places: Any) -> Any:
        """HBM of a shard of ours. Shapes: any → the same."""
        rows, batch = self.shards[shard].size[0], self.uses[shard].lookups
        pool = gpu_charges.pool_bytes(rows, self.record_bytes, pool_rows, host_places, batch)
        return self.batch_bytes[shard] + self.graph_bytes[shard] + pool

    def more_ms(self, shard: int) -> float:
        return float((self.busy_ms(shard) - self.model.in_memory(self.uses[shard])).max())


class OverDdr(HbmOption):
    """A pool above host memory that has every row."""

    place: ClassVar[str] = "in DDR"

    def hbm_bytes(self, shard: int, pool_rows: Any, cache_rows: Any = 0) -> Any:
        return self._with_pool(shard, pool_rows, self.shards[shard].size[0])

    def ddr_bytes(self, shard: int, pool_rows: Any, cache_rows: Any = 0) -> Any:
        return gpu_charges.home_bytes(self.shards[shard].size[0], self.record_bytes, checkpoints=self.model.checkpoints.keep > 0)

    def busy_of(self, use: ShardUse, pool_rows: Any, cache_rows: Any = 0) -> Floats:
        return self.model.over_ddr(use, pool_rows)

    def chain(self, ssd: SsdHome | None, pmem_path: str | None) -> TierChain:
        return TierChain(self.pool_rows, (DdrHome(),))


class OverSsd(HbmOption):
    """A pool above a DDR cache above an SSD."""

    place: ClassVar[str] = "on the SSD"

    @property
    def cached_index_bytes(self) -> int:
        return gpu_charges.DIRECTORY_BYTES_PER_PLACE

    def may_be_cached(self, pmem: bool) -> bool:
        return True

    def legal(self, pool_rows: int, cache_rows: int) -> tuple[int, int]:
        return pool_rows, max(pool_rows, min(cache_rows, self.shard_rows - pool_rows))

    def most_pool_rows(self, cache_rows: int) -> int:
        return cache_rows

    def hbm_bytes(self, shard: int, pool_rows: Any, cache_rows: Any = 0) -> Any:
        return self._with_pool(shard, pool_rows, cache_rows)

    def ddr_bytes(self, shard: int, pool_rows: Any, cache_rows: Any = 0) -> Any:
        rows = self.shards[shard].size[0]
        index = charges.log_index_bytes(rows, self.record_bytes, snapshots=self.snapshots)
        return index + charges.cache_record_bytes(rows, self.record_bytes, cache_rows)

    def ssd_bytes(self, shard: int) -> int:
        rows, lookups = self.shards[shard].size[0], self.uses[shard].lookups
        return charges.log_bytes(rows, self.record_bytes, lookups, self.model.checkpoints, snapshots=self.snapshots)

    def busy_of(self, use: ShardUse, pool_rows: Any, cache_rows: Any = 0) -> Floats:
        return self.model.tiered(use, pool_rows, cache_rows)

    def chain(self, ssd: SsdHome | None, pmem_path: str | None) -> TierChain:
        assert ssd is not None
        return TierChain(self.pool_rows, (DdrCache(self.cache_rows), ssd))


class UvmCached(HbmOption):
    """TorchRec's ``fused_uvm_caching``: the table in host memory, ``pool_rows`` rows of each shard cached in HBM."""

    place: ClassVar[str] = "in UVM caching"
    kernel: ClassVar[str] = UVM_CACHING

    @property
    def slot_bytes(self) -> int:
        return gpu_charges.uvm_slot_bytes(self.weight_bytes)

    def legal(self, pool_rows: int, cache_rows: int) -> tuple[int, int]:
        whole_sets = pool_rows // gpu_charges.UVM_SET_ROWS * gpu_charges.UVM_SET_ROWS
        return min(whole_sets or pool_rows, self.most_pool_rows(0)), 0

    def most_pool_rows(self, cache_rows: int) -> int:
        return self.shard_rows - 1  # TorchRec refuses a load factor of 1

    def hbm_bytes(self, shard: int, pool_rows: Any, cache_rows: Any = 0) -> Any:
        rows = self.shards[shard].size[0]
        return self.batch_bytes[shard] + gpu_charges.uvm_hbm_bytes(rows, self.weight_bytes, self.rowwise_bytes, pool_rows)

    def ddr_bytes(self, shard: int, pool_rows: Any, cache_rows: Any = 0) -> Any:
        return int(self.shards[shard].size[0]) * (self.record_bytes - self.rowwise_bytes)

    def busy_of(self, use: ShardUse, pool_rows: Any, cache_rows: Any = 0) -> Floats:
        return self.model.uvm_cached(use, pool_rows, self.state_bytes - self.rowwise_bytes)

    def chain(self, ssd: SsdHome | None, pmem_path: str | None) -> TierChain:
        raise ConfigurationError(f"table {self.name!r} is in UVM caching, which has no tier chain")

    def _resize(self, pool_rows: int, cache_rows: int) -> None:
        super()._resize(pool_rows, cache_rows)
        self.cache_params = copy.copy(self.cache_params or CacheParams())
        self.cache_params.load_factor = pool_rows / self.shard_rows


def least_cached_rows(rows: int) -> int:
    """Of a shard in UVM caching."""
    return max(1, round(_LEAST_CACHED_SHARE * rows))
