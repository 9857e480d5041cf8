"""The benchmarks run, at tiny sizes, so that they do not rot; what they compute is checked, how fast it was is not."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import _store_packing  # noqa: E402
import _store_writes  # noqa: E402
import _subjects  # noqa: E402
from _common import Figure, ZipfIds  # noqa: E402
from _multi_ranks import Ranks  # noqa: E402


def run(script: str, folder: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--json", str(folder / "figures.json"), *more]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}  # scripts import what lies beside them
    done = subprocess.run(command, env=environment, cwd=Path.cwd(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "figures.json").read_text())


NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WITH_TESTS_OF_THEIR_OWN = ("planner.py", "store.py", "train.py")
OTHERS = sorted(p.name for p in BENCHMARKS.glob("[!_]*.py") if p.name not in WITH_TESTS_OF_THEIR_OWN)


@pytest.mark.parametrize("script", [pytest.param(s, marks=NEEDS_A_GPU if s == "gpu.py" else ()) for s in OTHERS])
def test_a_benchmark_runs_small_and_writes_its_figures(script: str, tmp_path: Path) -> None:
    report = run(script, tmp_path)
    assert report["machine"]["cores"] > 0
    assert report["figures"]


def test_the_store_benchmark_reports_every_section_and_draws_it(tmp_path: Path) -> None:
    report = run("store.py", tmp_path, "--picture", str(tmp_path / "store.png"))
    sections = report["figures"]["sections"]
    assert set(sections) == {"reads", "packing", "mixed", "writes", "checkpoints", "open", "memory"}
    assert (tmp_path / "store.png").read_bytes().startswith(b"\x89PNG")
    assert all(math.isfinite(f["value"]) for f in report["figures"]["figures"].values())

    assert 1 <= sections["reads"]["rows_per_io"] < 3
    for kind, packing in sections["packing"]["traces"].items():
        assert packing["ahead"]["rows_per_io"] >= 1
        if kind == "co-accessed":  # a group that begins anywhere in a block of 14 lies in 1.5 of them
            assert packing["at_most"] / 1.8 < packing["rows_per_io"] < packing["at_most"]
    assert sections["reads"]["subjects"]["ceiling"]["device_bytes_per_row"] == 4096
    assert all(count > 0 for count in sections["mixed"]["cleaned_segments"].values())
    for state in sections["writes"]["steady_state"]:
        assert 0.98 < state["process_over_own"] < 1.05  # the store's own count of what it wrote is the kernel's
    amplification = {(s["stream"], s["fill"]): s["write_amplification"] for s in sections["writes"]["steady_state"]}
    assert amplification["evictions", 0.7] < amplification["evictions", 0.85]
    assert amplification["raw", 0.7] < amplification["raw", 0.85]
    epochs = sections["checkpoints"]["epoch_bytes"]
    assert 0 < epochs["hundredth_bytes"] < epochs["all_rows_bytes"] / 10
    assert 12 < sections["memory"]["bytes_per_row"] < 100  # index and directory are 12


def _rank(rank: int) -> int:
    return rank


def _stands_still(rank: int) -> None:
    threading.Event().wait(60 if rank else 0)


def test_ranks_that_take_too_long_say_where_they_stand(capfd: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks(2)
    try:
        assert ranks.run(2, _rank, within_s=120) == [0, 1]
        assert ranks.run(1, _rank, within_s=120) == [0]
        with pytest.raises(SystemExit, match="_stands_still on 2 ranks took longer than 3 s"):
            ranks.run(2, _stands_still, within_s=3)
    finally:
        ranks.kill()
    assert "in _stands_still" in capfd.readouterr().err


@given(fill=st.floats(0.05, 0.95))
def test_the_planned_write_amplification_solves_its_equation(fill: float) -> None:
    amplification = _store_writes.uniform_write_amplification(fill)
    share = 1 - 1 / amplification
    assert (share - 1) / math.log(share) == pytest.approx(fill, abs=1e-6)


def test_capacity_is_rows_over_fill() -> None:
    stride, records_per_block = 288, 4096 // 288
    blocks = 140_000 / records_per_block
    assert stride * records_per_block <= 4096
    assert _store_writes.capacity_for(140_000, 260, 0.7) == pytest.approx(blocks * 4096 / 0.7, rel=1e-6)


def test_announced_batches_bring_more_rows_an_io(tmp_path: Path) -> None:
    rows, found = 4000, {}
    every = rows + _store_packing.APART * int(rows * _store_writes.POOL_SHARE)
    for way in (_store_packing.through_the_pool, _store_packing.with_lookahead):
        volume = _store_writes.filled(tmp_path / way.__name__, every, 260, 64 << 20)
        found[way.__name__] = way(volume, _store_packing.Trace("independent", rows, 200), 260, 60)
        volume.close()
    assert found["with_lookahead"]["rows_per_io"] > 1.5 * found["through_the_pool"]["rows_per_io"]
    assert found["with_lookahead"]["ios_per_batch"] < found["through_the_pool"]["ios_per_batch"]


def test_zipf_ids_are_drawn_by_rank() -> None:
    zipf = ZipfIds(1000, 1.0, torch.Generator().manual_seed(0))
    drawn = torch.bincount(zipf.draw(200_000), minlength=1000)[zipf.row_of_rank].double() / 200_000
    expected = 1 / torch.arange(1, 1001, dtype=torch.float64)
    expected /= expected.sum()
    assert torch.allclose(drawn[:10], expected[:10], rtol=0.1)
    assert drawn[500:].sum() == pytest.approx(expected[500:].sum().item(), rel=0.1)


def test_a_goal_is_met_on_its_own_side() -> None:
    assert Figure("a", 2.0, "≥ 2").met
    assert Figure("a", 2.0, "≤ 2").met
    assert Figure("a", 1.9, "≥ 2").met is False
    assert Figure("a", 2.1, "≤ 2").met is False
    assert Figure("a", 2.1).met is None


@pytest.mark.parametrize("peer", [_subjects.RocksDb, _subjects.Lmdb, _subjects.Mapped, _subjects.Ssd])
def test_every_compared_store_holds_the_same_records(peer: Any, tmp_path: Path) -> None:
    store = peer(tmp_path / "store", 5000, 100)
    rows = torch.randperm(5000)[:700].numpy()
    for threads in (1, 3):
        store.on(threads)
        store.forget()
        assert (store.read(store.prepare(rows)) == _subjects.first_bytes(rows)).all()
    store.close()
