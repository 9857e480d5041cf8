"""``TieredShardingOption``: one way of keeping a table below the memory that it trains in, with pools of a given size.

What the ways have in common is here, without any cache. Two layouts extend it: pools in DDR above an SSD, with PMem caches between
(``ddr_options.py``), and pools in HBM (``gpu_options.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from torchrec.distributed.planner.types import Perf, ShardingOption

from ..parameter_sharding import TIERED_KERNEL
from ..tiers import SsdHome, TierChain
from .alike_shards import alike, copied, of_shards
from .perf_model import Floats, PerfModel, ShardUse
from .storage import TieredStorage


class TieredShardingOption(ShardingOption):
    """A sharding option whose every shard has a pool of ``pool_rows`` rows (or all of its rows) above something slower. ``cache_rows``: of
    a cache between the two, in layouts that have one.

    ``shard_rows``: of the largest shard. ``min_pool_rows``: slots that each pool has at least. ``record_bytes``: a row's weights and
    ``state_bytes``. ``batch_bytes``, ``compute`` and ``uses`` hold, per shard, what batches bring along in the pool's memory, TorchRec's
    perf of the table in memory, and what a step does to it. ``snapshots``: whether an SSD's volume writes any (``charges.py``).
    """

    kernel: ClassVar[str] = TIERED_KERNEL
    pool_tier: ClassVar[str]
    cache_tier: ClassVar[str]
    place: ClassVar[str]
    slot_number_bytes: ClassVar[int] = 0  # of a lookup of the batch that trains
    shard_rows: int
    min_pool_rows: int
    pool_rows: int
    cache_rows: int
    record_bytes: int
    state_bytes: int
    batch_bytes: list[int]
    compute: list[Perf]
    uncharged_bytes: list[int]
    uses: list[ShardUse]
    model: PerfModel
    snapshots: bool

    @classmethod
    def above(
        cls,
        fused: ShardingOption,
        *,
        state_bytes: int,
        min_pool_rows: int,
        uses: list[ShardUse],
        waiting_bytes: Sequence[int],
        model: PerfModel,
        snapshots: bool,
        **layout: Any,
    ) -> Any:
        """The option ``fused``, whose storage without optimizer state and perf are estimated, with the smallest legal pools.

        ``state_bytes``: optimizer state of a row. ``waiting_bytes``: ids that wait for each shard (``waiting_ids.py``). ``layout``:
        fields of the layout's own.
        """
        option = cls.__new__(cls)
        option.__dict__.update(copied(fused).__dict__)
        option.__dict__.update(layout)
        option.compute_kernel = cls.kernel
        option.uncharged_bytes = [0] * option.num_shards
        element_bytes = fused.tensor.element_size()
        option.record_bytes = fused.tensor.shape[1] * element_bytes + state_bytes
        option.state_bytes, option.uses, option.model, option.snapshots = state_bytes, uses, model, snapshots
        option.batch_bytes = [
            getattr(shard.storage, cls.pool_tier)
            - shard.size[0] * shard.size[1] * element_bytes
            + round(use.lookups) * cls.slot_number_bytes
            + waiting
            for shard, use, waiting in zip(fused.shards, uses, waiting_bytes, strict=True)
        ]
        option.compute = [shard.perf for shard in fused.shards]
        option.shard_rows = max(shard.size[0] for shard in option.shards)
        option.min_pool_rows = max(1, min(min_pool_rows, option.shard_rows))
        option._resize(*option.legal(option.min_pool_rows, 0))
        return option

    # -- what each layout says of itself

    @property
    def slot_bytes(self) -> int:
        """What one slot takes of the pool's memory."""
        raise NotImplementedError

    def ddr_bytes(self, shard: int, pool_rows: Any, cache_rows: Any = 0) -> Any:
        """DDR of one shard, had it a pool of ``pool_rows`` and a cache of ``cache_rows``. Shapes: any → the same, or one number."""
        raise NotImplementedError

    def busy_of(self, use: ShardUse, pool_rows: Any, cache_rows: Any = 0) -> Floats:
        """What a step keeps each resource busy for a shard so used, by sizes. Shapes: (n,), (n,) → (n, resources)."""
        raise NotImplementedError

    def chain(self, ssd: SsdHome | None, pmem_path: str | None) -> TierChain:
        """The tiers of a shard."""
        raise NotImplementedError

    def more_ms(self, shard: int) -> float:
        """What tiers add to the step of a rank that has nothing else to wait for: TorchRec's own sum of parts has no other place for it,
        and so a pool never looks better than memory."""
        raise NotImplementedError

    def hbm_bytes(self, shard: int, pool_rows: Any, cache_rows: Any = 0) -> Any:
        """HBM of one shard, had it such a pool and cache. Shapes: any → the same, or one number."""
        return 0

    def ssd_bytes(self, shard: int) -> int:
        """SSD of one shard."""
        return 0

    # -- caches: none

    @property
    def cached_index_bytes(self) -> int:
        """What one cached row takes of the pool's memory."""
        return 0

    def may_be_cached(self, pmem: bool) -> bool:
        """Whether the search chooses the size of a cache. ``pmem``: whether there is any."""
        return False

    def legal(self, pool_rows: int, cache_rows: int) -> tuple[int, int]:
        """Sizes near these that a shard may have."""
        return pool_rows, 0

    def most_pool_rows(self, cache_rows: int) -> int:
        """Of a pool above such a cache."""
        return self.shard_rows

    def worth(self, cache_rows: int) -> bool:
        """Whether a cache of that size is better than none."""
        return True

    def pmem_bytes_of(self, shard: int, cache_rows: Any) -> Any:
        """PMem of one shard, had it a cache of ``cache_rows``. Shapes: any → the same, or one number."""
        return 0

    # -- what all have in common

    def more_slots(self, memory_bytes: float) -> int:
        """Slots that pools can grow by in so much memory a shard."""
        return int(memory_bytes // self.slot_bytes)

    def resized(self, pool_rows: int, cache_rows: int = 0) -> TieredShardingOption:
        """The same with pools of another size, kept between ``min_pool_rows`` and all rows of a shard, and with such caches."""
        option: TieredShardingOption = copied(self)
        option._resize(*option.legal(max(self.min_pool_rows, min(pool_rows, self.shard_rows)), cache_rows))
        return option

    def busy_ms(self, shard: int) -> Floats:
        """What a step keeps each resource busy for a shard. Shape (resources,)."""
        return np.asarray(self.busy_of(self.uses[shard], self.pool_rows, self.cache_rows)[0])

    def hit_ratio(self) -> float:
        """Of the distinct rows of a batch, those in the pools when they are looked up; neighbours came along with reads of the SSD."""
        unique = sum(use.unique_rows for use in self.uses)
        behind, missed = self.pool_rows + self.cache_rows, 0.0
        for kind in alike(self):
            use = self.uses[kind[0]]
            missed += len(kind) * float(use.misses(self.pool_rows) - use.misses(behind) + use.reads(self.pool_rows, self.cache_rows))
        return max(0.0, 1 - missed / unique) if unique else 1.0

    def _resize(self, pool_rows: int, cache_rows: int) -> None:
        self.pool_rows, self.cache_rows = pool_rows, cache_rows
        for shard, (storage, perf) in zip(self.shards, of_shards(self, self._costs), strict=True):
            shard.storage, shard.perf = storage, perf

    def _costs(self, shard: int) -> tuple[TieredStorage, Perf]:
        sizes = self.pool_rows, self.cache_rows
        storage = TieredStorage(
            hbm=self.hbm_bytes(shard, *sizes),
            ddr=self.ddr_bytes(shard, *sizes),
            ssd=self.ssd_bytes(shard),
            pmem=self.pmem_bytes_of(shard, self.cache_rows),
        )
        return storage, replace(self.compute[shard], prefetch_compute=self.more_ms(shard))
