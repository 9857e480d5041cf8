"""A plan trains within what it charges in every tier, on a volume of exactly the charged size."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from torchrec_mtrains.planner.charges import PAGE_BYTES, volume_bytes

from plan_memory import taken_by_a_plan
from planner_cases import Case, TableCase
from strategies import PMEM


def test_a_plan_that_runs_stays_within_what_it_charges_in_every_tier() -> None:
    """Every row of four tables trained twice: in memory one, above the SSD three, with a PmemCache where the plan has one. Memory within a
    MiB: what modules and a second group take besides is 0.4 to 0.9, the volume's buffers left out."""
    case = Case([TableCase(150_000, 16), TableCase(150_000, 32), TableCase(100_000, 8), TableCase(20_000, 16)], batch_size=1000)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as disk, tempfile.TemporaryDirectory(dir=PMEM) as pmem:
        Path(f"{disk}/ssd_other").mkdir()
        for folder in ("", "_warm"):
            Path(f"{disk}/ssd{folder}").mkdir()
            Path(f"{pmem}/pmem{folder}").mkdir()
        rows, (ddr, tmpfs), ssd = taken_by_a_plan(case, 16 << 20, 12 << 20, f"{disk}/ssd", f"{pmem}/pmem")
    kernels = Counter(row["kernel"] for row in rows)
    assert kernels["customized_kernel"] >= 2
    charged = {tier: sum(row[f"{tier}_bytes"] for row in rows) for tier in ("ddr", "pmem", "ssd")}
    assert charged["pmem"] > 0
    assert charged["ddr"] <= 16 << 20
    assert 0.9 * charged["ddr"] < ddr <= charged["ddr"] + (1 << 20)
    assert 0.95 * charged["pmem"] < tmpfs <= charged["pmem"] + (64 << 10)
    assert 0.8 * charged["ssd"] < ssd <= charged["ssd"] + volume_bytes({PAGE_BYTES}, keep=0)
