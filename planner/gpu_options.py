"""Ways to keep a table that HBM does not hold: our pools above host memory or above a DDR cache and an SSD, and TorchRec's UVM caching.

Each is a sharding option with a size that the search chooses: ``pool_rows``, rows in HBM, of every shard. What they cost is in
``gpu_charges.py``, what they do to a step in ``gpu_perf_model.py``. Above an SSD ``cache_rows`` are those of the DDR cache, through which
every record comes and goes, so it never has fewer rows than the pool.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import Perf, ShardingOption
from torchrec.distributed.types import CacheParams

from ..errors import ConfigurationError
from ..parameter_sharding import TIERED_KERNEL
from ..tiers import DdrCache, DdrHome, SsdHome, TierChain
from . import charges, gpu_charges
from .gpu_perf_model import GpuPerfModel
from .perf_model import Floats, ShardUse
from .sharding_options import TieredShardingOption
from .storage import TieredStorage

UVM_CACHING = EmbeddingComputeKernel.FUSED_UVM_CACHING.value
_LEAST_CACHED_SHARE = 0.01  # of a table, in UVM caching


class HbmOption(TieredShardingOption):
    """What the three have in common. ``state_bytes``: optimizer state of a row, of which ``rowwise_bytes`` are the row's own and not its
    elements'."""

    pool_tier: ClassVar[str] = "hbm"
    cache_tier: ClassVar[str] = "ddr"
    kernel: ClassVar[str] = TIERED_KERNEL
    model: GpuPerfModel
    state_bytes: int
    rowwise_bytes: int
    cache_params: CacheParams | None

    @classmethod
    def above(
        cls,
        fused: ShardingOption,
        *,
        state_bytes: int,
        rowwise_bytes: int,
        min_pool_rows: int,
        uses: list[ShardUse],
        model: GpuPerfModel,
        snapshots: bool,
    ) -> Any:
        """The option ``fused``, whose storage without optimizer state and perf are estimated, with the smallest legal pools."""
        option = cls.__new__(cls)
        option.__dict__.update(copy.deepcopy(fused).__dict__)
        option.compute_kernel = cls.kernel
        option.uncharged_bytes = [0] * option.num_shards
        element_bytes = fused.tensor.element_size()
        option.record_bytes = fused.tensor.shape[1] * element_bytes + state_bytes
        option.state_bytes, option.rowwise_bytes, option.uses, option.model = state_bytes, rowwise_bytes, uses, model
        option.snapshots = snapshots
        option.batch_bytes = [shard.storage.hbm - shard.size[0] * shard.size[1] * element_bytes for shard in fused.shards]
        option.compute = [shard.perf for shard in fused.shards]
        option.min_pool_rows = max(1, min(min_pool_rows, option.shard_rows))
        option._resize(*option.legal(option.min_pool_rows, 0))
        return option

    @property
    def weight_bytes(self) -> int:
        """Of a row."""
        return self.record_bytes - self.state_bytes

    @property
    def slot_bytes(self) -> int:
        return gpu_charges.slot_bytes(self.record_bytes)

    def more_slots(self, pool_rows: int, memory_bytes: float) -> int:
        return int(memory_bytes // self.slot_bytes)

    def may_be_cached(self, pmem: bool) -> bool:
        return False

    def legal(self, pool_rows: int, cache_rows: int) -> tuple[int, int]:
        return pool_rows, 0

    def worth(self, cache_rows: int) -> bool:
        return True

    def resized(self, pool_rows: int, cache_rows: int = 0) -> TieredShardingOption:
        option = copy.deepcopy(self)
        option._resize(*option.legal(max(self.min_pool_rows, min(pool_rows, self.shard_rows)), cache_rows))
        return option

    def pmem_bytes_of(self, shard: int, cache_rows: Any) -> Any:
        return 0

    def ssd_bytes(self, shard: int) -> int:
        """SSD of one shard."""
        return 0

    def _resize(self, pool_rows: int, cache_rows: int) -> None:
        self.pool_rows, self.cache_rows = pool_rows, cache_rows
        for i, shard in enumerate(self.shards):
            hbm, ddr = self.hbm_bytes(i, pool_rows, cache_rows), self.ddr_bytes(i, pool_rows, cache_rows)
            shard.storage = TieredStorage(hbm=hbm, ddr=ddr, ssd=self.ssd_bytes(i))
            more = self.busy_of(self.uses[i], pool_rows, cache_rows)[0] - self.model.in_memory(self.uses[i])
            of = self.compute[i]
            shard.perf = Perf(of.fwd_compute, of.fwd_comms, of.bwd_compute, of.bwd_comms, prefetch_compute=float(more.max()))


class OverDdr(HbmOption):
    """A pool above host memory that has every row."""

    place: ClassVar[str] = "in DDR"

    def hbm_bytes(self, shard: int, pool_rows: Any, cache_rows: Any = 0) -> Any:
        rows, batch = self.shards[shard].size[0], self.uses[shard].lookups
        return self.batch_bytes[shard] + gpu_charges.pool_bytes(rows, self.record_bytes, pool_rows, rows, batch)

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
        rows, batch = self.shards[shard].size[0], self.uses[shard].lookups
        return self.batch_bytes[shard] + gpu_charges.pool_bytes(rows, self.record_bytes, pool_rows, cache_rows, batch)

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
