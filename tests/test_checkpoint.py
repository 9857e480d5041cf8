"""Checkpoints of a whole job: it resumes from the last committed one, and the same bits follow. Kills are tests/soak's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import jobs
import torchrec_mtrains as mtrains
from dmp_twins import Job, Table, batch, in_order, sharded
from ranks import RankFailureError, Ranks
from torchrec_mtrains import SsdHome
from torchrec_mtrains.checkpoint_folder import latest_step
from torchrec_mtrains.errors import ConfigurationError, VolumeIoError, VolumeMismatchError

WORLD_SIZE = 2


@pytest.fixture(scope="module")
def undisturbed() -> tuple[list[float], float | None]:
    """Losses and AUC of the job in memory, without checkpoints."""
    done = jobs.run(jobs.options(None))
    return done.losses, done.auc


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """An SSD folder and a checkpoint folder."""
    (tmp_path / "ssd").mkdir()
    return tmp_path / "ssd", tmp_path / "checkpoint"


def test_a_tiered_job_with_checkpoints_trains_as_one_in_memory_without(folders, undisturbed):
    ssd, checkpoint = folders
    done = jobs.run(jobs.options(ssd, checkpoint=str(checkpoint), checkpoint_every=7))
    assert (done.losses, done.auc) == undisturbed
    assert latest_step(checkpoint) == jobs.STEPS


def test_a_job_in_three_parts_trains_as_one(folders, undisturbed):
    ssd, checkpoint = folders
    losses: list[float] = []
    for steps in (9, 23, jobs.STEPS):
        done = jobs.run(jobs.options(ssd, steps=steps, checkpoint=str(checkpoint), resume=bool(losses)))
        assert done.first_step == len(losses)
        losses += done.losses
    assert (losses, done.auc) == undisturbed


def test_a_job_in_memory_resumes_too(folders, undisturbed):
    _, checkpoint = folders
    first = jobs.run(jobs.options(None, steps=13, checkpoint=str(checkpoint)))
    second = jobs.run(jobs.options(None, checkpoint=str(checkpoint), resume=True))
    assert (first.losses + second.losses, second.auc) == undisturbed


def test_a_new_job_neither_overwrites_nor_continues_an_earlier_one(folders):
    ssd, checkpoint = folders
    jobs.run(jobs.options(ssd, steps=5, checkpoint=str(checkpoint)))
    with pytest.raises(ConfigurationError, match="step 5 of an earlier job"):
        jobs.run(jobs.options(ssd, steps=9, checkpoint=str(checkpoint)))
    with pytest.raises(VolumeMismatchError, match=r"load_checkpoint\), or name another path"):
        jobs.run(jobs.options(ssd, steps=9, checkpoint=f"{checkpoint}_other"))
    assert jobs.run(jobs.options(ssd, steps=9, checkpoint=str(checkpoint), resume=True)).first_step == 5


def test_a_checkpoint_of_other_volumes_is_refused(folders, tmp_path):
    ssd, checkpoint = folders
    jobs.run(jobs.options(ssd, steps=5, checkpoint=str(checkpoint)))
    (tmp_path / "other").mkdir()
    with pytest.raises(VolumeMismatchError, match="name the same SSD paths"):
        jobs.run(jobs.options(tmp_path / "other", checkpoint=str(checkpoint), resume=True))
    with pytest.raises(VolumeMismatchError, match="name the same SSD paths"):
        jobs.run(jobs.options(None, checkpoint=str(checkpoint), resume=True))


def test_nothing_to_resume_from_is_an_error(folders):
    ssd, checkpoint = folders
    with pytest.raises(ConfigurationError, match="nothing to resume from"):
        jobs.run(jobs.options(ssd, checkpoint=str(checkpoint), resume=True))


def test_a_checkpoint_of_another_model_is_refused(folders):
    _, checkpoint = folders
    jobs.run(jobs.options(None, steps=5, checkpoint=str(checkpoint)))
    job = jobs.options(None, checkpoint=str(checkpoint), resume=True)
    object.__setattr__(job.model, "embedding_dim", 16)
    with pytest.raises(VolumeMismatchError, match="does not fit this model"):
        jobs.run(job)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(folders, undisturbed):
    ssd, checkpoint = folders
    jobs.run(jobs.options(ssd, steps=5, checkpoint=str(checkpoint)))
    obstacle = checkpoint / f"step_{12:012d}"
    obstacle.write_text("a file where a folder must go")
    with pytest.raises(VolumeIoError, match="make the folder"):
        jobs.run(jobs.options(ssd, steps=12, checkpoint=str(checkpoint), resume=True))
    assert latest_step(checkpoint) == 5
    obstacle.unlink()
    done = jobs.run(jobs.options(ssd, checkpoint=str(checkpoint), resume=True))
    assert (done.first_step, done.losses, done.auc) == (5, undisturbed[0][5:], undisturbed[1])


def test_two_checkpoints_are_kept(folders):
    ssd, checkpoint = folders
    jobs.run(jobs.options(ssd, steps=20, checkpoint=str(checkpoint), checkpoint_every=5))
    assert sorted(p.name for p in checkpoint.glob("step_*")) == ["step_000000000015", "step_000000000020"]


@pytest.fixture(scope="module")
def ranks():
    two = Ranks(WORLD_SIZE)
    yield two
    two.close()


def losses_of(job) -> tuple[int, list[float], float | None]:
    done = jobs.run(job)
    return done.first_step, done.losses, done.auc


def test_two_ranks_resume_with_the_same_bits(ranks, folders):
    ssd, checkpoint = folders
    whole = ranks.run(losses_of, jobs.options(None, steps=24))
    first = ranks.run(losses_of, jobs.options(ssd, steps=11, checkpoint=str(checkpoint)))
    second = ranks.run(losses_of, jobs.options(ssd, steps=24, checkpoint=str(checkpoint), resume=True))
    for rank in range(WORLD_SIZE):
        assert second[rank][0] == 11
        assert first[rank][1] + second[rank][1] == whole[rank][1]
        assert second[rank][2] == whole[rank][2]


def resumed_output(ssd: str, checkpoint: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank 0 has an SSD's table and rank 1 one in memory: what a batch looks up before and after going back."""
    job = Job([Table(40, 8, ["a"], 20), Table(30, 8, ["b"], 20, rank=1, tiered=False)], batch_size=3)
    dmp = sharded(job, True, SsdHome((ssd,), capacity_bytes=64 << 20))
    generator = torch.Generator().manual_seed(dist.get_rank())
    mtrains.save_checkpoint(dmp, checkpoint, step=1)
    same = batch(job, generator)
    before = in_order(dmp.module(same))
    before.sum().backward()
    mtrains.load_checkpoint(dmp, checkpoint)
    return before.detach(), in_order(dmp.module(same)).detach()


def test_ranks_without_a_table_in_memory_resume_beside_those_that_have_one(ranks, folders):
    for before, after in ranks.run(resumed_output, *map(str, folders)):
        assert torch.equal(before, after)


def test_one_ranks_failure_to_open_a_checkpoint_is_raised_on_all(ranks, folders):
    ssd, checkpoint = folders
    ranks.run(losses_of, jobs.options(ssd, steps=5, checkpoint=str(checkpoint)))
    shutil.rmtree(ssd / "rank_1")
    with pytest.raises(RankFailureError) as caught:
        ranks.run(losses_of, jobs.options(ssd, steps=9, checkpoint=str(checkpoint), resume=True))
    assert str(caught.value).count("name the same SSD paths") >= WORLD_SIZE


def test_a_checkpoint_of_two_ranks_is_refused_by_one(ranks, folders):
    _, checkpoint = folders
    ranks.run(losses_of, jobs.options(None, steps=5, checkpoint=str(checkpoint)))
    with pytest.raises(VolumeMismatchError, match="saved by 2 ranks"):
        jobs.run(jobs.options(None, checkpoint=str(checkpoint), resume=True))


def test_random_numbers_go_on_where_they_were(folders):
    _, checkpoint = folders
    torch.manual_seed(5)
    jobs.run(jobs.options(None, steps=5, checkpoint=str(checkpoint)))
    expected = torch.rand(3)
    torch.manual_seed(77)
    jobs.run(jobs.options(None, steps=5, checkpoint=str(checkpoint), resume=True))
    assert torch.equal(torch.rand(3), expected)
