"""TorchRec's train pipeline and optimizer wrappers drive tiered tables unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

import torchrec_mtrains as mtrains
from dmp_twins import Job, Table, assert_same_state, batch, initial_values, plan

pytestmark = pytest.mark.usefixtures("one_rank")

JOB = Job(
    [Table(60, 8, ["a"], pool_rows=12), Table(40, 8, ["b"], pool_rows=12, sharding="row_wise"), Table(20, 8, ["c"], 6, tiered=False)],
    optimizer=EmbOptimType.EXACT_ADAGRAD,
)
STEPS = 12


@dataclass
class Batch(Pipelineable):
    """Ids for the tables and what the model should say about them."""

    ids: KeyedJaggedTensor
    label: torch.Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return self

    def record_stream(self, stream: torch.Stream) -> None:
        pass


class Model(nn.Module):
    """A collection and a linear layer over it."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = EmbeddingBagCollection(tables=JOB.configs(), device=torch.device("meta"))
        torch.manual_seed(0)
        self.over = nn.Linear(24, 1)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = self.tables(batch.ids)
        predictions = self.over(torch.cat([pooled[key] for key in "abc"], dim=1)).squeeze(1)
        return nn.functional.mse_loss(predictions, batch.label), predictions.detach()


def made(tiered: bool) -> DistributedModelParallel:
    dmp = DistributedModelParallel(
        Model(),
        device=torch.device("cpu"),
        plan=ShardingPlan({"tables": plan(JOB, tiered).plan[""]}),
        sharders=mtrains.sharders(JOB.fused_params()),
    )
    dmp.load_state_dict({f"tables.{k}": v for k, v in initial_values(JOB).items()}, strict=False)
    return dmp


def dense_optimizer(dmp: DistributedModelParallel) -> KeyedOptimizerWrapper:
    return KeyedOptimizerWrapper(dict(in_backward_optimizer_filter(dmp.named_parameters())), lambda p: torch.optim.SGD(p, lr=0.1))


def batches() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield Batch(batch(JOB, generator), torch.rand(JOB.batch_size, generator=generator))


def test_the_pipeline_trains_like_fused_tables_and_like_a_plain_loop() -> None:
    outputs = []
    dmps = [made(True), made(False), made(True)]
    for dmp in dmps[:2]:
        optimizer = CombinedOptimizer([dmp.fused_optimizer, dense_optimizer(dmp)])
        pipeline, data = TrainPipelineSparseDist(dmp, optimizer, torch.device("cpu")), batches()
        outputs.append(torch.stack([pipeline.progress(data) for _ in range(STEPS)]))
        with pytest.raises(StopIteration):
            pipeline.progress(data)
    plain, dense, seen = dmps[2], dense_optimizer(dmps[2]), []
    for one in batches():
        dense.zero_grad()
        loss, predictions = plain(one)
        loss.backward()
        dense.step()
        seen.append(predictions)
    outputs.append(torch.stack(seen))
    assert outputs[0].shape == (STEPS, JOB.batch_size)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert_pairs_equal(dmps[0], dmps[1])
    assert_pairs_equal(dmps[0], dmps[2])


def assert_pairs_equal(a: DistributedModelParallel, b: DistributedModelParallel) -> None:
    """The sharded collections are equal, and the dense layer."""
    assert torch.equal(a.module.over.weight, b.module.over.weight)
    assert_same_state(_only_tables(a), _only_tables(b))


def _only_tables(dmp: DistributedModelParallel) -> nn.Module:
    return dmp.module.tables


def test_dense_optimizers_see_no_tiered_parameter() -> None:
    names = set(dict(in_backward_optimizer_filter(made(True).named_parameters())))
    assert names == {"over.weight", "over.bias"}


def test_a_learning_rate_set_in_the_fused_optimizer_reaches_the_next_backward() -> None:
    dmps = [made(True), made(False)]
    for dmp in dmps:
        for step, one in enumerate(batches()):
            for group in dmp.fused_optimizer.param_groups:
                group["lr"] = 1.0 / (step + 1)
            dmp.fused_optimizer.zero_grad()
            dmp(one)[0].backward()
            dmp.fused_optimizer.step()
    (group,) = {g.tbe.get_learning_rate() for g in mtrains.tiered_groups(dmps[0])}
    assert group == pytest.approx(1.0 / STEPS)
    assert_pairs_equal(*dmps)


def test_a_warmup_schedule_reaches_the_rows() -> None:
    dmps = [made(True), made(False)]
    for dmp in dmps:
        stages = [
            WarmupStage(policy=WarmupPolicy.LINEAR, max_iters=5, value=0.1),
            WarmupStage(policy=WarmupPolicy.CONSTANT, max_iters=99, value=2.0),
        ]
        optimizer = WarmupOptimizer(dmp.fused_optimizer, stages, lr=0.1)
        for one in batches():
            optimizer.zero_grad()
            dmp(one)[0].backward()
            optimizer.step()
    assert_pairs_equal(*dmps)


def test_evaluation_between_training_steps_changes_nothing() -> None:
    dmps = [made(True), made(False)]
    for dmp in dmps:
        for one in batches():
            dmp.train()
            dmp(one)[0].backward()
            dmp.eval()
            with torch.no_grad():
                for other in batches():
                    dmp(other)
    assert_pairs_equal(*dmps)
