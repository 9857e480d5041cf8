"""``TieredShardingOption``: one way of keeping a table on the SSD, with pools and PMem caches of a given size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from torchrec.distributed.planner.types import Perf, ShardingOption

from ..parameter_sharding import TIERED_KERNEL
from ..tiers import PmemCache, SsdHome, TierChain
from . import charges
from .alike_shards import alike, copied, of_shards
from .perf_model import CPU, PMEM, SSD, TIERS, Floats, PerfModel, ShardUse
from .storage import TieredStorage


class TieredShardingOption(ShardingOption):
    """A sharding option whose every shard has a slot pool of ``pool_rows`` rows (or all of its rows) above the SSD, and a PMem cache of
    ``cache_rows`` between the two; 0: none.

    ``min_pool_rows``: slots that each pool has at least. ``batch_bytes``, ``compute`` and ``uses`` hold, per shard, what the batch that
    trains brings along in memory, TorchRec's perf of the table in memory, and what a step does to it. ``bags``: of ids, a batch.
    ``snapshots``: whether the SSD's volume writes any (``charges.py``).
    """

    pool_tier: ClassVar[str] = "ddr"
    cache_tier: ClassVar[str] = "pmem"
    place: ClassVar[str] = "on the SSD"
    min_pool_rows: int
    pool_rows: int
    cache_rows: int
    record_bytes: int
    batch_bytes: list[int]
    compute: list[Perf]
    uncharged_bytes: list[int]
    uses: list[ShardUse]
    model: PerfModel
    bags: float
    world_size: int
    snapshots: bool

    @classmethod
    def of(
        cls,
        fused: ShardingOption,
        *,
        optimizer_state_bytes: int,
        min_pool_rows: int,
        uses: list[ShardUse],
        model: PerfModel,
        bags: float,
        world_size: int,
        snapshots: bool,
    ) -> Any:
        """The option ``fused``, whose storage and perf are estimated, with the smallest legal pools above an SSD."""
        option = cls.__new__(cls)
        option.__dict__.update(copied(fused).__dict__)
        option.compute_kernel = TIERED_KERNEL
        option.uncharged_bytes = [0] * option.num_shards
        element_bytes = fused.tensor.element_size()
        option.record_bytes = fused.tensor.shape[1] * element_bytes + optimizer_state_bytes
        option.uses, option.model = uses, model
        option.bags, option.world_size, option.snapshots = bags, world_size, snapshots
        option.batch_bytes = [
            shard.storage.ddr - shard.size[0] * shard.size[1] * element_bytes + round(use.lookups) * charges.SLOT_NUMBER_BYTES
            for shard, use in zip(fused.shards, uses, strict=True)
        ]
        option.compute = [shard.perf for shard in fused.shards]
        option.min_pool_rows = max(1, min(min_pool_rows, option.shard_rows))
        option._resize(option.min_pool_rows, 0)
        return option

    @property
    def shard_rows(self) -> int:
        """Rows of the largest shard."""
        return max(shard.size[0] for shard in self.shards)

    @property
    def slot_bytes(self) -> int:
        """DDR of one slot."""
        return charges.slot_bytes(self.record_bytes)

    @property
    def cached_index_bytes(self) -> int:
        """What one cached row takes of the pools' memory."""
        return charges.DIRECTORY_BYTES_PER_SLOT

    def may_be_cached(self, pmem: bool) -> bool:
        """Whether there is anything for a cache below the pool."""
        return pmem

    def legal(self, pool_rows: int, cache_rows: int) -> tuple[int, int]:
        """Sizes near these that a shard may have. A cache is exclusive."""
        return pool_rows, min(cache_rows, self.shard_rows - pool_rows)

    def most_pool_rows(self, cache_rows: int) -> int:
        """Of a pool above such a cache."""
        return self.shard_rows - cache_rows

    def worth(self, cache_rows: int) -> bool:
        """A cache has to hold more rows than its index would hold as slots of the pool."""
        index_bytes = charges.cache_index_bytes(self.shard_rows, cache_rows)
        return not cache_rows or cache_rows * self.slot_bytes > index_bytes

    def busy_of(self, use: ShardUse, pool_rows: Any, cache_rows: Any = 0) -> Floats:
        """What a step keeps each resource busy for a shard so used, by sizes. Shapes: (n,), (n,) → (n, resources)."""
        return self.model.tiered(use, pool_rows, cache_rows)

    def chain(self, ssd: SsdHome | None, pmem_path: str | None) -> TierChain:
        """The tiers of a shard."""
        assert ssd is not None
        if not self.cache_rows:
            return TierChain(self.pool_rows, (ssd,))
        assert pmem_path is not None
        return TierChain(self.pool_rows, (PmemCache(pmem_path, self.cache_rows), ssd))

    def more_slots(self, pool_rows: int, memory_bytes: float) -> int:
        """Slots that pools of ``pool_rows`` can grow by in so much memory a shard, the ids of a longer window included."""
        longer = max(self._waiting_bytes_per_slot(kind[0], pool_rows) for kind in alike(self))
        return max(0, int((memory_bytes - 1) / (self.slot_bytes + longer)))  # bytes of ids are rounded up

    def resized(self, pool_rows: int, cache_rows: int = 0) -> TieredShardingOption:
        """The same with pools of another size, kept between ``min_pool_rows`` and all rows of a shard, and with such caches."""
        option: TieredShardingOption = copied(self)
        option._resize(max(self.min_pool_rows, min(pool_rows, self.shard_rows)), cache_rows)
        return option

    def pmem_bytes_of(self, shard: int, cache_rows: Any) -> Any:
        """PMem of one shard, had it a cache of ``cache_rows``. Shapes: any → the same."""
        return charges.cache_record_bytes(self.shards[shard].size[0], self.record_bytes, cache_rows)

    def hbm_bytes(self, shard: int, pool_rows: Any, cache_rows: Any = 0) -> Any:
        """HBM of one shard, had it such a pool and cache. Shapes: any → the same, or one number for all."""
        return 0

    def ddr_bytes(self, shard: int, pool_rows: Any, cache_rows: Any = 0) -> Any:
        """DDR of one shard, had it a pool of ``pool_rows`` and a cache of ``cache_rows``. Shapes: any → the same, or one number for all."""
        rows = self.shards[shard].size[0]
        ddr = self.batch_bytes[shard] + charges.log_index_bytes(rows, self.record_bytes, snapshots=self.snapshots)
        ddr += charges.pool_bytes(rows, self.record_bytes, pool_rows) + self._waiting_bytes(shard, pool_rows)
        return ddr + charges.cache_index_bytes(rows, cache_rows) * (cache_rows > 0)

    def busy_ms(self, shard: int) -> Floats:
        """What a step keeps each resource busy for a shard. Shape (resources,)."""
        return np.asarray(self.busy_of(self.uses[shard], self.pool_rows, self.cache_rows)[0])

    def hit_ratio(self) -> float:
        """Of the distinct rows of a batch, those in the pools when they are looked up; neighbours came along with reads of the SSD."""
        unique = sum(use.unique_rows for use in self.uses)
        behind, missed = self.pool_rows + self.cache_rows, 0.0
        for kind in alike(self):
            use = self.uses[kind[0]]
            missed += len(kind) * float(use.misses(self.pool_rows) - use.misses(behind) + use.reads(behind))
        return max(0.0, 1 - missed / unique) if unique else 1.0

    def _resize(self, pool_rows: int, cache_rows: int) -> None:
        self.pool_rows, self.cache_rows = pool_rows, cache_rows
        for shard, (storage, perf) in zip(self.shards, of_shards(self, self._costs), strict=True):
            shard.storage, shard.perf = storage, perf

    def _costs(self, shard: int) -> tuple[TieredStorage, Perf]:
        rows, lookups = self.shards[shard].size[0], self.uses[shard].lookups
        ssd = charges.log_bytes(rows, self.record_bytes, lookups, self.model.checkpoints, snapshots=self.snapshots)
        ddr, pmem = self.ddr_bytes(shard, self.pool_rows, self.cache_rows), self.pmem_bytes_of(shard, self.cache_rows)
        return TieredStorage(ddr=ddr, ssd=ssd, pmem=pmem), replace(self.compute[shard], prefetch_compute=self._more_ms(shard))

    def _waiting_bytes(self, shard: int, pool_rows: Any) -> Any:
        if not self.model.prefetched:
            return 0
        unique = self._most_unique_rows
        return charges.waiting_bytes(self.uses[shard].lookups, self.bags, unique, pool_rows, self.world_size)

    def _waiting_bytes_per_slot(self, shard: int, pool_rows: int) -> float:
        if not self.model.prefetched:
            return 0.0
        unique = self._most_unique_rows
        return charges.waiting_bytes_per_slot(self.uses[shard].lookups, self.bags, unique, pool_rows, self.world_size)

    @property
    def _most_unique_rows(self) -> float:
        """Of a shard: the shortest window of all ranks is that of all."""
        return max(use.unique_rows for use in {id(use): use for use in self.uses}.values())

    def _more_ms(self, shard: int) -> float:
        """What tiers add to the step of a rank that has nothing else to wait for: TorchRec's own sum of parts has no other place for it,
        and so a pool never looks better than memory."""
        more = self.busy_ms(shard) - self.model.in_memory(self.uses[shard])
        return float(more[CPU] + more[TIERS] + max(more[PMEM], more[SSD]))
