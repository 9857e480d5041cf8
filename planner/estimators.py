"""Storage estimates that know the optimizer of the sharder's fused params."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import ShardingOption, Storage

from .alike_shards import copied
from .records import optimizer_name, state_bytes_per_row

_KERNELS = (EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value)


class TieredStorageEstimator(EmbeddingStorageEstimator):
    """TorchRec's estimator charges the state of optimizers given by ``apply_optimizer_in_backward`` alone. This one notes in
    ``uncharged_bytes`` of each option, per shard, what those of ``fused_params={"optimizer": ...}`` take, on a CPU. A data-parallel
    table is updated by the dense model's optimizer: it is taken to be the same.

    TorchRec's own search goes by its own estimates, so that its plans stay what they are; whether a plan fits is judged with
    the state (``partitioners.py``).
    """

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: Mapping[str, Any]) -> None:
        """Fills in the storage of every shard."""
        super().estimate(sharding_options, sharder_data_map)
        for option in sharding_options:
            option.uncharged_bytes = [0] * option.num_shards
            if option.compute_kernel not in _KERNELS or hasattr(option.tensor, "_optimizer_classes"):
                continue
            optimizer = optimizer_name(option.tensor, sharder_data_map[option.module_type_key].fused_params)
            option.uncharged_bytes = [
                rows * (state_bytes_per_row(optimizer, columns) or 0) for rows, columns in (shard.size for shard in option.shards)
            ]


def uncharged_bytes(option: ShardingOption) -> list[int]:
    """DDR of each shard that its storage leaves out."""
    return getattr(option, "uncharged_bytes", None) or [0] * option.num_shards


def beside_tiers(option: ShardingOption) -> ShardingOption:
    """A copy as it is in a plan with tiers: ids of batches that wait for the others wait for this table too (``waiting_ids.py``)."""
    result = charged(option)
    for shard, waiting_bytes in zip(result.shards, getattr(option, "waiting_bytes", None) or [0] * option.num_shards, strict=True):
        tier = "hbm" if shard.storage.hbm else "ddr"
        setattr(shard.storage, tier, getattr(shard.storage, tier) + waiting_bytes)
    return result


def charged(option: ShardingOption) -> ShardingOption:
    """A copy whose storage leaves nothing out."""
    result: ShardingOption = copied(option)
    for shard, missing_bytes in zip(result.shards, uncharged_bytes(option), strict=True):
        shard.storage = shard.storage + Storage(0, missing_bytes, 0)
    result.uncharged_bytes = [0] * option.num_shards
    return result
