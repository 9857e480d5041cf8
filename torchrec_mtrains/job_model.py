"""What the main job trains: TorchRec's own ``DLRM`` over one table per feature, sharded by ``DistributedModelParallel``.

Tables are declared on the meta device, so that one larger than memory is never materialised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingType
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from .data import TableShape
from .errors import ConfigurationError, UnsupportedError
from .kernels.initial_values import uniform_init_fn

EBC_PATH = "model.sparse_arch.embedding_bag_collection"
"""Where ``DLRMTrain`` keeps its tables, as a plan names it."""

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad")
_ADAGRAD_EPS = 1e-8


@dataclass(frozen=True)
class ModelOptions:
    """Shape and optimisation of the DLRM.

    ``dense_layers`` are the hidden widths of the dense arch (the embedding dimension follows by itself) and ``over_layers``
    those of the top (one logit follows). The dense parameters use SGD or Adagrad, after the tables' ``optimizer``.
    """

    embedding_dim: int = 32
    dense_layers: tuple[int, ...] = (64,)
    over_layers: tuple[int, ...] = (64,)
    optimizer: str = "rowwise_adagrad"
    learning_rate: float = 0.05
    dense_learning_rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.embedding_dim < 4 or self.embedding_dim % 4:
            raise ConfigurationError(f"embedding_dim must be a positive multiple of 4, got {self.embedding_dim}")
        if self.optimizer not in OPTIMIZERS:
            raise UnsupportedError(
                f"optimizer {self.optimizer!r} is not supported: tables on a CPU train with one of {', '.join(OPTIMIZERS)} (FBGEMM's CPU "
                "build refuses Adam and LAMB)"
            )
        if self.learning_rate <= 0:
            raise ConfigurationError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.dense_learning_rate is not None and self.dense_learning_rate <= 0:
            raise ConfigurationError(f"dense_learning_rate must be positive, got {self.dense_learning_rate}")


def fused_params(options: ModelOptions) -> dict[str, Any]:
    """The tables' in-backward optimizer, as TorchRec's sharders take it."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    kinds = {
        "sgd": EmbOptimType.EXACT_SGD,
        "adagrad": EmbOptimType.EXACT_ADAGRAD,
        "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    }
    params: dict[str, Any] = {
        "optimizer": kinds[options.optimizer],
        "learning_rate": options.learning_rate,
    }
    if options.optimizer != "sgd":
        params["eps"] = _ADAGRAD_EPS
    return params


def build_model(tables: Sequence[TableShape], dense_dim: int, options: ModelOptions) -> DLRMTrain:
    """The DLRM with its loss. Dense parameters are on the CPU, drawn from ``options.seed``; tables on meta.

    The tables' initial values are keyed by (seed, table, row, column), so a run in memory and one in tiers begin alike.
    """
    torch.manual_seed(options.seed)
    configs = [
        EmbeddingBagConfig(
            name=table.name,
            embedding_dim=options.embedding_dim,
            num_embeddings=table.rows,
            feature_names=[table.feature],
            init_fn=uniform_init_fn(table.name, table.rows, options.embedding_dim, seed=options.seed),
        )
        for table in tables
    ]
    return DLRMTrain(
        DLRM(
            embedding_bag_collection=EmbeddingBagCollection(tables=configs, device=torch.device("meta")),
            dense_in_features=dense_dim,
            dense_arch_layer_sizes=[*options.dense_layers, options.embedding_dim],
            over_arch_layer_sizes=[*options.over_layers, 1],
            dense_device=torch.device("cpu"),
        )
    )


def stock_sharders(options: ModelOptions) -> list[ModuleSharder[nn.Module]]:
    """TorchRec's own sharder with the tables' optimizer."""
    return [EmbeddingBagCollectionSharder(fused_params=fused_params(options))]


def stock_plan(
    model: nn.Module, tables: Sequence[TableShape], sharders: list[ModuleSharder[nn.Module]], world_size: int, pg: Any
) -> ShardingPlan:
    """TorchRec's own plan with every table in memory, whole on one rank.

    Data-parallel or split tables add gradients up in another order, and would not train bit for bit like tiered ones.
    """
    constraints = {t.name: ParameterConstraints(sharding_types=[ShardingType.TABLE_WISE.value]) for t in tables}
    topology = Topology(world_size=world_size, compute_device="cpu", local_world_size=world_size)
    return EmbeddingShardingPlanner(topology=topology, constraints=constraints).collective_plan(model, sharders, pg)


def parallelize(model: nn.Module, plan: ShardingPlan, sharders: list[ModuleSharder[nn.Module]]) -> DistributedModelParallel:
    """The model under ``DistributedModelParallel`` on the CPU."""
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


class MarkedOptimizer(CombinedOptimizer):
    """The tables' fused optimizer and the dense one as one, calling ``before`` and ``after`` around every step."""

    def __init__(self, optimizers: list[Any], before: Any, after: Any) -> None:
        super().__init__(optimizers)
        self._before, self._after = before, after

    def step(self, closure: Any = None) -> None:
        self._before()
        super().step(closure)
        self._after()


def dense_optimizer(dmp: DistributedModelParallel, options: ModelOptions) -> KeyedOptimizerWrapper:
    """An optimizer of every parameter that no in-backward optimizer updates."""
    rate = options.dense_learning_rate or options.learning_rate

    def make(params: Any) -> Optimizer:
        if options.optimizer == "sgd":
            return torch.optim.SGD(params, lr=rate)
        return torch.optim.Adagrad(params, lr=rate, eps=_ADAGRAD_EPS)

    return KeyedOptimizerWrapper(dict(in_backward_optimizer_filter(dmp.named_parameters())), make)
