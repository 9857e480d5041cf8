"""What ends one rank ends all of them, on two nodes, and each says which rank it was and why. A job that hangs fails its test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

import torchrec_mtrains as mtrains
from torchrec_mtrains.errors import ConfigurationError
from torchrec_mtrains.volume_files import locked
from torchrun import Ended, local_nodes, run

PROGRAM = Path(__file__).with_name("failing_rank.py")
FAILING = 2  # the store is on the other node
REASONS = {
    "id": "IdOutOfRangeError: ",
    "input": "ValueError: line 7 of the data has 3 fields, not 4",
    "full": "VolumeFullError: ",
}


@pytest.fixture
def ssd(tmp_path) -> Path:
    (tmp_path / "ssd").mkdir()
    return tmp_path / "ssd"


def last_words(job: Ended) -> dict[int, str]:
    """The last line of stderr of each rank of ``PROGRAM`` that is not gloo's or the interpreter's."""
    assert all(code not in (0, None) for code in job.codes), job
    said = {int(out.split()[1]): err.strip().splitlines() for out, err in zip(job.output, job.errors, strict=True)}
    assert sorted(said) == [0, 1, 2, 3], job
    return {rank: next((line for line in reversed(lines) if "ed: " in line or "Error: " in line), "") for rank, lines in said.items()}


@pytest.mark.parametrize("failure", ["id", *(pytest.param(f, marks=pytest.mark.slow) for f in ("input", "full"))])
def test_an_error_on_one_rank_ends_the_others_with_its_reason(tmp_path, ssd, failure):
    job = run(local_nodes(tmp_path, 2), 2, PROGRAM, failure, FAILING, ssd)
    said = last_words(job)
    assert REASONS[failure] in said.pop(FAILING), job
    for words in said.values():
        assert f"RankFailedError: rank {FAILING} (process " in words, job
        assert f"failed: {REASONS[failure]}" in words, job


def test_a_rank_that_is_killed_ends_the_others_which_name_it(tmp_path, ssd):
    job = run(local_nodes(tmp_path, 2), 2, PROGRAM, "kill", FAILING, ssd)
    said = last_words(job)
    assert said.pop(FAILING) == "", job
    for words in said.values():
        assert f"RankFailedError: rank {FAILING} did not answer" in words, job


@pytest.mark.slow
def test_a_rank_that_is_stuck_when_another_fails_is_ended_and_says_why(tmp_path, ssd):
    job = run(local_nodes(tmp_path, 2), 2, PROGRAM, "stuck", FAILING, ssd)
    said = last_words(job)
    assert REASONS["input"] in said.pop(0), job
    assert "does not end by itself and is ended: rank 0 (process" in said.pop(FAILING), job
    for words in said.values():
        assert "RankFailedError: rank 0 (process " in words, job


def test_the_command_line_names_the_rank_that_failed_on_every_rank(tmp_path, ssd):
    options = ["--data", "synthetic", "--rows", 300, "--tables", 2, "--batch-size", 8, "--embedding-dim", 8, "--threads", 1]
    options += ["--steps", 100_000, "--ssd", ssd, "--pool-rows", 100, "--ssd-capacity", "256MiB"]
    (ssd / "rank_1").mkdir()
    with locked(ssd / "rank_1"):
        job = run(local_nodes(tmp_path, 1), 2, "-m", "torchrec_mtrains.cli", "train", *options)
    said = sorted(err.strip().splitlines()[-1] for err in job.errors)
    assert len(said) == 2, job
    assert "Error: rank 1 (process" in said[0], job
    assert "failed: VolumeLockedError: the volume in" in said[0], job
    assert "Error: the volume in" in said[1], job


def test_outside_of_a_process_group_it_says_what_is_missing():
    assert not dist.is_initialized()
    with pytest.raises(ConfigurationError, match="init_process_group first"), mtrains.fail_together():
        pass
