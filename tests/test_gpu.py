"""Tiered tables on a GPU under ``DistributedModelParallel``: TorchRec's pipelines, state dicts and checkpoints. Needs a GPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable
from torchrec_mtrains.planner import CheckpointSchedule, TieredParameterConstraints, TieredShardingPlanner, TieredTopology

import torchrec_mtrains as mtrains
from dmp_twins import Job, Table, assert_same_state, batch, collection, in_order, initial_values
from torchrec_mtrains import DdrCache, DdrHome, SsdHome, TierChain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = torch.device("cuda", 0)
JOB = Job(
    [
        Table(600, 16, ["a"], pool_rows=80),
        Table(400, 8, ["b", "c"], pool_rows=120, sharding="row_wise"),
        Table(300, 32, ["d"], pool_rows=80, sharding="column_wise", shard_dim=16),
        Table(200, 8, ["e"], pool_rows=80, tiered=False),
    ],
    optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    batch_size=16,
    max_length=4,
)
STEPS = 30


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """One rank, NCCL for what is on the GPU."""
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    torch.cuda.set_device(DEVICE)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    del os.environ["LOCAL_WORLD_SIZE"]


@dataclass
class Batch(Pipelineable):
    """Ids for the tables and what the model should say about them."""

    ids: KeyedJaggedTensor
    label: torch.Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return Batch(self.ids.to(device, non_blocking), self.label.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        self.ids.record_stream(stream)
        self.label.record_stream(stream)

    def pin_memory(self) -> Batch:
        return Batch(self.ids.pin_memory(), self.label.pin_memory())


class Model(nn.Module):
    """A collection and a linear layer over it."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = EmbeddingBagCollection(tables=JOB.configs(), device=torch.device("meta"))
        torch.manual_seed(0)
        self.over = nn.Linear(16 + 8 + 8 + 32 + 8, 1, device=DEVICE)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = self.tables(batch.ids)
        predictions = self.over(torch.cat([pooled[key] for key in "abcde"], dim=1)).squeeze(1)
        return nn.functional.mse_loss(predictions, batch.label), predictions.detach()


def plan(tiered: bool, home: SsdHome | DdrHome, every: bool) -> ShardingPlan:
    result = EmbeddingModuleShardingPlan()
    for i, table in enumerate(JOB.tables):
        widths = [table.shard_dim] * (table.dim // table.shard_dim) if table.shard_dim else [table.dim]
        spec = EnumerableShardingSpec([ShardMetadata([0, k * w], [table.rows, w], "rank:0/cuda:0") for k, w in enumerate(widths)])
        where = {"sharding_type": table.sharding, "ranks": [0] * len(widths), "sharding_spec": spec}
        if tiered and (table.tiered or every):
            caches = () if isinstance(home, DdrHome) else (DdrCache(table.pool_rows + 20),)
            result[f"t{i}"] = mtrains.TieredParameterSharding(**where, tiers=TierChain(table.pool_rows, (*caches, home)))
        else:
            result[f"t{i}"] = ParameterSharding(**where, compute_kernel="fused")
    return ShardingPlan({"tables": result})


def made(tiered: bool, home: SsdHome | DdrHome, optimizer: EmbOptimType = JOB.optimizer, every: bool = False) -> DistributedModelParallel:
    """One side; with ``every`` the fourth table is tiered too."""
    params = {**JOB.fused_params(), "prefetch_pipeline": True, "optimizer": optimizer}
    dmp = DistributedModelParallel(Model(), device=DEVICE, plan=plan(tiered, home, every), sharders=mtrains.sharders(params))
    values = {f"tables.{k}": v for k, v in initial_values(JOB).items()}
    stock = {k: v for k, v in values.items() if not tiered or (k.startswith("tables.embedding_bags.t3.") and not every)}
    dmp.load_state_dict(stock, strict=False)
    return dmp


def batches() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        ids = batch(JOB, generator)
        yield Batch(ids, torch.rand(JOB.batch_size, generator=generator))


@pytest.fixture
def home(request: pytest.FixtureRequest) -> Iterator[SsdHome | DdrHome]:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        yield SsdHome((folder,), capacity_bytes=256 << 20) if request.param == "ssd" else DdrHome()


@pytest.mark.parametrize("home", ["ddr", "ssd"], indirect=True)
@pytest.mark.parametrize("pipeline", [TrainPipelineSparseDist, PrefetchTrainPipelineSparseDist, mtrains.TieredTrainPipeline])
def test_a_pipeline_on_a_gpu_trains_tiered_tables_bit_for_bit_like_fused_ones(
    pipeline: Callable[..., TrainPipelineSparseDist | PrefetchTrainPipelineSparseDist], home: SsdHome | DdrHome
) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        results, models = [], []
        for tiered in (True, False):
            dmp = made(tiered, home)
            dense = KeyedOptimizerWrapper(dict(in_backward_optimizer_filter(dmp.named_parameters())), lambda p: torch.optim.SGD(p, lr=0.1))
            train = pipeline(dmp, CombinedOptimizer([dmp.fused_optimizer, dense]), DEVICE)
            source = batches()
            results.append([train.progress(source).cpu() for _ in range(STEPS)])
            models.append(dmp)
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)
        assert all(g.stats()[0]["evictions"] > 0 for g in mtrains.tiered_groups(models[0]))
        for group in mtrains.tiered_groups(models[0]):
            group._pool.check()
        assert_same_state(*(model.module.tables for model in models))
    finally:
        torch.use_deterministic_algorithms(False)


def planned(folder: str) -> ShardingPlan:
    """Ours above an SSD and UVM caching beside a fused table, in budgets that hold neither."""
    kernels = {"t0": "customized_kernel", "t1": "fused_uvm_caching", "t2": "fused", "t3": "customized_kernel"}
    planner = TieredShardingPlanner(
        TieredTopology(1, "cuda", hbm_budget_bytes=260 << 10, ddr_budget_bytes=202 << 10, ssd=SsdHome((folder,), capacity_bytes=256 << 20)),
        batch_size=JOB.batch_size,
        constraints={
            name: TieredParameterConstraints(
                compute_kernels=[kernel],
                sharding_types=["table_wise"],
                pooling_factors=[JOB.max_length / 2] * len(JOB.tables[i].features),
                min_pool_rows=JOB.batch_size * JOB.max_length * len(JOB.tables[i].features),
            )
            for i, (name, kernel) in enumerate(kernels.items())
        },
        checkpoints=CheckpointSchedule(keep=0),
    )
    return planner.plan(Model(), mtrains.sharders({**JOB.fused_params(), "prefetch_pipeline": True}))


def test_a_plan_of_the_planner_trains_bit_for_bit_like_fused_tables() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            tables = (ours := planned(folder)).plan["tables"]
            stock = EmbeddingModuleShardingPlan()  # of the same sharding: row-wise state of column-wise shards would be another
            for name, t in tables.items():
                stock[name] = ParameterSharding(t.sharding_type, "fused", ranks=t.ranks, sharding_spec=t.sharding_spec)
            plans = ours, ShardingPlan({"tables": stock})
            chains = [tables[name].tiers.tiers for name in ("t0", "t3")]
            assert [type(tier) for chain in chains for tier in chain] == [DdrCache, SsdHome] * 2
            assert tables["t1"].compute_kernel == "fused_uvm_caching"
            results = []
            for side in plans:
                params = {**JOB.fused_params(), "prefetch_pipeline": True}
                dmp = DistributedModelParallel(Model(), device=DEVICE, plan=side, sharders=mtrains.sharders(params))
                tiered = [n for n, t in side.plan["tables"].items() if isinstance(t, mtrains.TieredParameterSharding)]
                values = {f"tables.{k}": v for k, v in initial_values(JOB).items() if not any(f".{n}." in k for n in tiered)}
                dmp.load_state_dict(values, strict=False)
                dense = KeyedOptimizerWrapper(
                    dict(in_backward_optimizer_filter(dmp.named_parameters())), lambda p: torch.optim.SGD(p, lr=0.1)
                )
                train = mtrains.TieredTrainPipeline(dmp, CombinedOptimizer([dmp.fused_optimizer, dense]), DEVICE)
                source = batches()
                results.append([train.progress(source).cpu() for _ in range(STEPS)])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_checkpoint_of_fused_tables_on_a_gpu_loads_into_tiered_ones_and_back() -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        source, into, back = made(False, DdrHome()), made(True, DdrHome()), made(False, DdrHome())
        for dmp, b in zip([source] * 3, batches(), strict=False):
            loss, _ = dmp(b.to(DEVICE))
            loss.backward()
        for i, (a, b) in enumerate([(source, into), (into, back)]):
            states = [{"model": d.state_dict(), "optimizer": d.fused_optimizer.state_dict()} for d in (a, b)]
            dcp.save(states[0], checkpoint_id=f"{folder}/{i}")
            dcp.load(states[1], checkpoint_id=f"{folder}/{i}")
            b.load_state_dict(states[1]["model"])
            b.fused_optimizer.load_state_dict(states[1]["optimizer"])
        assert_same_state(into.module.tables, source.module.tables)
        assert_same_state(into.module.tables, back.module.tables)


JOBS = {
    "fp16": Job([Table(300, 8, ["a"], 90), Table(200, 16, ["b", "c"], 150)], data_type=DataType.FP16, batch_size=16),
    "weighted": Job([Table(300, 8, ["a"], 90), Table(200, 16, ["b"], 90)], EmbOptimType.ADAM, weighted=True, batch_size=16),
    "sequences": Job([Table(300, 8, ["a"], 90), Table(200, 8, ["b", "c"], 150)], EmbOptimType.EXACT_SGD, sequence=True, batch_size=16),
    "mean": Job([Table(300, 8, ["a"], 90, PoolingType.MEAN), Table(200, 16, ["b"], 90)], EmbOptimType.PARTIAL_ROWWISE_ADAM, batch_size=16),
}


@pytest.mark.parametrize("kind", JOBS)
def test_a_collection_on_a_gpu_trains_and_evaluates_bit_for_bit_like_fused(kind: str) -> None:
    job = JOBS[kind]
    torch.use_deterministic_algorithms(True)
    try:
        sharders = mtrains.sharders(job.fused_params())
        plans = [ShardingPlan({"": one_rank_plan(job, tiered)}) for tiered in (True, False)]
        sides = [DistributedModelParallel(collection(job), device=DEVICE, plan=plan, sharders=sharders) for plan in plans]
        sides[1].load_state_dict(initial_values(job))
        generator = torch.Generator().manual_seed(3)
        for step in range(25):
            ids = batch(job, generator).to(DEVICE)
            outputs = [in_order(side(ids)) for side in sides]
            assert torch.equal(*outputs)
            gradient = torch.randn(outputs[0].shape, generator=generator).to(DEVICE, outputs[0].dtype)
            for output in outputs:
                output.backward(gradient)
            if step % 5 == 0:
                with torch.no_grad():
                    other = batch(job, generator).to(DEVICE)
                    assert torch.equal(*(in_order(side(other)) for side in sides))
            if step == 12:
                for group in mtrains.tiered_groups(sides[0]):
                    group.resize(0, 120)
        assert_same_state(*sides)
    finally:
        torch.use_deterministic_algorithms(False)


def one_rank_plan(job: Job, tiered: bool) -> EmbeddingModuleShardingPlan:
    result = EmbeddingModuleShardingPlan()
    for i, table in enumerate(job.tables):
        spec = EnumerableShardingSpec([ShardMetadata([0, 0], [table.rows, table.dim], "rank:0/cuda:0")])
        where = {"sharding_type": "table_wise", "ranks": [0], "sharding_spec": spec}
        chain = TierChain(table.pool_rows, (DdrHome(),))
        result[f"t{i}"] = (
            mtrains.TieredParameterSharding(**where, tiers=chain) if tiered else ParameterSharding(**where, compute_kernel="fused")
        )
    return result


@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.ADAM])
def test_a_job_on_a_gpu_resumes_from_its_checkpoint_with_the_same_bits(optimizer: EmbOptimType) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            dmp = made(True, SsdHome((folder,), capacity_bytes=256 << 20), optimizer, every=True)
            seen: list[torch.Tensor] = []
            for step, b in enumerate(batches()):
                if step == 10:
                    mtrains.save_checkpoint(dmp, f"{folder}/checkpoint", step=step)
                loss, predictions = dmp(b.to(DEVICE))
                loss.backward()
                if step >= 10:
                    seen.append(predictions)
            mtrains.load_checkpoint(dmp, f"{folder}/checkpoint")
            for (step, b), before in zip(list(enumerate(batches()))[10:], seen, strict=True):
                loss, predictions = dmp(b.to(DEVICE))
                loss.backward()
                assert torch.equal(predictions, before), step
    finally:
        torch.use_deterministic_algorithms(False)
