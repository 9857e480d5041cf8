"""``TieredShardingOption``: one way of keeping a table on the SSD, with pools and PMem caches of a given size."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torchrec.distributed.planner.types import Perf, Shard, ShardingOption, Storage

from ..parameter_sharding import TIERED_KERNEL
from . import charges
from .checkpoint_schedule import CheckpointSchedule


class TieredShardingOption(ShardingOption):
    """A sharding option whose every shard has a slot pool of ``pool_rows`` rows (or all of its rows) above the SSD, and a PMem cache of
    ``cache_rows`` between the two; 0: none.

    ``lookups`` and ``min_pool_rows`` are per shard: rows that the average and the largest batch look up in it.
    ``batch_bytes`` and ``compute`` hold, per shard, what a batch brings along in memory and the perf of the table in memory.
    """

    lookups: float
    min_pool_rows: int
    pool_rows: int
    cache_rows: int
    record_bytes: int
    batch_bytes: list[int]
    compute: list[Perf]
    uncharged_bytes: list[int]
    ssd_bytes_per_ms: float
    checkpoints: CheckpointSchedule

    @classmethod
    def of(
        cls,
        fused: ShardingOption,
        *,
        optimizer_state_bytes: int,
        lookups: float,
        min_pool_rows: int,
        ssd_bytes_per_ms: float,
        checkpoints: CheckpointSchedule,
    ) -> Any:
        """The option ``fused``, whose storage and perf are estimated, with the smallest legal pools above an SSD."""
        option = cls.__new__(cls)
        option.__dict__.update(copy.deepcopy(fused).__dict__)
        option.compute_kernel = TIERED_KERNEL
        option.uncharged_bytes = [0] * option.num_shards
        element_bytes = fused.tensor.element_size()
        option.record_bytes = fused.tensor.shape[1] * element_bytes + optimizer_state_bytes
        option.lookups, option.ssd_bytes_per_ms, option.checkpoints = lookups, ssd_bytes_per_ms, checkpoints
        option.cache_rows = 0
        option.batch_bytes = [
            shard.storage.ddr - shard.size[0] * shard.size[1] * element_bytes + round(lookups) * charges.SLOT_NUMBER_BYTES
            for shard in fused.shards
        ]
        option.compute = [shard.perf for shard in fused.shards]
        option.min_pool_rows = max(1, min(min_pool_rows, option.shard_rows))
        option._resize(option.min_pool_rows)
        return option

    @property
    def shard_rows(self) -> int:
        """Rows of the largest shard."""
        return max(shard.size[0] for shard in self.shards)

    @property
    def slot_bytes(self) -> int:
        """DDR of one slot."""
        return charges.slot_bytes(self.record_bytes)

    def resized(self, pool_rows: int) -> TieredShardingOption:
        """The same with pools of another size, kept between ``min_pool_rows`` and all rows of a shard."""
        option = copy.deepcopy(self)
        option._resize(max(self.min_pool_rows, min(pool_rows, self.shard_rows)))
        return option

    def cached(self, cache_rows: int) -> TieredShardingOption:
        """The same with PMem caches of another size, or none."""
        option = copy.deepcopy(self)
        option.cache_rows = cache_rows
        option._resize(option.pool_rows)
        return option

    @property
    def pmem_bytes(self) -> int:
        """PMem of the caches of all shards."""
        if not self.cache_rows:
            return 0
        return sum(charges.cache_record_bytes(shard.size[0], self.record_bytes, self.cache_rows) for shard in self.shards)

    def storage_with(self, pool_rows: int) -> Storage:
        """Storage of all shards, had they pools of ``pool_rows``."""
        ddr = sum(self.ddr_bytes(i, pool_rows) for i in range(self.num_shards))
        return Storage(hbm=0, ddr=ddr, ssd=self.total_storage.ssd)

    def ddr_bytes(self, shard: int, pool_rows: int) -> int:
        """DDR of one shard, had it a pool of ``pool_rows``."""
        rows = self.shards[shard].size[0]
        ddr = self.batch_bytes[shard] + rows * charges.INDEX_BYTES_PER_ROW + charges.pool_bytes(rows, self.record_bytes, pool_rows)
        return ddr + charges.cache_index_bytes(rows, self.cache_rows) if self.cache_rows else ddr

    def _resize(self, pool_rows: int) -> None:
        self.pool_rows = pool_rows
        for i, shard in enumerate(self.shards):
            ssd = charges.log_bytes(shard.size[0], self.record_bytes, self.lookups, self.checkpoints)
            shard.storage = Storage(hbm=0, ddr=self.ddr_bytes(i, pool_rows), ssd=ssd)
            shard.perf = replace(self.compute[i], prefetch_compute=self._swap_ms(shard, pool_rows))

    def _swap_ms(self, shard: Shard, pool_rows: int) -> float:
        """Milliseconds to bring in from the SSD the rows that a batch misses and to write back as many, were every row as likely as
        any other. A PMem cache is taken to cost nothing.

        Popularity is skewed, so this is more than it will be: a pool never looks better than memory.
        """
        missed = self.lookups * (1 - min(pool_rows + self.cache_rows, shard.size[0]) / shard.size[0])
        return 2 * missed * self.record_bytes / self.ssd_bytes_per_ms
