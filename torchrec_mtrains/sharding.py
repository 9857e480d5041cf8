"""TorchRec's pooled shardings with a lookup that knows tiered tables. Everything but the lookup is TorchRec's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.embedding_kernel import BaseEmbedding
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import (
    BaseEmbeddingLookup,
    BaseGroupedFeatureProcessor,
    EmbeddingComputeKernel,
    GroupedEmbeddingConfig,
)
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingSharding
from torchrec.distributed.types import ShardingType

from .kernels.compute_kernel import BatchedTieredEmbeddingBag


class TieredPooledEmbeddingsLookup(GroupedPooledEmbeddingsLookup):
    """TorchRec's pooled lookup; groups of tiered tables get ``BatchedTieredEmbeddingBag``."""

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        device: torch.device | None,
        pg: dist.ProcessGroup | None,
        sharding_type: ShardingType | None,
        *args: Any,
        **kwargs: Any,
    ) -> BaseEmbedding:
        if config.compute_kernel is EmbeddingComputeKernel.CUSTOMIZED_KERNEL:
            return BatchedTieredEmbeddingBag(config, pg, device, sharding_type)
        return super()._create_embedding_kernel(config, device, pg, sharding_type, *args, **kwargs)


class _TieredLookups:
    """Makes a sharding's lookup one of ours. ``lookup_sharding_type`` is what TorchRec tells its own: None but for row-wise."""

    lookup_sharding_type: ShardingType | None = None
    _grouped_embedding_configs: list[GroupedEmbeddingConfig]
    _pg: dist.ProcessGroup | None
    _device: torch.device
    _env: Any

    def create_lookup(
        self,
        device: torch.device | None = None,
        fused_params: dict[str, Any] | None = None,
        feature_processor: BaseGroupedFeatureProcessor | None = None,
    ) -> BaseEmbeddingLookup:
        """As the stock sharding's."""
        return TieredPooledEmbeddingsLookup(
            grouped_configs=self._grouped_embedding_configs,
            pg=self._pg,
            device=device if device is not None else self._device,
            feature_processor=feature_processor,
            sharding_type=self.lookup_sharding_type,
            env=self._env,
        )


class TieredTwPooledEmbeddingSharding(_TieredLookups, TwPooledEmbeddingSharding):
    """Table-wise."""


class TieredRwPooledEmbeddingSharding(_TieredLookups, RwPooledEmbeddingSharding):
    """Row-wise."""

    lookup_sharding_type = ShardingType.ROW_WISE


TIERED_SHARDINGS = {
    ShardingType.TABLE_WISE.value: TieredTwPooledEmbeddingSharding,
    ShardingType.ROW_WISE.value: TieredRwPooledEmbeddingSharding,
}
