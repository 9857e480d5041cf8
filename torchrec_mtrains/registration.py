"""``register``: makes our sharders TorchRec's default ones, so that programs need not pass ``sharders=``.

TorchRec has no registry of sharders, but ``DistributedModelParallel``, ``shard`` and the planner all ask
``torchrec.distributed.sharding_plan.get_default_sharders``, which makes the sharder of each collection by the name that module has
for it. Those names are bound to our subclasses.
"""

from __future__ import annotations

import torchrec.distributed.sharding_plan as sharding_plan

from .sharder import TieredEmbeddingBagCollectionSharder, TieredEmbeddingCollectionSharder
from .wrapping_sharders import (
    RefusingFusedEmbeddingBagCollectionSharder,
    TieredFeatureProcessedEmbeddingBagCollectionSharder,
    TieredManagedCollisionEmbeddingBagCollectionSharder,
    TieredManagedCollisionEmbeddingCollectionSharder,
)

_OURS = {
    "EmbeddingBagCollectionSharder": TieredEmbeddingBagCollectionSharder,
    "EmbeddingCollectionSharder": TieredEmbeddingCollectionSharder,
    "FeatureProcessedEmbeddingBagCollectionSharder": TieredFeatureProcessedEmbeddingBagCollectionSharder,
    "FusedEmbeddingBagCollectionSharder": RefusingFusedEmbeddingBagCollectionSharder,
    "ManagedCollisionEmbeddingBagCollectionSharder": TieredManagedCollisionEmbeddingBagCollectionSharder,
    "ManagedCollisionEmbeddingCollectionSharder": TieredManagedCollisionEmbeddingCollectionSharder,
}

_STOCK = {name: getattr(sharding_plan, name) for name in _OURS}


def register() -> None:
    """Makes tiered tables available to every ``DistributedModelParallel`` and planner that is given no sharders. Idempotent."""
    vars(sharding_plan).update(_OURS)


def unregister() -> None:
    """Undoes ``register``. Idempotent; sharded modules keep working."""
    vars(sharding_plan).update(_STOCK)
