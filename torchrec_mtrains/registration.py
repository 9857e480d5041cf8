"""``register``: makes our sharder TorchRec's default one, so that programs need not pass ``sharders=``.

TorchRec has no registry of sharders, but ``DistributedModelParallel``, ``shard`` and the planner all ask
``torchrec.distributed.sharding_plan.get_default_sharders``, which makes an ``EmbeddingBagCollectionSharder`` by the name that
module has for it. That name is bound to our subclass.
"""

from __future__ import annotations

import torchrec.distributed.sharding_plan as sharding_plan
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

from .sharder import TieredEmbeddingBagCollectionSharder


def register() -> None:
    """Makes tiered tables available to every ``DistributedModelParallel`` and planner that is given no sharders. Idempotent."""
    sharding_plan.EmbeddingBagCollectionSharder = TieredEmbeddingBagCollectionSharder


def unregister() -> None:
    """Undoes ``register``. Idempotent; sharded modules keep working."""
    sharding_plan.EmbeddingBagCollectionSharder = EmbeddingBagCollectionSharder
