"""Storage estimates that know the optimizer of the sharder's fused params."""

from __future__ import annotations

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import SharderDataMap, ShardingOption

from . import charges


class TieredStorageEstimator(EmbeddingStorageEstimator):
    """TorchRec's estimator charges the state of optimizers given by ``apply_optimizer_in_backward`` alone; this one charges those
    of ``fused_params={"optimizer": ...}`` too. On a CPU, where a table in memory is in DDR."""

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        """Fills in the storage of every shard."""
        super().estimate(sharding_options, sharder_data_map)
        for option in sharding_options:
            if option.compute_kernel != EmbeddingComputeKernel.FUSED.value or hasattr(option.tensor, "_optimizer_classes"):
                continue
            optimizer = charges.optimizer_name(option.tensor, sharder_data_map[option.module_type_key].fused_params)
            for shard in option.shards:
                rows, columns = shard.size
                shard.storage.ddr += rows * (charges.state_bytes_per_row(optimizer, columns) or 0)
