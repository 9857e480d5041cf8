"""The command line: what it prints, and one clear message with exit code 2 for every bad input."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from torchrec_mtrains.cli import main
from torchrec_mtrains.errors import ConfigurationError
from torchrec_mtrains.sizes import parse_bytes, show_bytes

SMALL = ["--data", "synthetic", "--tables", "2", "--rows", "300", "--pooling", "2", "--batch-size", "8", "--embedding-dim", "8"]
SMALL += ["--dense-layers", "8", "--over-layers", "8"]
POOLS = ["--pool-rows", "20", "--ssd-capacity", "256MiB"]


def run(*arguments: object) -> Result:
    torch.set_num_threads(1)
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(*arguments: object) -> str:
    """The message of a command that must fail with exit code 2 and no traceback."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture
def ssd(tmp_path) -> Path:
    folder = tmp_path / "ssd"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("command", [[], ["train"], ["plan"], ["profile"], ["demo"]])
def test_every_command_has_help(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_train_prints_plan_tiers_and_result_and_writes_the_report(ssd, tmp_path):
    report = tmp_path / "new" / "report.html"
    result = run("train", *SMALL, *POOLS, "--ssd", ssd, "--steps", 12, "--report", report)
    assert result.exit_code == 0, result.output
    for part in (
        "plan",
        "tiered",
        "tiers (this rank)",
        "ddr (slot pools)",
        "ssd (",
        "trained 12 steps",
        "held out",
        "AUC",
        "peak",
    ):
        assert part in result.output
    page = report.read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "<script" not in page
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)  # pictures may have any letters


def test_two_ssd_folders_are_striped(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    result = run("train", *SMALL, *POOLS, "--ssd", folders[0], "--ssd", folders[1], "--steps", 3)
    assert result.exit_code == 0, result.output
    assert all((folder / "rank_0").is_dir() for folder in folders)


def test_plan_and_plan_only_print_the_same_plan_and_touch_no_ssd(ssd):
    options = [*SMALL, "--ssd", ssd, "--ddr-budget", "64MiB"]
    printed = [run("plan", *options), run("train", *options, "--plan-only")]
    assert [r.exit_code for r in printed] == [0, 0]
    assert printed[0].output == printed[1].output
    assert "t1" in printed[0].output
    assert list(ssd.iterdir()) == []


def test_plan_says_what_is_in_the_memory_of_gpus_on_a_machine_without_one(ssd):
    options = ["--data", "synthetic", "--tables", "2", "--rows", "200000", "--batch-size", "8", "--device", "cuda"]
    result = run("plan", *options, "--ddr-budget", "64MiB", "--hbm-budget", "8MiB", "--ssd", ssd)
    assert result.exit_code == 0, result.output
    assert "8 MiB" in result.output
    assert "on the SSD" in " ".join(result.output.split()) or "in DDR" in " ".join(result.output.split())
    assert "--device cuda and --hbm-budget" in refused("plan", *options, "--ddr-budget", "64MiB", "--ssd", ssd)
    assert "--hbm-budget goes with --ddr-budget" in refused("plan", *options, "--hbm-budget", "8MiB", "--ssd", ssd)


def test_a_stopped_job_resumes(ssd, tmp_path):
    options = [*SMALL, *POOLS, "--ssd", ssd, "--checkpoint", tmp_path / "c", "--checkpoint-every", 2]
    assert run("train", *options, "--steps", 5).exit_code == 0
    result = run("train", *options, "--steps", 8, "--resume")
    assert result.exit_code == 0, result.output
    assert "trained 3 steps" in result.output
    assert "checkpoints: 2, 0 of them because a volume was short of room" in result.output
    again = run("train", *options, "--steps", 8, "--resume")
    assert "nothing left to train: 8 steps were trained before" in again.output


def test_an_unknown_option_is_an_error(ssd):
    assert "No such option '--sdd'" in refused("train", *SMALL, *POOLS, "--sdd", ssd)


def test_a_missing_ssd_path_is_named(tmp_path):
    assert f"SSD path '{tmp_path}/none' is not a folder" in refused(
        "train", *SMALL, *POOLS, "--ssd", tmp_path / "none", "--steps", 2
    )  # fmt: skip


def test_an_ssd_path_that_cannot_be_written_is_named(ssd):
    ssd.chmod(0o500)
    command = [sys.executable, "-m", "torchrec_mtrains.cli", "train", *SMALL, *POOLS, "--ssd", str(ssd), "--steps", "2"]
    if os.geteuid() == 0:  # root may write anywhere; /proc refuses even root
        command[command.index(str(ssd))] = "/proc"
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"})
    assert done.returncode == 2
    assert "cannot create rank_0/ in it" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["train", *SMALL, "--in-memory", "--steps", "2"], "--report"),
        (["train", *SMALL, "--in-memory", "--steps", "2"], "--checkpoint"),
        (["plan", *SMALL, "--in-memory"], "--picture"),
        (["profile", *SMALL[1:8], "--batches", "2"], "--output"),
        (["profile", *SMALL[1:8], "--batches", "2"], "--report"),
        (["calibrate", "--quick"], "--output"),
        (["demo", "--skip-movielens", "--steps", "1"], "--out"),
    ],
)
def test_a_place_for_results_that_cannot_be_written_is_refused_before_the_work(command, option, tmp_path):
    (tmp_path / "file").touch()
    result = run(*command, option, tmp_path / "file" / "new" / "result")
    assert result.exit_code == 2
    assert f"Error: {option} {tmp_path}/file/new/result: Not a directory; name a f" in " ".join(result.output.split())
    assert len(result.output.splitlines()) < 4, "nothing was planned, trained or measured before"


def test_a_store_of_another_shape_is_refused_and_kept(ssd, tmp_path):
    options = [*SMALL, *POOLS, "--ssd", ssd, "--checkpoint", tmp_path / "c"]
    assert run("train", *options, "--steps", 3).exit_code == 0
    wider = [*options, "--steps", 5, "--resume", "--embedding-dim", 16]
    assert "t0" in refused("train", *wider)
    assert run("train", *options, "--steps", 5, "--resume").exit_code == 0


def test_a_used_ssd_folder_is_not_overwritten_by_a_new_job(ssd, tmp_path):
    assert run("train", *SMALL, *POOLS, "--ssd", ssd, "--steps", 3, "--checkpoint", tmp_path / "c").exit_code == 0
    assert "of an earlier job" in refused("train", *SMALL, *POOLS, "--ssd", ssd, "--steps", 3)


def test_an_unsupported_optimizer_is_named(ssd):
    message = refused("train", *SMALL, *POOLS, "--ssd", ssd, "--steps", 2, "--optimizer", "adam")
    assert "optimizer 'adam' is not supported" in message
    assert "rowwise_adagrad" in message


def test_a_budget_too_small_says_by_how_much(ssd):
    assert "bytes" in refused("train", *SMALL, "--ssd", ssd, "--ddr-budget", "1KiB", "--steps", 2)


def test_a_pool_smaller_than_a_batch_is_refused(ssd):
    message = refused("train", *SMALL, "--ssd", ssd, "--pool-rows", 3, "--ssd-capacity", "256MiB", "--steps", 5)
    assert "pool" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say where the tables live"),
        (["--in-memory", "--ddr-budget", "1MiB"], "leave out"),
        (["--ssd", "."], "give either --ddr-budget BYTES, and the planner decides, or --pool-rows"),
        (["--ssd", ".", "--ddr-budget", "12 parsecs"], "a number of bytes looks like 64MiB"),
        (["--in-memory", "--resume"], "--resume needs --checkpoint"),
        (["--in-memory", "--checkpoint-every", "2"], "--checkpoint-every needs --checkpoint"),
        (["--in-memory", "--embedding-dim", "7"], "multiple of 4"),
        (["--in-memory", "--dense-layers", "8,x"], "layer widths look like"),
        (["--in-memory", "--calibration", "zipf"], "calibration must be"),
        (["--in-memory", "--data", "criteo"], "--data must be synthetic, movielens:PATH or criteo:PATH"),
        (["--in-memory", "--data", "movielens:/nowhere"], "no such file"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(arguments, message):
    assert message in refused("train", *SMALL, "--steps", 2, *arguments)


def test_endless_data_needs_steps():
    assert "say how many steps" in refused("train", *SMALL, "--in-memory")


def test_malformed_data_names_its_line(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("0\t1\n" * 200)
    assert "line 1: expected 40" in refused("train", "--in-memory", "--data", f"criteo:{path}", "--batch-size", 4, "--rows", 100)


@pytest.mark.parametrize(("text", "count"), [("64MiB", 64 << 20), ("1.5 GB", 1_500_000_000), ("4096", 4096), ("2kib", 2048)])
def test_byte_counts_are_read_as_people_write_them(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "MiB", "-1MiB", "1XB", "0", "1e3", "0.1B"])
def test_other_byte_counts_are_refused(text):
    with pytest.raises(ConfigurationError, match="64MiB"):
        parse_bytes(text)


def test_byte_counts_are_shown_in_three_digits():
    shown = [show_bytes(n) for n in (0, 999, 1024, 64 << 20, 1023 << 20, 3 << 40)]
    assert shown == [
        "0 B",
        "999 B",
        "1 KiB",
        "64 MiB",
        "1023 MiB",
        "3 TiB",
    ]
