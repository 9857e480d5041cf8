"""Training loops as users write them: tiered tables do in each what stock FUSED does, to the bit."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.distributed.types import ShardingEnv2D, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

import torchrec_mtrains as mtrains
from dmp_twins import Job, Table, assert_same_state, batch, initial_values, plan
from ranks import Ranks
from test_torchrec_pipeline import Batch
from torchrec_mtrains.errors import PoolTooSmallError, TicketError, UnsupportedError

STEPS = 12
TOGETHER = 3
"""Batches of one optimizer step, where gradients are accumulated."""


def job(sequence: bool, pending: int = 1) -> Job:
    """Pools hold ``pending`` batches of all ranks, and no more."""
    world_size = dist.get_world_size()
    of_a_batch = 2 * 3 * world_size
    return Job(
        [
            Table(400, 8, ["a"], pending * of_a_batch),
            Table(400, 8, ["b"], pending * of_a_batch, sharding="row_wise"),
            Table(300, 8, ["c"], pending * of_a_batch, sharding="column_wise", shard_dim=4, rank=world_size - 1),
            Table(20, 8, ["d"], 1, tiered=False),
        ],
        batch_size=2,
        max_length=3,
        sequence=sequence,
    )


class Network(nn.Module):
    """What is over the tables."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, 8), nn.Linear(8, 1)

    def forward(self, sums: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(sums))).squeeze(1)


class Model(nn.Module):
    """Tables and a small network over the sums of their rows."""

    def __init__(self, job: Job, device: str = "meta") -> None:
        super().__init__()
        where = torch.device(device)
        self.tables = (
            EmbeddingCollection(tables=job.configs(), device=where)
            if job.sequence
            else EmbeddingBagCollection(tables=job.configs(), device=where)
        )
        torch.manual_seed(0)
        self.over = Network(8 * len(job.tables))
        self.features, self.sequence, self.max_length = list(job.features()), job.sequence, job.max_length

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.tables(batch.ids)
        if self.sequence:
            sums = [rows[f].to_padded_dense(self.max_length).sum(1) for f in self.features]
        else:
            sums = [rows[f] for f in self.features]
        predictions = self.over(torch.cat(sums, dim=1))
        return nn.functional.mse_loss(predictions, batch.label), predictions.detach()


Loop = Callable[[DistributedModelParallel, list[Batch]], list[torch.Tensor]]


def made(job: Job, tiered: bool, device: str = "meta", loaded: bool = True) -> DistributedModelParallel:
    dmp = DistributedModelParallel(
        Model(job, device),
        device=torch.device("cpu"),
        plan=ShardingPlan({"tables": plan(job, tiered).plan[""]}),
        sharders=mtrains.sharders(job.fused_params()),
    )
    if not loaded:
        return dmp
    values = initial_values(job)
    in_memory = {f"{job.module}.t{i}.weight" for i, t in enumerate(job.tables) if not (tiered and t.tiered)}
    dmp.load_state_dict({f"tables.{k}": v for k, v in values.items() if k in in_memory}, strict=False)
    return dmp


def batches(job: Job, count: int = STEPS) -> list[Batch]:
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    return [Batch(batch(job, generator), torch.rand(job.batch_size, generator=generator)) for _ in range(count)]


def dense_optimizer(dmp: DistributedModelParallel) -> KeyedOptimizerWrapper:
    return KeyedOptimizerWrapper(dict(in_backward_optimizer_filter(dmp.named_parameters())), lambda p: torch.optim.SGD(p, lr=0.1))


def both_optimizers(dmp: DistributedModelParallel) -> CombinedOptimizer:
    return CombinedOptimizer([dmp.fused_optimizer, dense_optimizer(dmp)])


def assert_trains_like_fused(loop: Loop, sequence: bool, pending: int = 1, device: str = "meta") -> None:
    """Outputs, tables, optimizer state and the network are equal; pools were too small for their tables, and hold nothing back."""
    its_job = job(sequence, pending)
    ours, theirs = made(its_job, True, device), made(its_job, False)
    seen, expected = (loop(dmp, batches(its_job)) for dmp in (ours, theirs))
    assert len(seen) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert_same_state(ours.module.tables, theirs.module.tables)
    for a, b in zip(ours.module.over.parameters(), theirs.module.over.parameters(), strict=True):
        assert torch.equal(a, b)
    groups = mtrains.tiered_groups(ours)
    assert groups
    assert sum(stats["evictions"] for group in groups for stats in group.stats()) > 0
    gc.collect()  # activation recomputation leaves graphs in TorchRec's reference cycles
    assert not any(group._pool.outstanding for group in groups)


def plain(dmp: DistributedModelParallel, data: list[Batch]) -> list[torch.Tensor]:
    optimizer, seen = both_optimizers(dmp), []
    for one in data:
        optimizer.zero_grad()
        loss, predictions = dmp(one)
        loss.backward()
        optimizer.step()
        seen.append(predictions)
    return seen


def in_the_base_pipeline(dmp: DistributedModelParallel, data: list[Batch]) -> list[torch.Tensor]:
    pipeline, feed = TrainPipelineBase(dmp, both_optimizers(dmp), torch.device("cpu")), iter(data)
    return [pipeline.progress(feed) for _ in data]


def in_the_sparse_pipeline(dmp: DistributedModelParallel, data: list[Batch]) -> list[torch.Tensor]:
    pipeline, feed = TrainPipelineSparseDist(dmp, both_optimizers(dmp), torch.device("cpu")), iter(data)
    return [pipeline.progress(feed) for _ in data]


def in_the_sparse_pipeline_with_evaluation(dmp: DistributedModelParallel, data: list[Batch]) -> list[torch.Tensor]:
    """Trains on the first half, evaluates through a pipeline of its own, and goes on."""
    half, seen = len(data) // 2, []
    for part in (data[:half], data[half:]):
        dmp.train()
        seen += in_the_sparse_pipeline(dmp, part)
        dmp.eval()
        pipeline, feed = TrainPipelineSparseDist(dmp, both_optimizers(dmp), torch.device("cpu")), iter(data)
        with torch.no_grad():
            evaluated = [pipeline.progress(feed) for _ in data]
        assert len(evaluated) == len(data)
    return seen


def under_a_schedule(dmp: DistributedModelParallel, data: list[Batch]) -> list[torch.Tensor]:
    optimizer, seen = both_optimizers(dmp), []
    schedule = LambdaLR(dmp.fused_optimizer, lambda step: 1.0 / (1 + step))
    for one in data:
        optimizer.zero_grad()
        loss, predictions = dmp(one)
        loss.backward()
        optimizer.step()
        schedule.step()
        seen.append(predictions)
    return seen


def accumulating_over_backwards(dmp: DistributedModelParallel, data: list[Batch]) -> list[torch.Tensor]:
    """The network steps every few batches; the tables' optimizer is fused into each backward."""
    optimizer, seen = both_optimizers(dmp), []
    for step, one in enumerate(data):
        loss, predictions = dmp(one)
        (loss / TOGETHER).backward()
        if step % TOGETHER == TOGETHER - 1:
            optimizer.step()
            optimizer.zero_grad()
        seen.append(predictions)
    return seen


def accumulating_in_one_backward(dmp: DistributedModelParallel, data: list[Batch]) -> list[torch.Tensor]:
    """Several forward passes await one backward."""
    optimizer, seen = both_optimizers(dmp), []
    for first in range(0, len(data), TOGETHER):
        optimizer.zero_grad()
        losses, predictions = zip(*(dmp(one) for one in data[first : first + TOGETHER]), strict=True)
        torch.stack(losses).mean().backward()
        optimizer.step()
        seen += predictions
    return seen


def recomputing(dmp: DistributedModelParallel, data: list[Batch]) -> list[torch.Tensor]:
    """Every forward runs a second time inside its backward."""
    optimizer, seen = both_optimizers(dmp), []
    for one in data:
        optimizer.zero_grad()
        loss, predictions = checkpoint(dmp, one, use_reentrant=False)
        loss.backward()
        optimizer.step()
        seen.append(predictions)
    return seen


def recomputing_reentrantly(dmp: DistributedModelParallel, data: list[Batch]) -> list[torch.Tensor]:
    """The same; the first forward runs without a graph."""
    optimizer, seen = both_optimizers(dmp), []
    for one in data:
        optimizer.zero_grad()
        handle = torch.zeros(1, requires_grad=True)  # a reentrant checkpoint wants an input with a gradient
        loss, predictions = checkpoint(lambda handle, one: _plus(dmp(one), handle), handle, one, use_reentrant=True)
        loss.backward()
        optimizer.step()
        seen.append(predictions)
    return seen


def _plus(output: tuple[torch.Tensor, torch.Tensor], handle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return output[0] + handle.sum(), output[1]


def evaluating_between(dmp: DistributedModelParallel, data: list[Batch]) -> list[torch.Tensor]:
    optimizer, seen = both_optimizers(dmp), []
    for one in data:
        dmp.train()
        optimizer.zero_grad()
        loss, predictions = dmp(one)
        dmp.eval()
        with torch.no_grad():  # between a forward and its backward too
            evaluated = [dmp(other)[1] for other in data[:1]]
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            evaluated += [dmp(other)[1] for other in data]
        seen.append(torch.cat([predictions, *evaluated]))
    return seen


def with_the_network_compiled(dmp: DistributedModelParallel, data: list[Batch]) -> list[torch.Tensor]:
    """The network is one graph, compiled whole; the tables are outside it."""
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    dmp.module.over.compile(backend=backend, fullgraph=True)
    seen = plain(dmp, data)
    assert len(graphs) == 1
    return seen


LOOPS: list[tuple[Loop, int]] = [
    (plain, 1),
    (in_the_base_pipeline, 1),
    (in_the_sparse_pipeline, 1),
    (in_the_sparse_pipeline_with_evaluation, 1),
    (under_a_schedule, 1),
    (accumulating_over_backwards, 1),
    (accumulating_in_one_backward, TOGETHER),
    (recomputing, 1),
    (recomputing_reentrantly, 1),
    (evaluating_between, 2),
    (with_the_network_compiled, 1),
]


BETWEEN_RANKS = (
    plain,
    in_the_sparse_pipeline,
    accumulating_in_one_backward,
    recomputing,
    recomputing_reentrantly,
    with_the_network_compiled,
)
"""Loops in which ranks could get out of step, or hold rows longer, than one rank alone."""


def each(loops: list[tuple[Loop, int]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("loop", "pending"), loops, ids=[loop.__name__ for loop, _ in loops])


@each(LOOPS)
@pytest.mark.parametrize("sequence", [False, True], ids=["bags", "sequences"])
def test_a_loop_trains_like_fused(one_rank: None, loop: Loop, pending: int, sequence: bool) -> None:
    assert_trains_like_fused(loop, sequence, pending)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@each([(loop, pending) for loop, pending in LOOPS if loop in BETWEEN_RANKS])
@pytest.mark.parametrize("sequence", [False, True], ids=["bags", "sequences"])
def test_a_loop_trains_like_fused_on_two_ranks(two_ranks: Ranks, loop: Loop, pending: int, sequence: bool) -> None:
    two_ranks.run(assert_trains_like_fused, loop, sequence, pending)


def train_where_one_rank_has_every_shard(loop: Loop, sequence: bool) -> None:
    its_job = Job([Table(150, 8, ["a"], 12), Table(120, 8, ["b"], 12)], sequence=sequence)
    ours, theirs = made(its_job, True), made(its_job, False)
    seen, expected = (loop(dmp, batches(its_job)) for dmp in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert_same_state(ours.module.tables, theirs.module.tables)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert len(mtrains.tiered_groups(ours)) == (1 if dist.get_rank() == 0 else 0)


@pytest.mark.parametrize("loop", [plain, in_the_sparse_pipeline, recomputing], ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("sequence", [False, True], ids=["bags", "sequences"])
def test_a_rank_without_a_shard_takes_part(two_ranks: Ranks, loop: Loop, sequence: bool) -> None:
    two_ranks.run(train_where_one_rank_has_every_shard, loop, sequence)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_tables_of_bags_start_the_same_wherever_the_model_was_made(one_rank: None, device: str) -> None:
    assert_trains_like_fused(plain, sequence=False, device=device)


def test_tables_of_sequences_keep_the_values_of_a_model_that_was_made_in_memory(one_rank: None) -> None:
    """As stock FUSED does; it takes new ones for bags."""
    its_job, dmps = job(sequence=True), []
    for tiered in (True, False):
        torch.manual_seed(5)
        dmps.append(made(its_job, tiered, "cpu", loaded=False))
    assert_same_state(dmps[0].module.tables, dmps[1].module.tables)
    seen, expected = (plain(dmp, batches(its_job)) for dmp in dmps)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert_same_state(dmps[0].module.tables, dmps[1].module.tables)


def refuse_a_copy() -> None:
    """Also on the last rank, which has nothing of the table."""
    dmp = made(Job([Table(150, 8, ["a"], 12)]), True)
    for module in (dmp, dmp.module, dmp.module.tables):
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(UnsupportedError, match=r"^ShardedTieredEmbeddingBagCollection: deepcopy and pickle .*tables \['t0'\]"):
                copied(module)


def test_a_model_with_tiered_tables_refuses_to_be_copied(one_rank: None) -> None:
    refuse_a_copy()


def test_a_model_with_tiered_tables_refuses_to_be_copied_on_every_rank(two_ranks: Ranks) -> None:
    two_ranks.run(refuse_a_copy)


def test_two_dimensional_parallelism_is_refused_by_name(one_rank: None) -> None:
    """``DMPCollection`` itself takes no CPU; its environment is what it hands to sharders."""
    world = dist.group.WORLD
    env = ShardingEnv2D(world, world, world, DeviceMesh("cpu", [[0]], mesh_dim_names=("replicate", "shard")))
    for sequence in (False, True):
        its_job = Job([Table(150, 8, ["a"], 12)], sequence=sequence)
        tables = Model(its_job).tables
        sharder = next(s for s in mtrains.sharders() if s.module_type is type(tables))
        with pytest.raises(UnsupportedError, match=r"2D parallelism \(DMPCollection\)"):
            sharder.shard(tables, plan(its_job, True).plan[""], env, torch.device("cpu"))


def forward_without_backward(dmp: DistributedModelParallel, data: list[Batch]) -> None:
    """Leaves graphs that are garbage in reference cycles, which nothing has collected yet."""
    for one in data:
        cycle: list[object] = [dmp(one)]
        cycle.append(cycle)
        del cycle
    assert all(group._pool.outstanding for group in mtrains.tiered_groups(dmp))


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("one_rank", "_no_collector")
def test_a_backward_that_never_ran_gives_its_rows_back_when_a_pool_is_full() -> None:
    its_job = job(sequence=False)
    dmp = made(its_job, True)
    forward_without_backward(dmp, batches(its_job, 4))
    alive = [dmp(one) for one in batches(its_job, 1)]
    with pytest.raises(PoolTooSmallError, match="forward passes whose backward has not run"):
        alive += [dmp(one) for one in batches(its_job)]


@pytest.mark.usefixtures("one_rank", "_no_collector")
def test_a_backward_that_never_ran_does_not_stand_in_the_way_of_another_pool_size() -> None:
    its_job = job(sequence=False)
    dmp = made(its_job, True)
    forward_without_backward(dmp, batches(its_job, 1))
    mtrains.resize(dmp, "t0", pool_rows=20)
    forward_without_backward(dmp, batches(its_job, 1))
    for group in mtrains.tiered_groups(dmp):
        group.forget()
    alive = dmp(batches(its_job, 1)[0])
    with pytest.raises(TicketError):
        mtrains.resize(dmp, "t0", pool_rows=30)
    del alive
