"""``register``: makes our sharders TorchRec's default ones, so that programs need not pass ``sharders=``.

TorchRec has no registry of sharders, but ``DistributedModelParallel``, ``shard`` and the planner all ask
``torchrec.distributed.sharding_plan.get_default_sharders``, which makes an ``EmbeddingBagCollectionSharder`` and an
``EmbeddingCollectionSharder`` by the names that module has for them. Those names are bound to our subclasses.
"""

from __future__ import annotations

import torchrec.distributed.sharding_plan as sharding_plan
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

from .sharder import TieredEmbeddingBagCollectionSharder, TieredEmbeddingCollectionSharder


def register() -> None:
    """Makes tiered tables available to every ``DistributedModelParallel`` and planner that is given no sharders. Idempotent."""
    sharding_plan.EmbeddingBagCollectionSharder = TieredEmbeddingBagCollectionSharder
    sharding_plan.EmbeddingCollectionSharder = TieredEmbeddingCollectionSharder


def unregister() -> None:
    """Undoes ``register``. Idempotent; sharded modules keep working."""
    sharding_plan.EmbeddingBagCollectionSharder = EmbeddingBagCollectionSharder
    sharding_plan.EmbeddingCollectionSharder = EmbeddingCollectionSharder
