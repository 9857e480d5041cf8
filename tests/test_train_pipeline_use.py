"""``TieredTrainPipeline`` as users drive it: the end of the data, errors, other models, collections and forwards, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import jobs
import torchrec_mtrains as mtrains
from dmp_twins import Job, Table, collection, plan
from pipelines import CPU, Batch, Twins, as_matrix, assert_all_equal, dense_optimizer, until_the_end
from test_collections import with_managed_collisions, with_weights_by_position
from torchrec_mtrains.batch_bytes import batch_bytes
from torchrec_mtrains.errors import ConfigurationError, PoolTooSmallError

pytestmark = pytest.mark.usefixtures("one_rank")

JOB = Job(
    [Table(60, 8, ["a"], 30), Table(40, 8, ["b"], 30, sharding="row_wise"), Table(20, 8, ["c"], 1, tiered=False)],
    optimizer=EmbOptimType.EXACT_ADAGRAD,
)
STEPS = 12


def pipeline_over(twins: Twins, dmp: DistributedModelParallel, **options: int) -> mtrains.TieredTrainPipeline:
    return mtrains.TieredTrainPipeline(dmp, twins.optimizer(dmp), CPU, **{"prefetch_depth": 2, "lookahead": 0, **options})


@pytest.fixture
def twins() -> Twins:
    return Twins(JOB, steps=STEPS)


@pytest.fixture
def expected(twins: Twins) -> list[torch.Tensor]:
    return twins.train_plainly(twins.model(False))


def test_rows_of_as_many_batches_as_said_are_fetched_ahead(twins: Twins) -> None:
    for depth in (0, 1, 3):
        dmp = twins.model(True)
        pipeline = pipeline_over(twins, dmp, prefetch_depth=depth)
        pipeline.progress(data := iter(twins.batches))
        assert {g._pool.outstanding for g in mtrains.tiered_groups(dmp)} == {depth}
        assert len(list(data)) == STEPS - 1 - depth - 1, "one more is in transit"


def test_all_batches_in_flight_train_before_the_end_and_another_iterator_goes_on(twins: Twins, expected: list[torch.Tensor]) -> None:
    pipeline = pipeline_over(twins, twins.model(True))
    data = iter(twins.batches)
    first = until_the_end(pipeline, islice(data, 5))
    assert len(first) == pipeline.trained_batches == 5
    with pytest.raises(StopIteration):
        pipeline.progress(iter([]))
    assert_all_equal(first + until_the_end(pipeline, data), expected)


def test_an_iterator_may_be_replaced_while_batches_are_in_flight(twins: Twins, expected: list[torch.Tensor]) -> None:
    pipeline, seen = pipeline_over(twins, twins.model(True)), []
    one, taken = iter(twins.batches), []
    data = (taken.append(b) or b for b in one)
    seen += [pipeline.progress(data) for _ in range(3)]
    assert len(taken) > 3
    assert_all_equal(seen + until_the_end(pipeline, one), expected)


def test_reset_forgets_batches_in_flight(twins: Twins, expected: list[torch.Tensor]) -> None:
    dmp = twins.model(True)
    pipeline, data = pipeline_over(twins, dmp), iter(twins.batches)
    seen = [pipeline.progress(data) for _ in range(4)]
    pipeline.reset()
    assert not any(g._pool.outstanding for g in mtrains.tiered_groups(dmp))
    assert_all_equal(seen + until_the_end(pipeline, iter(twins.batches[4:])), expected)


def test_an_iterator_that_fails_loses_no_batch(twins: Twins, expected: list[torch.Tensor]) -> None:
    pipeline, data = pipeline_over(twins, twins.model(True)), iter(twins.batches)

    def failing() -> Iterator[Batch]:
        yield from islice(data, 6)
        raise OSError("no more of this file")

    bad, seen = failing(), []
    with pytest.raises(OSError, match="no more of this file"):
        until_the_end(pipeline, bad, seen)
    assert len(seen) < 6
    assert_all_equal(seen + until_the_end(pipeline, data), expected)


def test_a_step_that_found_no_room_runs_again_once_the_pool_is_larger(twins: Twins, expected: list[torch.Tensor]) -> None:
    small = Twins(Job([Table(60, 8, ["a"], 2), *JOB.tables[1:]], optimizer=JOB.optimizer), steps=STEPS)
    dmp = small.model(True)
    pipeline, data, seen = pipeline_over(small, dmp), iter(small.batches), []
    with pytest.raises(PoolTooSmallError):
        until_the_end(pipeline, data, seen)
    mtrains.resize(dmp, "t0", pool_rows=30)
    assert_all_equal(seen + until_the_end(pipeline, data), expected)


def test_another_model_goes_on_with_the_batches_in_flight(twins: Twins, expected: list[torch.Tensor]) -> None:
    first, second = twins.model(True), twins.model(True)
    pipeline, data = pipeline_over(twins, first), iter(twins.batches)
    seen = [pipeline.progress(data) for _ in range(4)]
    pipeline.detach()
    second.load_state_dict(first.state_dict())
    second.fused_optimizer.load_state_dict(first.fused_optimizer.state_dict())
    pipeline.attach(second)
    pipeline._optimizer = twins.optimizer(second)
    assert_all_equal(seen + until_the_end(pipeline, data), expected)


def test_a_forward_of_the_users_own_is_called(twins: Twins) -> None:
    dmp, called = twins.model(True), []

    def forward(one: Batch) -> tuple[torch.Tensor, str]:
        called.append(one)
        return dmp(one)[0], f"batch {len(called)}"

    pipeline = mtrains.TieredTrainPipeline(dmp, twins.optimizer(dmp), CPU, lookahead=0, custom_model_fwd=forward)
    assert until_the_end(pipeline, iter(twins.batches)) == [f"batch {i + 1}" for i in range(STEPS)]
    plain = twins.model(False)
    twins.train_plainly(plain)
    twins.assert_same(dmp, plain)


@dataclass
class Tracked(Batch):
    """Knows how many of its kind have been copied to the device."""

    copied: list[int]

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        self.copied.append(1)
        return super().to(device, non_blocking)


def test_a_batch_stays_on_the_host_until_the_step_before_its_turn(twins: Twins) -> None:
    copied: list[int] = []
    data = (Tracked(b.ids, b.label, copied) for b in twins.batches)
    pipeline = pipeline_over(twins, twins.model(True), prefetch_depth=4)
    for step in range(STEPS):
        pipeline.progress(data)
        assert len(copied) == min(step + 2, STEPS)


class Hashed(nn.Module):
    """Makes the ids of the tables from those of the data."""

    def forward(self, ids: KeyedJaggedTensor) -> KeyedJaggedTensor:
        return KeyedJaggedTensor(ids.keys(), (ids.values() * 7 + 3) % 20, lengths=ids.lengths())


class OneCollection(nn.Module):
    """A linear layer over any collection, fed through ``before``."""

    def __init__(self, collection: nn.Module, width: int, before: nn.Module | None = None) -> None:
        super().__init__()
        self.tables, self.over, self.before = collection, nn.Linear(width, 1), before
        torch.manual_seed(2)
        nn.init.uniform_(self.over.weight)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        ids = batch.ids if self.before is None else self.before(batch.ids)
        predictions = torch.tanh(self.over(torch.tanh(values_of(self.tables(ids))))).squeeze(1)
        return nn.functional.mse_loss(predictions, batch.label.mean() + torch.zeros_like(predictions)), predictions.detach()


def values_of(output: object) -> torch.Tensor:
    """What the tables say; managed collisions say the ids too."""
    return as_matrix(output[0] if isinstance(output, tuple) else output)


torch.fx.wrap("values_of")


@pytest.mark.parametrize("kind", ["made by a module before the tables", "weighted by position", "managed"])
def test_ids_and_weights_that_modules_make_train_as_in_a_plain_loop(kind: str, twins: Twins) -> None:
    managed = kind == "managed"
    sharding = "row_wise" if managed else "table_wise"
    job = Job(
        [Table(60, 8, ["a"], 12, sharding=sharding), Table(40, 8, ["b"], 12, sharding=sharding)], max_length=2, weighted="weighted" in kind
    )
    data, seen, pipelines = Twins(job, steps=STEPS).batches, [], []
    for piped in (True, False):
        torch.manual_seed(3)
        if kind == "weighted by position":
            made = with_weights_by_position(job)
        elif managed:
            made = with_managed_collisions(job)
        else:
            made = collection(job)
        dmp = DistributedModelParallel(
            OneCollection(made, 16, Hashed() if "before" in kind else None),
            device=CPU,
            plan=ShardingPlan({"tables": plan(job, True).plan[""]}),
            sharders=mtrains.sharders(job.fused_params()),
        )
        optimizer = Twins.optimizer(twins, dmp)
        torch.manual_seed(4)  # managed collisions draw new values of rows
        if piped:
            pipelines.append(mtrains.TieredTrainPipeline(dmp, optimizer, CPU, lookahead=0))
            seen.append(until_the_end(pipelines[0], iter(data)))
            assert len(pipelines[0]._pipelined_modules) == 1
        else:
            seen.append([])
            for one in data:
                optimizer.zero_grad()
                loss, predictions = dmp(one)
                loss.backward()
                optimizer.step()
                seen[1].append(predictions)
    assert_all_equal(*seen)


def test_depths_and_windows_that_cannot_be_are_refused(twins: Twins) -> None:
    dmp = twins.model(True)
    for wrong in ({"prefetch_depth": -1}, {"prefetch_depth": 17}, {"lookahead": -1}, {"lookahead": 65}, {"lookahead_bytes": -1}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            pipeline_over(twins, dmp, **wrong)


def test_the_bytes_of_a_batch_are_those_of_its_tensors_each_once() -> None:
    ids = KeyedJaggedTensor(["a"], torch.arange(10), lengths=torch.tensor([4, 6], dtype=torch.int32))
    assert batch_bytes(Batch(ids, torch.zeros(2))) == 80 + 8 + 8
    assert batch_bytes(Batch(ids, torch.zeros(2)), ids, [ids, {"more": torch.zeros(3)}]) == 80 + 8 + 8 + 12


class StoppedError(Exception):
    """Stops a job between two steps."""


def test_a_job_stopped_with_batches_in_flight_resumes_with_those_that_its_checkpoint_has_not(tmp_path: Path) -> None:
    whole = jobs.run(jobs.options(None)).losses
    ssd, checkpoint = tmp_path / "ssd", tmp_path / "checkpoint"
    ssd.mkdir()
    losses: dict[int, float] = {}

    def stop_at_17(step: object) -> None:
        losses[step.number] = step.loss
        if step.number == 17:
            raise StoppedError

    with pytest.raises(StoppedError):
        jobs.run(jobs.options(ssd, checkpoint=str(checkpoint), checkpoint_every=7, prefetch_depth=3), stop_at_17)
    done = jobs.run(jobs.options(ssd, checkpoint=str(checkpoint), resume=True))
    assert done.first_step == 14
    losses |= {step.number: step.loss for step in done.steps}
    assert [losses[i + 1] for i in range(jobs.STEPS)] == whole


def test_a_checkpoint_between_steps_has_the_trained_batches_alone(twins: Twins, expected: list[torch.Tensor], tmp_path: Path) -> None:
    home = mtrains.SsdHome(paths=(str(tmp_path),), capacity_bytes=64 << 20)
    dmp = twins.model(True, [home])
    dense = dense_optimizer(dmp)
    pipeline, data = mtrains.TieredTrainPipeline(dmp, twins.optimizer(dmp), CPU, prefetch_depth=3, lookahead=0), iter(twins.batches)
    seen = [pipeline.progress(data) for _ in range(5)]
    mtrains.save_checkpoint(dmp, tmp_path / "checkpoint", step=pipeline.trained_batches, dense_optimizer=dense)
    beyond = [pipeline.progress(data) for _ in range(4)]
    pipeline.reset()
    step = mtrains.load_checkpoint(dmp, tmp_path / "checkpoint", dense_optimizer=dense).step
    assert step == 5
    assert_all_equal(seen + until_the_end(pipeline, iter(twins.batches[step:])), expected)
    assert_all_equal(seen + beyond, expected[:9])
