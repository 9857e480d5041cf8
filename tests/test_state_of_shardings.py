"""State moves between tiered and FUSED tables through checkpoints, from any sharding to any, in both forms that TorchRec has."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec_mtrains.kernels import lazy_rows, sharded_state

import torchrec_mtrains as mtrains
from dmp_twins import SEQUENCE_SHARDINGS, SHARDINGS, Job, Table, assert_same_state, batch, in_order, jobs, local_blocks, one_folder, sharded
from ranks import Ranks
from torchrec_mtrains.errors import UnsupportedError, VolumeIoError

RELAXED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


@st.composite
def moves(draw: st.DrawFn, world_size: int) -> tuple[Job, Job]:
    """A job, and the same tables as they are to be loaded: other shardings, other ranks, another form of state."""
    job = draw(jobs(world_size))
    job.variable, job.output_dtensor = False, draw(st.booleans())
    other = copy.deepcopy(job)
    other.output_dtensor = draw(st.booleans())
    for table in other.tables:
        table.rank = draw(st.integers(0, world_size - 1))
        sharding = draw(st.sampled_from(SEQUENCE_SHARDINGS if job.sequence else SHARDINGS))
        # Row-wise Adagrad has a value for each row and shard of columns: TorchRec has no other place for it.
        if job.optimizer is not EmbOptimType.EXACT_ROWWISE_ADAGRAD or not {"column", "grid"} & {
            word for name in (sharding, table.sharding) for word in name.split("_")
        }:
            table.sharding = sharding
    return job, other


def train(dmp: DistributedModelParallel, job: Job, seed: int) -> torch.Tensor:
    """A few steps; the last output."""
    generator = torch.Generator().manual_seed(seed + dist.get_rank())
    output = torch.empty(0)
    for _ in range(4):
        output = in_order(dmp(batch(job, generator)))
        output.sum().backward()
    return output.detach()


def state(dmp: DistributedModelParallel) -> dict[str, object]:
    """All that a checkpoint holds. DCP cannot load an empty dict: what a rank without tables has, and SGD."""
    optimizer = dmp.fused_optimizer.state_dict()
    return {"model": dmp.state_dict(), **({"optimizer": optimizer} if any(optimizer["state"].values()) else {})}


def whole(dmp: DistributedModelParallel) -> dict[str, torch.Tensor]:
    """Every table and state, gathered."""
    tensors = dict(dmp.state_dict())
    for states in dmp.fused_optimizer.state_dict()["state"].values():
        tensors |= states
    everyone: list[dict[str, object]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, {key: (tuple(t.size()), local_blocks(t)) for key, t in tensors.items()})
    result: dict[str, torch.Tensor] = {}
    for key, (size, blocks) in ((k, v) for rank in everyone for k, v in rank.items()):
        result.setdefault(key, torch.full(size, torch.nan))
        for offsets, values in blocks:
            result[key][tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))] = values.float()
    assert not any(t.isnan().any() for t in result.values())
    return result


def exchange(job: Job, other: Job, to_fused: bool) -> None:
    """Saves one side, loads the other under another plan."""
    small_blocks = mock.patch.object(sharded_state, "SHARD_BYTES", 200)  # so that every table has many
    with small_blocks, tempfile.TemporaryDirectory(dir=Path.cwd()) as mine, one_folder(mine) as folder:
        if dist.get_world_size() > 1:  # TorchRec's fail as DTensors on ranks without them
            for of_side, tiered in ((job, to_fused), (other, not to_fused)):
                of_side.output_dtensor &= tiered and all(t.tiered for t in of_side.tables)
        source, target = sharded(job, to_fused), sharded(other, not to_fused)
        train(source, job, seed=1)
        dcp.save(state(source), checkpoint_id=folder)
        loaded = state(target)
        dcp.load(loaded, checkpoint_id=folder)
        target.load_state_dict(loaded["model"])
        if "optimizer" in loaded:
            target.fused_optimizer.load_state_dict(loaded["optimizer"])
        a, b = whole(source), whole(target)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key
        if job.tables == other.tables:
            assert_same_state(source, target)
            assert torch.equal(train(source, job, seed=2), train(target, other, seed=2))
            assert_same_state(source, target)


def save_while_training(job: Job, other: Job) -> None:
    """What is trained after ``async_save`` returned is not in the checkpoint."""
    small_blocks = mock.patch.object(sharded_state, "SHARD_BYTES", 200)
    with small_blocks, tempfile.TemporaryDirectory(dir=Path.cwd()) as mine, one_folder(mine) as folder:
        source, target = sharded(job, True), sharded(other, True)
        train(source, job, seed=1)
        saved = whole(source)
        future = dcp.async_save(state(source), checkpoint_id=folder, async_stager=mtrains.TieredStager(folder))
        train(source, job, seed=2)
        future.result()
        loaded = state(target)
        dcp.load(loaded, checkpoint_id=folder)
        target.load_state_dict(loaded["model"])
        if "optimizer" in loaded:
            target.fused_optimizer.load_state_dict(loaded["optimizer"])
        values = whole(target)
        for key in saved:
            assert torch.equal(saved[key], values[key]), key


@settings(max_examples=20, deadline=None, suppress_health_check=RELAXED)
@given(moves(world_size=1))
def test_async_save_saves_what_was_there_when_it_was_called(one_rank: None, move: tuple[Job, Job]) -> None:
    save_while_training(*move)


def test_staging_without_room_or_folder_is_a_typed_error(one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dmp = sharded(Job([Table(100, 8, ["a"], 6)]), True)
    with pytest.raises(VolumeIoError, match=r"cannot be staged in .*missing.*No such file"):
        mtrains.TieredStager(tmp_path / "missing").stage(dmp.state_dict())
    monkeypatch.setattr(lazy_rows, "READ_BYTES", 0)  # a larger table
    with pytest.raises(UnsupportedError, match=r"async_stager=mtrains.TieredStager\(folder\)"):
        dmp.state_dict()["embedding_bags.t0.weight"].local_shards()[0].tensor.new_empty([])


@settings(max_examples=40, deadline=None, suppress_health_check=RELAXED)
@given(moves(world_size=1), st.booleans(), st.booleans())
def test_state_moves_between_tiered_and_fused_tables(one_rank: None, move: tuple[Job, Job], to_fused: bool, same_plan: bool) -> None:
    exchange(move[0], copy.deepcopy(move[0]) if same_plan else move[1], to_fused)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Ranks]:
    ranks = Ranks(4, local_world_size=2)
    yield ranks
    ranks.close()


@settings(max_examples=10, deadline=None, suppress_health_check=RELAXED, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(moves(world_size=4), st.booleans(), st.booleans())
def test_state_moves_between_ranks_and_nodes(two_nodes: Ranks, move: tuple[Job, Job], to_fused: bool, same_plan: bool) -> None:
    two_nodes.run(exchange, move[0], copy.deepcopy(move[0]) if same_plan else move[1], to_fused)
