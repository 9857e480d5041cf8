"""What a training step costs before it looks anything up: TorchRec's modules, ``TieredTrainPipeline`` and the tickets of a tiered group.

A model of nothing but tables, each whole in its pool, trains batches of one sample through the pipeline. One table, ``TABLES`` of
them, and one beside a stock one in memory take turns; the differences to the first are those of the further tables, and of the group that
a table in memory is.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardingType,
    ShardMetadata,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer

from ..data.source import make_batch
from ..default_sharders import sharders
from ..groups import tiered_groups
from ..job_model import ModelOptions, fused_params, parallelize
from ..kernels import durability
from ..parameter_sharding import TieredParameterSharding
from ..process_group import process_group
from ..tiers import DdrHome, TierChain
from ..train_pipeline import TieredTrainPipeline
from .effort import Effort, Said, undisturbed

TABLES = 16
ROWS = 64
DIM = 16
STEPS_A_TURN = 16
WARM_TURNS = 1


@dataclass(frozen=True)
class StepOverhead:
    """Microseconds of a step: with one table, with each further one of the same group, and with one in memory beside it."""

    us_per_group: float
    us_per_table: float
    us_per_stock_group: float


class _Tables(nn.Module):
    """The pooled rows of every table; their sum as loss."""

    def __init__(self, tables: int) -> None:
        super().__init__()
        configs = [
            EmbeddingBagConfig(name=f"t{i}", embedding_dim=DIM, num_embeddings=ROWS, feature_names=[f"f{i}"], init_fn=nn.init.zeros_)
            for i in range(tables)
        ]
        self.tables = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        loss = self.tables(batch.sparse_features).values().sum()
        return loss, loss.detach()


class _Job:
    def __init__(self, tiered: int, stock: int = 0) -> None:
        tables, plan = tiered + stock, EmbeddingModuleShardingPlan()
        for i in range(tables):
            shard = ShardMetadata(shard_offsets=[0, 0], shard_sizes=[ROWS, DIM], placement="rank:0/cpu")
            where: dict[str, Any] = dict(
                sharding_type=ShardingType.TABLE_WISE.value, ranks=[0], sharding_spec=EnumerableShardingSpec([shard])
            )
            if i < tiered:
                plan[f"t{i}"] = TieredParameterSharding(**where, tiers=TierChain(ROWS, (DdrHome(),)))
            else:
                plan[f"t{i}"] = ParameterSharding(**where, compute_kernel=EmbeddingComputeKernel.FUSED.value)
        dmp = parallelize(_Tables(tables), ShardingPlan({"tables": plan}), sharders(fused_params(ModelOptions(embedding_dim=DIM))))
        self._groups = tiered_groups(dmp)
        self._pipeline = TieredTrainPipeline(dmp, CombinedOptimizer([dmp.fused_optimizer]), torch.device("cpu"))
        self._batches = self._endless(tables)

    @staticmethod
    def _endless(tables: int) -> Iterator[Batch]:
        keys = [f"f{i}" for i in range(tables)]
        for number in itertools.count():
            ids, lengths = np.full(tables, number % ROWS, np.int64), np.ones(tables, np.int32)
            yield make_batch(keys, ids, lengths, np.zeros((1, 1), np.float32), np.zeros(1, np.float32))

    def step_s(self) -> float:
        """Of one step."""
        start = time.perf_counter()
        self._pipeline.progress(self._batches)
        return time.perf_counter() - start

    def close(self) -> None:
        self._pipeline.reset()
        self._pipeline.detach()
        durability.close(self._groups)


def measure(effort: Effort, say: Said) -> StepOverhead:
    """See above."""
    times: dict[tuple[int, int], list[float]] = {(1, 0): [], (TABLES, 0): [], (1, 1): []}
    with process_group():
        jobs = {tables: _Job(*tables) for tables in times}
        for turn in range(WARM_TURNS + effort.rounds * effort.steps // STEPS_A_TURN + 1):
            say(f"a step's overhead, turn {turn + 1}")
            for tables, job in jobs.items():
                spent = [job.step_s() for _ in range(STEPS_A_TURN)]
                if turn >= WARM_TURNS:
                    times[tables] += spent
        for job in jobs.values():
            job.close()
    one, all_, both = (undisturbed(of, STEPS_A_TURN) for of in times.values())
    return StepOverhead(1e6 * one, 1e6 * max(0.0, all_ - one) / (TABLES - 1), 1e6 * max(0.0, both - one))
