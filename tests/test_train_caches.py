"""The main job with PMem caches: the same bits, also across a resume, and counted tier by tier."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import jobs
from strategies import PMEM
from torchrec_mtrains.cli import main
from torchrec_mtrains.report import page
from torchrec_mtrains.tier_table import tier_rows, written_row_bytes

TABLES = ["--data", "synthetic", "--tables", "2", "--pooling", "2", "--batch-size", "32", "--dense-layers", "8", "--over-layers", "8"]
LARGE = [*TABLES, "--rows", "300000", "--embedding-dim", "16", "--ddr-budget", "32MiB"]
SMALL = [*TABLES, "--rows", "300", "--embedding-dim", "8", "--pool-rows", "70"]


@pytest.fixture
def pmem() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=PMEM) as name:
        yield Path(name)


def run(*arguments: object) -> Result:
    torch.set_num_threads(1)
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_training_with_caches_is_bit_equal_to_training_in_memory_also_after_a_resume(tmp_path: Path, pmem: Path) -> None:
    ssd = tmp_path / "ssd"
    ssd.mkdir()
    in_memory = jobs.run(jobs.options(None))
    stopped = jobs.run(jobs.options(ssd, pmem, steps=17, checkpoint=str(tmp_path / "c"), checkpoint_every=5))
    resumed = jobs.run(jobs.options(ssd, pmem, checkpoint=str(tmp_path / "c"), resume=True))
    assert stopped.losses + resumed.losses == in_memory.losses
    assert (resumed.auc, resumed.held_out_loss) == (in_memory.auc, in_memory.held_out_loss)
    for done in (stopped, resumed):
        assert len(done.caches) == 3
        assert sum(cache["hits"] for cache in done.caches) > 50
        assert sum(cache["evictions"] for cache in done.caches) > 0


def test_a_job_resumes_without_the_caches_that_it_had_and_with_caches_that_it_had_not(tmp_path: Path, pmem: Path) -> None:
    ssd = tmp_path / "ssd"
    ssd.mkdir()
    losses = []
    for steps, device in ((10, pmem), (20, None), (40, pmem)):
        losses += jobs.run(jobs.options(ssd, device, steps=steps, checkpoint=str(tmp_path / "c"), resume=steps > 10)).losses
    assert losses == jobs.run(jobs.options(None)).losses


def test_what_misses_the_pool_comes_to_the_caches_and_what_misses_them_to_the_home(tmp_path: Path, pmem: Path) -> None:
    done = jobs.run(jobs.options(tmp_path, pmem))
    pool, cache, generated, ssd = tier_rows(done)
    assert cache.tier == "pmem (caches)"
    assert cache.lookups == pool.writes == pool.lookups - pool.hits + sum(t["refetched_rows"] for t in done.tables)
    assert cache.lookups - cache.hits == generated.lookups
    assert generated.lookups - generated.hits == ssd.lookups
    assert 0 < cache.hits < cache.lookups
    assert 0.9 * jobs.PMEM_BYTES - 3 * 4096 < cache.bytes <= jobs.PMEM_BYTES
    assert cache.rows == sum(row["cache_rows"] for row in done.plan)
    assert cache.reads == cache.hits
    assert cache.writes > 0
    held = sum(t["resident_rows"] for t in (*done.tables, *done.caches)) * done.tables[0]["record_bytes"]
    assert written_row_bytes(done) <= sum(v["get_rows_initial"] for v in done.volumes) * done.tables[0]["record_bytes"] - held
    assert "pmem (caches)" in page(done)
    assert "<th>cache rows</th>" in page(done)
    assert list(pmem.iterdir()) == []


def test_the_planner_gives_caches_to_tables_that_it_puts_on_the_ssd(tmp_path: Path, pmem: Path) -> None:
    options = [*LARGE, "--ssd", tmp_path, "--pmem", pmem, "--pmem-capacity", "16MiB"]
    planned = run("plan", *options)
    assert planned.exit_code == 0, planned.output
    assert "cache rows" in planned.output
    assert "pmem" in planned.output
    assert list(tmp_path.iterdir()) == list(pmem.iterdir()) == []
    trained = run("train", *options, "--steps", 3)
    assert trained.exit_code == 0, trained.output
    assert "pmem (caches)" in trained.output
    assert "cache rows" not in run("plan", *LARGE, "--ssd", tmp_path).output


def test_the_room_that_is_left_out_follows_from_the_checkpoints(tmp_path: Path) -> None:
    """Without --ssd-capacity no plan is refused for want of SSD, whatever checkpoints hold."""
    for schedule in ([], ["--checkpoint", tmp_path / "c"], ["--checkpoint", tmp_path / "c", "--checkpoint-every", 100_000]):
        result = run("plan", *LARGE, "--ssd", tmp_path, *schedule)
        assert result.exit_code == 0, result.output
    refused = run("plan", *LARGE, "--ssd", tmp_path, "--ssd-capacity", "80MiB", "--checkpoint", tmp_path / "c")
    assert refused.exit_code == 2
    assert "ssd is" in refused.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ssd", ".", "--pmem", "/dev/shm"], "--pmem PATH and --pmem-capacity BYTES go together"),
        (["--ssd", ".", "--pmem-capacity", "1MiB"], "--pmem PATH and --pmem-capacity BYTES go together"),
        (["--ssd", ".", "--pmem", "/dev/shm", "--pmem-capacity", "4KiB"], "--pmem-capacity 4 KiB is too small for 2 tables"),
        (["--ssd", ".", "--pmem", "/nowhere", "--pmem-capacity", "1MiB"], "cannot create a cache file in '/nowhere"),
    ],
)
def test_pmem_that_cannot_be_used_is_refused(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("train", *SMALL, "--steps", 2, *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "--pmem" in run("train", *TABLES, "--in-memory", "--steps", 2, "--pmem", ".", "--pmem-capacity", "1MiB").output
