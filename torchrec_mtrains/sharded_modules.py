"""``ShardedTieredEmbeddingBagCollection``: TorchRec's sharded collection, some of whose tables live in tiers.

TorchRec leaves the state of customized kernels to whoever brings one. Here a tiered table is, in a state dict, a
``ShardedTensor`` of lazy shards, present on every rank, and as a parameter the lazy local shard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding_sharding import EmbeddingSharding, EmbeddingShardingInfo
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingEnv2D
from torchrec.modules.embedding_configs import EmbeddingBagConfig, data_type_to_dtype
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.optim.fused import EmptyFusedOptimizer

from .errors import ConfigurationError, UnsupportedError
from .kernels.compute_kernel import BatchedTieredEmbeddingBag
from .kernels.lazy_rows import LazyRows
from .kernels.sharded_state import sharded_tensor
from .parameter_sharding import TABLE_TIERS, TIERED_KERNEL, TieredParameterSharding
from .sharding import TIERED_SHARDINGS


class ShardedTieredEmbeddingBagCollection(ShardedEmbeddingBagCollection):
    """A sharded ``EmbeddingBagCollection`` with tiered tables beside stock ones, in any mix that a plan says.

    Raises: UnsupportedError for what tiered tables do not have (2D parallelism, DTensor state, and what the compute kernel
    refuses); ConfigurationError for a customized kernel without tiers.
    """

    @classmethod
    def create_grouped_sharding_infos(
        cls,
        module: EmbeddingBagCollectionInterface,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, list[EmbeddingShardingInfo]]:
        """TorchRec's, and each tiered table's ``init_fn``, which TorchRec does not hand to compute kernels."""
        for name, sharding in table_name_to_parameter_sharding.items():
            if sharding.compute_kernel == TIERED_KERNEL and not isinstance(sharding, TieredParameterSharding):
                raise ConfigurationError(
                    f"table {name!r} has compute_kernel={TIERED_KERNEL!r} but no tiers; use TieredParameterSharding(…, tiers=TierChain(…)) "
                    "in its plan"
                )
        infos = super().create_grouped_sharding_infos(module, table_name_to_parameter_sharding, *args, **kwargs)
        init_fns = {config.name: config.init_fn for config in module.embedding_bag_configs()}
        for info in (i for same_type in infos.values() for i in same_type if isinstance(i.param_sharding, TieredParameterSharding)):
            assert info.fused_params is not None
            tiers = info.fused_params[TABLE_TIERS]
            info.fused_params[TABLE_TIERS] = dataclasses.replace(tiers, init_fn=init_fns[info.embedding_config.name])
        return infos

    @classmethod
    def create_embedding_bag_sharding(
        cls,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        device: torch.device | None = None,
        permute_embeddings: bool = False,
        qcomm_codecs_registry: Any = None,
    ) -> EmbeddingSharding[Any, Any, Any, Any]:
        """TorchRec's; a sharding with tiered tables gets the one of ours."""
        if not any(isinstance(i.param_sharding, TieredParameterSharding) for i in sharding_infos):
            return super().create_embedding_bag_sharding(sharding_infos, env, device, permute_embeddings, qcomm_codecs_registry)
        if isinstance(env, ShardingEnv2D):
            raise UnsupportedError("tiered tables do not take part in 2D parallelism (DMPCollection) yet; use DistributedModelParallel")
        if env.output_dtensor:
            raise UnsupportedError("tiered tables have ShardedTensor state, not DTensor; use an environment with output_dtensor=False")
        sharding = TIERED_SHARDINGS[sharding_infos[0].param_sharding.sharding_type]
        return sharding(sharding_infos, env, device, qcomm_codecs_registry=qcomm_codecs_registry)

    def _kernels(self) -> Iterator[Any]:
        for lookup in self._lookups:
            inner = lookup.module if isinstance(lookup, DistributedDataParallel) else lookup
            yield from inner._emb_modules

    def tiered_kernels(self) -> Iterator[BatchedTieredEmbeddingBag]:
        """The compute kernels of tiered tables on this rank, in the order of lookups and groups."""
        return (kernel for kernel in self._kernels() if isinstance(kernel, BatchedTieredEmbeddingBag))

    def _tiered_tables(self) -> dict[str, TieredParameterSharding]:
        return {name: s for name, s in self.module_sharding_plan.items() if isinstance(s, TieredParameterSharding)}

    # -- state

    def _initialize_torch_state(self, skip_registering: bool = False) -> None:
        super()._initialize_torch_state(skip_registering)
        for name in self._tiered_tables():
            bag = self.embedding_bags[name]
            if not hasattr(bag, "weight"):  # this rank has no shard of the table
                empty = nn.Parameter(torch.empty(0), requires_grad=False)
                empty._in_backward_optimizers = [EmptyFusedOptimizer()]  # type: ignore[attr-defined]
                bag.register_parameter("weight", empty)
        self._tiered_sharded_tensors = self._build_tiered_sharded_tensors()
        if not skip_registering:
            self._register_state_dict_hook(_add_tiered_tables)

    def _build_tiered_sharded_tensors(self) -> dict[str, ShardedTensor]:
        result = {state.name: state.part(0) for kernel in self.tiered_kernels() for state in kernel.table_states}
        for config in self._embedding_bag_configs:
            sharding = self._tiered_tables().get(config.name)
            if sharding is not None and config.name not in result:
                assert sharding.sharding_spec is not None
                size = (config.num_embeddings, config.embedding_dim)
                dtype = data_type_to_dtype(config.data_type)
                result[config.name] = sharded_tensor(sharding.sharding_spec.shards, size, dtype, [], self._env.process_group)
        return result

    @contextmanager
    def _without_tiered_tables(self) -> Iterator[None]:
        everything: list[EmbeddingBagConfig] = self._embedding_bag_configs  # type: ignore[has-type]
        tiered = self._tiered_tables()
        self._embedding_bag_configs = [c for c in everything if c.name not in tiered]
        try:
            yield
        finally:
            self._embedding_bag_configs = everything

    def reset_parameters(self) -> None:
        """Initial values of stock tables. A tiered table's are deferred, or were written when it was made."""
        with self._without_tiered_tables():
            super().reset_parameters()

    @staticmethod
    def _pre_state_dict_hook(self: ShardedTieredEmbeddingBagCollection, prefix: str = "", keep_vars: bool = False) -> None:
        # Stock tables flush their caches. Tiered rows are read wherever they are, when they are read.
        for kernel in self._kernels():
            if not isinstance(kernel, BatchedTieredEmbeddingBag):
                kernel.flush()

    @staticmethod
    def _pre_load_state_dict_hook(self: ShardedTieredEmbeddingBagCollection, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._tiered_tables():
            key = f"{prefix}embedding_bags.{name}.weight"
            if key in state_dict:
                parameter = self.embedding_bags[name].weight
                if isinstance(parameter, LazyRows):
                    _load(name, self._tiered_sharded_tensors[name], state_dict[key])
                state_dict[key] = parameter  # loaded: nn.Module copies it onto itself, which does nothing
        ShardedEmbeddingBagCollection._pre_load_state_dict_hook(self, state_dict, prefix, *args)

    def update_shards(self, changed_sharding_params: Any, env: ShardingEnv, device: torch.device | None) -> None:
        """Refused: tiered rows do not move between ranks while a job runs."""
        raise UnsupportedError("resharding in place is not supported with tiered tables; save a checkpoint and load it under the new plan")


def _add_tiered_tables(
    module: ShardedTieredEmbeddingBagCollection, destination: dict[str, Any], prefix: str, _local_metadata: Mapping[str, Any]
) -> None:
    for name, tensor in module._tiered_sharded_tensors.items():
        destination[f"{prefix}embedding_bags.{name}.weight"] = tensor


def _load(table: str, to: ShardedTensor, source: Any) -> None:
    """Writes the rows of this rank. ``source`` is a ``ShardedTensor`` whose local shards cover them, or the whole table."""
    if isinstance(source, ShardedTensor):
        given = [(s.metadata.shard_offsets[0], s.tensor) for s in source.local_shards()]
    elif isinstance(source, Tensor):
        given = [(0, source)]
    else:
        raise UnsupportedError(f"table {table!r}: state of type {type(source).__name__} cannot be loaded; give a ShardedTensor or a Tensor")
    if tuple(source.size()) != tuple(to.size()):
        raise ConfigurationError(f"table {table!r} has size {tuple(to.size())}, the state dict has {tuple(source.size())}")
    for shard in to.local_shards():
        first, count = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
        done = 0
        for offset, rows in given:
            start, end = max(first, offset), min(first + count, offset + rows.shape[0])
            if start < end:
                shard.tensor.narrow(0, start - first, end - start).copy_(rows.narrow(0, start - offset, end - start))
                done += end - start
        if done != count:
            raise ConfigurationError(
                f"table {table!r}: rows {first} to {first + count} of this rank are not all in the local shards of the state dict; load a "
                "checkpoint of another sharding with torch.distributed.checkpoint"
            )
