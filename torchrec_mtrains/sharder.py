"""Sharders of TorchRec's two collections of tables: what makes them live in tiers."""

from __future__ import annotations

import torch
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from .sharded_modules import ShardedTieredEmbeddingBagCollection, ShardedTieredEmbeddingCollection


class TieredEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder for ``EmbeddingBagCollection``; tables with a ``TieredParameterSharding`` live in its tiers.

    Takes the stock sharder's arguments. ``fused_params`` names the optimizer of stock and tiered tables alike. To a planner it
    offers what the stock sharder offers: TorchRec's own cannot price a tiered table, and ours needs no offer.
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

    @property
    def sharded_module_type(self) -> type[ShardedTieredEmbeddingBagCollection]:
        """What ``shard`` makes."""
        return ShardedTieredEmbeddingBagCollection


class TieredEmbeddingCollectionSharder(EmbeddingCollectionSharder):
    """TorchRec's sharder for ``EmbeddingCollection``; tables with a ``TieredParameterSharding`` live in its tiers.

    As ``TieredEmbeddingBagCollectionSharder``.
    """

    def shard(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedTieredEmbeddingCollection:
        """As the stock sharder's."""
        return ShardedTieredEmbeddingCollection(
            module,
            params,
            env,
            self.fused_params,
            device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            use_index_dedup=self._use_index_dedup,
            module_fqn=module_fqn,
        )

    @property
    def sharded_module_type(self) -> type[ShardedTieredEmbeddingCollection]:
        """What ``shard`` makes."""
        return ShardedTieredEmbeddingCollection
