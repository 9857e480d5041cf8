"""``sharders``: what ``DistributedModelParallel`` and the planner are given so that tables may live in tiers."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ModuleSharder, QuantizedCommCodecs

from .sharder import TieredEmbeddingBagCollectionSharder, TieredEmbeddingCollectionSharder
from .wrapping_sharders import (
    RefusingFusedEmbeddingBagCollectionSharder,
    RefusingITEPEmbeddingBagCollectionSharder,
    RefusingITEPEmbeddingCollectionSharder,
    TieredFeatureProcessedEmbeddingBagCollectionSharder,
    TieredManagedCollisionEmbeddingBagCollectionSharder,
    TieredManagedCollisionEmbeddingCollectionSharder,
)


def sharders(
    fused_params: dict[str, Any] | None = None, qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None
) -> list[ModuleSharder[nn.Module]]:
    """TorchRec's default sharders, ours in the place of those that train, and those of collections pruned in training (ITEP).

    ``fused_params`` and ``qcomm_codecs_registry`` are for every ``EmbeddingBagCollection`` and ``EmbeddingCollection``, also inside
    feature-processed and managed-collision ones.
    """
    bags = TieredEmbeddingBagCollectionSharder(fused_params, qcomm_codecs_registry)
    sequences = TieredEmbeddingCollectionSharder(fused_params, qcomm_codecs_registry)
    ours: list[ModuleSharder[Any]] = [
        bags,
        TieredFeatureProcessedEmbeddingBagCollectionSharder(bags, qcomm_codecs_registry),
        sequences,
        RefusingFusedEmbeddingBagCollectionSharder(),
        TieredManagedCollisionEmbeddingBagCollectionSharder(bags, qcomm_codecs_registry=qcomm_codecs_registry),
        TieredManagedCollisionEmbeddingCollectionSharder(sequences, qcomm_codecs_registry=qcomm_codecs_registry),
        RefusingITEPEmbeddingBagCollectionSharder(bags, qcomm_codecs_registry),
        RefusingITEPEmbeddingCollectionSharder(sequences, qcomm_codecs_registry),
    ]
    stock = [s for s in get_default_sharders() if s.module_type not in {o.module_type for o in ours}]
    return [*ours, *stock]
