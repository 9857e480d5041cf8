"""A model over tiered tables, trained by ``TieredTrainPipeline``, and its twin over stock FUSED tables, trained by a plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

import torchrec_mtrains as mtrains
from dmp_twins import Job, assert_same_state, batch, collection, in_order, initial_values, plan
from torchrec_mtrains import DdrHome

CPU = torch.device("cpu")


@dataclass
class Batch(Pipelineable):
    """Ids for the tables and what the model should say about them."""

    ids: KeyedJaggedTensor
    label: torch.Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return Batch(self.ids.to(device, non_blocking=non_blocking), self.label.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        self.ids.record_stream(stream)
        self.label.record_stream(stream)


def as_matrix(output: Any) -> torch.Tensor:
    """Pooled embeddings as they are; a sequence's as one row of sums."""
    values = in_order(output)
    return values if values.dim() == 2 else values.reshape(-1, 4).sum(0, keepdim=True)


torch.fx.wrap("as_matrix")


class Model(nn.Module):
    """Two collections of the same kind of tables, one of which may be left out, and a linear layer over them."""

    def __init__(self, job: Job, collections: int) -> None:
        super().__init__()
        for i in range(collections):
            self.add_module(f"tables{i}", collection(job))
        self.collections = collections
        torch.manual_seed(0)
        width = 4 if job.sequence else sum(len(t.features) * t.dim for t in job.tables)
        self.over = nn.Linear(width * collections, 1)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = [as_matrix(self.tables0(batch.ids))]
        if self.collections == 2:
            outputs.append(as_matrix(self.tables1(batch.ids)))
        predictions = torch.tanh(self.over(torch.tanh(torch.cat(outputs, dim=1)))).squeeze(1)
        return nn.functional.mse_loss(predictions, batch.label.mean() + torch.zeros_like(predictions)), predictions.detach()


@dataclass
class Twins:
    """What both sides train."""

    job: Job
    collections: int = 1
    steps: int = 8
    batches: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.job.seed + (dist.get_rank() if dist.is_initialized() else 0))
        self.batches = [Batch(batch(self.job, generator), torch.rand(3, generator=generator)) for _ in range(self.steps)]

    def model(self, tiered: bool, homes: list[Any] | None = None) -> DistributedModelParallel:
        """A sharded model with the initial values of tiered tables."""
        homes = homes or [DdrHome()] * self.collections
        names = [f"tables{i}" for i in range(self.collections)]
        dmp = DistributedModelParallel(
            Model(self.job, self.collections),
            device=CPU,
            plan=ShardingPlan({name: plan(self.job, tiered, home).plan[""] for name, home in zip(names, homes, strict=True)}),
            sharders=mtrains.sharders(self.job.fused_params()),
        )
        in_memory = {f"{self.job.module}.t{i}.weight" for i, t in enumerate(self.job.tables) if not (tiered and t.tiered)}
        values = {k: v for k, v in initial_values(self.job).items() if k in in_memory}
        dmp.load_state_dict({f"{name}.{k}": v for name in names for k, v in values.items()}, strict=False)
        return dmp

    def optimizer(self, dmp: DistributedModelParallel) -> CombinedOptimizer:
        """Of the tables and of what is over them."""
        return CombinedOptimizer([dmp.fused_optimizer, dense_optimizer(dmp)])

    def train_plainly(self, dmp: DistributedModelParallel) -> list[torch.Tensor]:
        """The predictions of every step, without a pipeline."""
        optimizer, seen = self.optimizer(dmp), []
        for one in self.batches:
            optimizer.zero_grad()
            loss, predictions = dmp(one)
            loss.backward()
            optimizer.step()
            seen.append(predictions)
        return seen

    def assert_same(self, ours: DistributedModelParallel, theirs: DistributedModelParallel) -> None:
        """Tables, optimizer states and the dense layer."""
        assert torch.equal(ours.module.over.weight, theirs.module.over.weight)
        for i in range(self.collections):
            assert_same_state(getattr(ours.module, f"tables{i}"), getattr(theirs.module, f"tables{i}"))


def dense_optimizer(dmp: DistributedModelParallel) -> KeyedOptimizerWrapper:
    """Of what is over the tables."""
    return KeyedOptimizerWrapper(dict(in_backward_optimizer_filter(dmp.named_parameters())), lambda p: torch.optim.SGD(p, lr=0.1))


def assert_all_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """To the bit, step by step."""
    assert len(ours) == len(theirs)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), step


def until_the_end(pipeline: mtrains.TieredTrainPipeline, data: Iterator[Batch]) -> list[torch.Tensor]:
    """The predictions of every step until StopIteration."""
    seen = []
    while True:
        try:
            seen.append(pipeline.progress(data))
        except StopIteration:
            return seen
