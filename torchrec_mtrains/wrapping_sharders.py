"""Sharders of TorchRec's collections that wrap an ``EmbeddingBagCollection`` or an ``EmbeddingCollection``.

Feature-processed and managed-collision collections hand their tables to the sharder of the wrapped collection: TorchRec's
sharders work as they are, with ours inside. Collections that would hand a tiered table to something else refuse it by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchrec.distributed.fp_embeddingbag import FeatureProcessedEmbeddingBagCollectionSharder
from torchrec.distributed.fused_embeddingbag import FusedEmbeddingBagCollectionSharder
from torchrec.distributed.itep_embeddingbag import ITEPEmbeddingBagCollectionSharder, ITEPEmbeddingCollectionSharder
from torchrec.distributed.mc_embedding import ManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.mc_modules import ManagedCollisionCollectionSharder
from torchrec.distributed.types import ParameterSharding, QuantizedCommCodecs, ShardingEnv

from .errors import UnsupportedError
from .parameter_sharding import TieredParameterSharding
from .sharder import TieredEmbeddingBagCollectionSharder, TieredEmbeddingCollectionSharder

Codecs = dict[str, QuantizedCommCodecs]


class TieredFeatureProcessedEmbeddingBagCollectionSharder(FeatureProcessedEmbeddingBagCollectionSharder):
    """TorchRec's, with ``TieredEmbeddingBagCollectionSharder`` inside unless another one is given."""

    def __init__(self, ebc_sharder: TieredEmbeddingBagCollectionSharder | None = None, qcomm_codecs_registry: Codecs | None = None) -> None:
        inner = ebc_sharder or TieredEmbeddingBagCollectionSharder(qcomm_codecs_registry=qcomm_codecs_registry)
        super().__init__(inner, qcomm_codecs_registry)


class TieredManagedCollisionEmbeddingBagCollectionSharder(ManagedCollisionEmbeddingBagCollectionSharder):
    """TorchRec's, with ``TieredEmbeddingBagCollectionSharder`` inside unless another one is given."""

    def __init__(
        self,
        ebc_sharder: TieredEmbeddingBagCollectionSharder | None = None,
        mc_sharder: ManagedCollisionCollectionSharder | None = None,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: Codecs | None = None,
    ) -> None:
        inner = ebc_sharder or TieredEmbeddingBagCollectionSharder(fused_params, qcomm_codecs_registry)
        super().__init__(inner, mc_sharder, qcomm_codecs_registry=qcomm_codecs_registry)


class TieredManagedCollisionEmbeddingCollectionSharder(ManagedCollisionEmbeddingCollectionSharder):
    """TorchRec's, with ``TieredEmbeddingCollectionSharder`` inside unless another one is given."""

    def __init__(
        self,
        ec_sharder: TieredEmbeddingCollectionSharder | None = None,
        mc_sharder: ManagedCollisionCollectionSharder | None = None,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: Codecs | None = None,
    ) -> None:
        inner = ec_sharder or TieredEmbeddingCollectionSharder(fused_params, qcomm_codecs_registry)
        super().__init__(inner, mc_sharder, qcomm_codecs_registry=qcomm_codecs_registry)


class _RefusesTieredTables:
    """Before a stock sharder in the bases: tables in memory are sharded as ever, and a tiered one is refused."""

    refused_because: str

    def shard(
        self,
        module: nn.Module,
        params: Mapping[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> Any:
        """As the stock sharder's. Raises: UnsupportedError when the plan has a tiered table."""
        tiered = sorted(name for name, sharding in params.items() if isinstance(sharding, TieredParameterSharding))
        if tiered:
            raise UnsupportedError(
                f"tables {tiered} of {type(module).__name__} cannot live in tiers: {self.refused_because}. Keep them in memory, or use an "
                "EmbeddingBagCollection or EmbeddingCollection"
            )
        return super().shard(module, params, env, device, module_fqn)  # type: ignore[misc]


_NO_PRUNING = "FBGEMM prunes tables in training (ITEP) on a GPU only, and tiered tables train on the CPU"


class RefusingITEPEmbeddingBagCollectionSharder(_RefusesTieredTables, ITEPEmbeddingBagCollectionSharder):
    """TorchRec's, for tables in memory."""

    refused_because = _NO_PRUNING


class RefusingITEPEmbeddingCollectionSharder(_RefusesTieredTables, ITEPEmbeddingCollectionSharder):
    """TorchRec's, for tables in memory."""

    refused_because = _NO_PRUNING


class RefusingFusedEmbeddingBagCollectionSharder(_RefusesTieredTables, FusedEmbeddingBagCollectionSharder):
    """TorchRec's, for tables in memory."""

    refused_because = "it makes its compute kernels itself"
