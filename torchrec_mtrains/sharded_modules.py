"""TorchRec's sharded collections, some of whose tables live in tiers.

TorchRec leaves the state of customized kernels to whoever brings one. Here a tiered table is, in a state dict, a
``ShardedTensor`` or ``DTensor`` of lazy shards, present on every rank, and as a parameter the lazy local shard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_sharding import EmbeddingSharding, EmbeddingShardingInfo
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.sharding.cw_sharding import CwPooledEmbeddingSharding
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingEnv, ShardingEnv2D
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, data_type_to_dtype
from torchrec.optim.fused import EmptyFusedOptimizer

from .errors import ConfigurationError, UnsupportedError
from .kernels.compute_kernel import TieredKernel
from .kernels.lazy_rows import LazyRows
from .kernels.sharded_state import ShardedRows
from .load_rows import load_rows
from .parameter_sharding import TABLE_TIERS, TIERED_KERNEL, TieredParameterSharding
from .sharding import POOLED_SHARDINGS, SEQUENCE_SHARDINGS

def _refuse(sharding_infos: list[EmbeddingShardingInfo], env: ShardingEnv, shardings: Mapping[str, Any]) -> None:
    if isinstance(env, ShardingEnv2D):
        raise UnsupportedError("tiered tables do not take part in 2D parallelism (DMPCollection) yet; use DistributedModelParallel")
    for info in sharding_infos:
        if info.param_sharding.sharding_type not in shardings:
            raise UnsupportedError(
                f"table {info.embedding_config.name!r}: TorchRec has no sharding type {info.param_sharding.sharding_type!r} for this "
                f"collection; use one of {', '.join(shardings)}"
            )


class _TieredTables:
    """What sharded collections of bags and of sequences have in common; before TorchRec's class in their bases.

    Raises: UnsupportedError for what tiered tables do not have (2D parallelism, and what the compute kernel refuses);
    ConfigurationError for a customized kernel without tiers.
    """

    _modules_name: str  # of the ModuleDict of tables, as in state dicts
    _configs_name: str  # of the list of table configurations
    _stock: Any  # TorchRec's class
    _lookups: list[Any]
    _env: ShardingEnv
    module_sharding_plan: EmbeddingModuleShardingPlan

    @classmethod
    def create_grouped_sharding_infos(
        cls, module: Any, table_name_to_parameter_sharding: dict[str, ParameterSharding], *args: Any, **kwargs: Any
    ) -> dict[str, list[EmbeddingShardingInfo]]:
        """TorchRec's, and each tiered table's ``init_fn``, which TorchRec does not hand to compute kernels."""
        for name, sharding in table_name_to_parameter_sharding.items():
            if sharding.compute_kernel == TIERED_KERNEL and not isinstance(sharding, TieredParameterSharding):
                raise ConfigurationError(
                    f"table {name!r} has compute_kernel={TIERED_KERNEL!r} but no tiers; use TieredParameterSharding(…, tiers=TierChain(…)) "
                    "in its plan"
                )
        infos = super().create_grouped_sharding_infos(module, table_name_to_parameter_sharding, *args, **kwargs)  # type: ignore[misc]
        init_fns = {config.name: config.init_fn for config in getattr(module, cls._configs_name.removeprefix("_"))()}
        for info in (i for same_type in infos.values() for i in same_type if isinstance(i.param_sharding, TieredParameterSharding)):
            assert info.fused_params is not None
            tiers = info.fused_params[TABLE_TIERS]
            info.fused_params[TABLE_TIERS] = dataclasses.replace(tiers, init_fn=init_fns[info.embedding_config.name])
        return infos

    def _tables(self) -> nn.ModuleDict:
        return getattr(self, self._modules_name)

    def _kernels(self) -> Iterator[Any]:
        for lookup in self._lookups:
            inner = lookup.module if isinstance(lookup, DistributedDataParallel) else lookup
            yield from inner._emb_modules

    def tiered_kernels(self) -> Iterator[TieredKernel]:
        """The compute kernels of tiered tables on this rank, in the order of lookups and groups."""
        return (kernel for kernel in self._kernels() if isinstance(kernel, TieredKernel))

    def tiered_tables(self) -> dict[str, TieredParameterSharding]:
        """What the plan says of each, whether this rank has rows of it or not."""
        return {name: s for name, s in self.module_sharding_plan.items() if isinstance(s, TieredParameterSharding)}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused with tiered tables: deepcopy and pickle come here."""
        if tiered := sorted(self.tiered_tables()):
            raise UnsupportedError(
                f"{type(self).__name__}: deepcopy and pickle are not supported, the rows of tables {tiered} live in storage; make a second "
                "model, or save with torch.distributed.checkpoint"
            )
        return super().__reduce_ex__(protocol)

    # -- state

    def _initialize_torch_state(self, skip_registering: bool = False) -> None:
        options = {"skip_registering": True} if skip_registering else {}  # sequences have no such option in some releases
        super()._initialize_torch_state(**options)  # type: ignore[misc]
        for name in self.tiered_tables():
            table = self._tables()[name]
            if not hasattr(table, "weight"):  # this rank has no shard of the table
                empty = nn.Parameter(torch.empty(0), requires_grad=False)
                empty._in_backward_optimizers = [EmptyFusedOptimizer()]  # type: ignore[attr-defined]
                table.register_parameter("weight", empty)
        self._tiered_weights = self._build_tiered_weights()
        if not options.get("skip_registering"):
            self._register_state_dict_hook(_add_tiered_tables)  # type: ignore[attr-defined]

    def _build_tiered_weights(self) -> dict[str, ShardedTensor | DTensor]:
        result = {state.name: state.part(0) for kernel in self.tiered_kernels() for state in kernel.table_states}
        for config in getattr(self, self._configs_name):
            sharding = self.tiered_tables().get(config.name)
            if sharding is not None and config.name not in result:
                assert sharding.sharding_spec is not None
                size = (config.num_embeddings, config.embedding_dim)
                dtype = data_type_to_dtype(config.data_type)
                rows = ShardedRows(sharding.sharding_spec.shards, size, dtype, {})
                if self._env.output_dtensor:
                    assert self._env.device_mesh is not None
                    result[config.name] = rows.dtensor(self._env.device_mesh, None)
                else:
                    result[config.name] = rows.sharded_tensor(self._env.process_group)
        return result

    @contextmanager
    def _without_tiered_tables(self) -> Iterator[None]:
        everything: list[BaseEmbeddingConfig] = getattr(self, self._configs_name)
        tiered = self.tiered_tables()
        setattr(self, self._configs_name, [c for c in everything if c.name not in tiered])
        try:
            yield
        finally:
            setattr(self, self._configs_name, everything)

    def reset_parameters(self) -> None:
        """Initial values of stock tables. A tiered table's are deferred, or were written when it was made."""
        with self._without_tiered_tables():
            super().reset_parameters()  # type: ignore[misc]

    @staticmethod
    def _pre_state_dict_hook(self: _TieredTables, prefix: str = "", keep_vars: bool = False) -> None:
        # Stock tables flush their caches. Tiered rows are read wherever they are, when they are read.
        for kernel in self._kernels():
            if not isinstance(kernel, TieredKernel):
                kernel.flush()

    @staticmethod
    def _pre_load_state_dict_hook(self: _TieredTables, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.tiered_tables():
            key = f"{prefix}{self._modules_name}.{name}.weight"
            if key in state_dict:
                parameter = self._tables()[name].weight
                if isinstance(parameter, LazyRows):
                    load_rows(name, self._tiered_weights[name], state_dict[key])
                state_dict[key] = parameter  # loaded: nn.Module copies it onto itself, which does nothing
        self._stock._pre_load_state_dict_hook(self, state_dict, prefix, *args)

    def update_shards(self, changed_sharding_params: Any, env: ShardingEnv, device: torch.device | None) -> None:
        """Refused: tiered rows do not move between ranks while a job runs."""
        raise UnsupportedError("resharding in place is not supported with tiered tables; save a checkpoint and load it under the new plan")


class ShardedTieredEmbeddingBagCollection(_TieredTables, ShardedEmbeddingBagCollection):
    """A sharded ``EmbeddingBagCollection`` with tiered tables beside stock ones, in any mix that a plan says."""

    _modules_name, _configs_name, _stock = "embedding_bags", "_embedding_bag_configs", ShardedEmbeddingBagCollection

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
        _refuse(sharding_infos, env, POOLED_SHARDINGS)
        sharding = POOLED_SHARDINGS[sharding_infos[0].param_sharding.sharding_type]
        by_column = {"permute_embeddings": permute_embeddings} if issubclass(sharding, CwPooledEmbeddingSharding) else {}
        return sharding(sharding_infos, env, device, qcomm_codecs_registry=qcomm_codecs_registry, **by_column)


class ShardedTieredEmbeddingCollection(_TieredTables, ShardedEmbeddingCollection):
    """A sharded ``EmbeddingCollection`` with tiered tables beside stock ones, in any mix that a plan says."""

    _modules_name, _configs_name, _stock = "embeddings", "_embedding_configs", ShardedEmbeddingCollection

    @classmethod
    def create_embedding_sharding(
        cls,
        sharding_type: str,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        device: torch.device | None = None,
        qcomm_codecs_registry: Any = None,
    ) -> EmbeddingSharding[Any, Any, Any, Any]:
        """TorchRec's; a sharding with tiered tables gets the one of ours."""
        if not any(isinstance(i.param_sharding, TieredParameterSharding) for i in sharding_infos):
            return super().create_embedding_sharding(sharding_type, sharding_infos, env, device, qcomm_codecs_registry)
        _refuse(sharding_infos, env, SEQUENCE_SHARDINGS)
        return SEQUENCE_SHARDINGS[sharding_type](
            sharding_infos=sharding_infos, env=env, device=device, qcomm_codecs_registry=qcomm_codecs_registry
        )


TieredCollection = ShardedTieredEmbeddingBagCollection | ShardedTieredEmbeddingCollection


def _add_tiered_tables(module: _TieredTables, destination: dict[str, Any], prefix: str, _local_metadata: Mapping[str, Any]) -> None:
    for name, tensor in module._tiered_weights.items():
        destination[f"{prefix}{module._modules_name}.{name}.weight"] = tensor
