"""TorchRec's shardings with lookups that know tiered tables. Everything but the lookup is TorchRec's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torchrec.distributed.embedding_kernel import BaseEmbedding
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup, GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import (
    BaseEmbeddingLookup,
    BaseGroupedFeatureProcessor,
    EmbeddingComputeKernel,
    GroupedEmbeddingConfig,
)
from torchrec.distributed.sharding.cw_sequence_sharding import CwSequenceEmbeddingSharding
from torchrec.distributed.sharding.cw_sharding import CwPooledEmbeddingSharding
from torchrec.distributed.sharding.grid_sharding import GridPooledEmbeddingSharding
from torchrec.distributed.sharding.rw_sequence_sharding import RwSequenceEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.sharding.tw_sequence_sharding import TwSequenceEmbeddingSharding
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingSharding
from torchrec.distributed.sharding.twcw_sharding import TwCwPooledEmbeddingSharding
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingSharding
from torchrec.distributed.types import ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from .kernels.compute_kernel import BatchedTieredEmbedding, BatchedTieredEmbeddingBag, TieredKernel


class TieredLookup:
    """What the lookups of bags and of sequences have in common; before TorchRec's class in their bases."""

    _emb_modules: Any
    _feature_splits: list[int]

    def tiered_features(self, sparse_features: KeyedJaggedTensor) -> Iterator[tuple[TieredKernel, KeyedJaggedTensor]]:
        """The kernels of tiered tables, and what of a batch each of them will get."""
        for kernel, features in zip(self._emb_modules, sparse_features.split(self._feature_splits), strict=True):
            if isinstance(kernel, TieredKernel):
                yield kernel, features


class TieredPooledEmbeddingsLookup(TieredLookup, GroupedPooledEmbeddingsLookup):
    """TorchRec's pooled lookup; groups of tiered tables get ``BatchedTieredEmbeddingBag``."""

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        device: torch.device | None,
        pg: Any,
        sharding_type: ShardingType | None,
        *args: Any,
        **kwargs: Any,
    ) -> BaseEmbedding:
        if config.compute_kernel is EmbeddingComputeKernel.CUSTOMIZED_KERNEL:
            return BatchedTieredEmbeddingBag(config, pg, device, sharding_type)
        return super()._create_embedding_kernel(config, device, pg, sharding_type, *args, **kwargs)


class TieredEmbeddingsLookup(TieredLookup, GroupedEmbeddingsLookup):
    """TorchRec's lookup without pooling; groups of tiered tables get ``BatchedTieredEmbedding``."""

    def _create_embedding_kernel(
        self, config: GroupedEmbeddingConfig, pg: Any, device: torch.device | None, *args: Any, **kwargs: Any
    ) -> BaseEmbedding:
        if config.compute_kernel is EmbeddingComputeKernel.CUSTOMIZED_KERNEL:
            return BatchedTieredEmbedding(config, pg, device)
        return super()._create_embedding_kernel(config, pg, device, *args, **kwargs)

    def prefetch(self, sparse_features: KeyedJaggedTensor, forward_stream: Any = None) -> None:
        """As TorchRec's; where no stock table asks for it, it is for tiered ones alone."""
        if self._need_prefetch:
            super().prefetch(sparse_features, forward_stream)
            return
        for kernel, features in self.tiered_features(sparse_features):
            kernel.emb_module.prefetch(features.values(), features.offsets(), forward_stream)


class _Lookups:
    """What TorchRec's shardings know of themselves when they make a lookup."""

    _grouped_embedding_configs: list[GroupedEmbeddingConfig]
    _pg: Any
    _device: torch.device
    _env: Any


class _PooledLookups(_Lookups):
    """``lookup_sharding_type`` is what TorchRec tells its own lookups: MEAN over rows of several ranks becomes SUM and a division."""

    lookup_sharding_type: ShardingType | None = None

    def create_lookup(
        self,
        device: torch.device | None = None,
        fused_params: dict[str, Any] | None = None,
        feature_processor: BaseGroupedFeatureProcessor | None = None,
    ) -> BaseEmbeddingLookup:
        """As the stock sharding's."""
        return TieredPooledEmbeddingsLookup(
            grouped_configs=self._lookup_configs(),
            pg=self._pg,
            device=device if device is not None else self._device,
            feature_processor=feature_processor,
            sharding_type=self.lookup_sharding_type,
            env=self._env,
        )

    def _lookup_configs(self) -> list[GroupedEmbeddingConfig]:
        return self._grouped_embedding_configs


class _SequenceLookups(_Lookups):
    def create_lookup(
        self,
        device: torch.device | None = None,
        fused_params: dict[str, Any] | None = None,
        feature_processor: BaseGroupedFeatureProcessor | None = None,
    ) -> BaseEmbeddingLookup:
        """As the stock sharding's."""
        return TieredEmbeddingsLookup(
            grouped_configs=self._grouped_embedding_configs,
            pg=self._pg,
            device=device if device is not None else self._device,
            env=self._env,
        )


class _OfMyRank(_PooledLookups):
    """For shardings that keep the groups of every rank."""

    lookup_sharding_type = ShardingType.TABLE_ROW_WISE
    _grouped_embedding_configs_per_rank: list[list[GroupedEmbeddingConfig]]
    _rank: int

    def _lookup_configs(self) -> list[GroupedEmbeddingConfig]:
        return self._grouped_embedding_configs_per_rank[self._rank]


class TieredTwPooledEmbeddingSharding(_PooledLookups, TwPooledEmbeddingSharding):
    """Table-wise."""


class TieredRwPooledEmbeddingSharding(_PooledLookups, RwPooledEmbeddingSharding):
    """Row-wise."""

    lookup_sharding_type = ShardingType.ROW_WISE


class TieredCwPooledEmbeddingSharding(_PooledLookups, CwPooledEmbeddingSharding):
    """Column-wise."""


class TieredTwCwPooledEmbeddingSharding(_PooledLookups, TwCwPooledEmbeddingSharding):
    """Table-wise by node, column-wise within."""


class TieredTwRwPooledEmbeddingSharding(_OfMyRank, TwRwPooledEmbeddingSharding):
    """Table-wise by node, row-wise within."""


class TieredGridPooledEmbeddingSharding(_OfMyRank, GridPooledEmbeddingSharding):
    """Column-wise over nodes, row-wise within."""


class TieredTwSequenceEmbeddingSharding(_SequenceLookups, TwSequenceEmbeddingSharding):
    """Table-wise."""


class TieredRwSequenceEmbeddingSharding(_SequenceLookups, RwSequenceEmbeddingSharding):
    """Row-wise."""


class TieredCwSequenceEmbeddingSharding(_SequenceLookups, CwSequenceEmbeddingSharding):
    """Column-wise."""


POOLED_SHARDINGS = {
    ShardingType.TABLE_WISE.value: TieredTwPooledEmbeddingSharding,
    ShardingType.ROW_WISE.value: TieredRwPooledEmbeddingSharding,
    ShardingType.COLUMN_WISE.value: TieredCwPooledEmbeddingSharding,
    ShardingType.TABLE_COLUMN_WISE.value: TieredTwCwPooledEmbeddingSharding,
    ShardingType.TABLE_ROW_WISE.value: TieredTwRwPooledEmbeddingSharding,
    ShardingType.GRID_SHARD.value: TieredGridPooledEmbeddingSharding,
}

SEQUENCE_SHARDINGS = {
    ShardingType.TABLE_WISE.value: TieredTwSequenceEmbeddingSharding,
    ShardingType.ROW_WISE.value: TieredRwSequenceEmbeddingSharding,
    ShardingType.COLUMN_WISE.value: TieredCwSequenceEmbeddingSharding,
}
