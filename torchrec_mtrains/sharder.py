"""Sharders: what ``DistributedModelParallel`` and the planner are given so that tables may live in tiers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ModuleSharder, ParameterSharding, QuantizedCommCodecs, ShardingEnv, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from .parameter_sharding import TIERED_KERNEL, TIERED_SHARDING_TYPES
from .sharded_modules import ShardedTieredEmbeddingBagCollection


class TieredEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder for ``EmbeddingBagCollection``; tables with a ``TieredParameterSharding`` live in its tiers.

    Takes the stock sharder's arguments. ``fused_params`` names the optimizer of stock and tiered tables alike.
    """

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedTieredEmbeddingBagCollection:
        """As the stock sharder's."""
        return ShardedTieredEmbeddingBagCollection(
            module=module,
            table_name_to_parameter_sharding=params,
            env=env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
            sharded_module_order_overwrite=self._sharded_module_order_overwrite,
        )

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """The stock sharder's and, on a CPU, ROW_WISE: gloo runs it."""
        types = super().sharding_types(compute_device_type)
        return types if ShardingType.ROW_WISE.value in types else [*types, ShardingType.ROW_WISE.value]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """The stock sharder's and ours, for the sharding types that tiered tables have."""
        kernels = super().compute_kernels(sharding_type, compute_device_type)
        return [*kernels, TIERED_KERNEL] if sharding_type in TIERED_SHARDING_TYPES else kernels

    def storage_usage(self, tensor: torch.Tensor, compute_device_type: str, compute_kernel: str) -> dict[str, int]:
        """TorchRec's estimate; a tiered table is charged by the planner, from its chain, and by size not at all."""
        if compute_kernel == EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value:
            return {}
        return super().storage_usage(tensor, compute_device_type, compute_kernel)

    @property
    def sharded_module_type(self) -> type[ShardedTieredEmbeddingBagCollection]:
        """What ``shard`` makes."""
        return ShardedTieredEmbeddingBagCollection


def sharders(
    fused_params: dict[str, Any] | None = None, qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None
) -> list[ModuleSharder[nn.Module]]:
    """TorchRec's default sharders, ours in the place of the one for ``EmbeddingBagCollection``.

    ``fused_params`` and ``qcomm_codecs_registry`` are for that one, as in TorchRec.
    """
    ours = TieredEmbeddingBagCollectionSharder(fused_params, qcomm_codecs_registry)
    stock = [s for s in get_default_sharders() if s.module_type is not EmbeddingBagCollection]
    return [ours, *stock]
