"""``benchmarks/planner.py``: it runs on real training, and what it predicts without misses is what its profile says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from test_benchmarks import run  # isort: skip (puts benchmarks/ on the path)

from torchrec_mtrains.planner import hardware_profiles

import _planner_placement
import _planner_predictions
from _device_reads import as_read, calibrated_reads, read_in_place
from _planner_jobs import Job, JobTable, MixedBatches, steady_ms
from torchrec_mtrains.calibration.block_device import write_noise


def test_the_planner_benchmark_predicts_what_it_trains_and_draws_it(tmp_path: Path) -> None:
    report = run("planner.py", tmp_path, "--pmem-path", str(tmp_path), "--picture", str(tmp_path / "planner.png"))["figures"]
    sections = report["sections"]
    assert set(sections) == {"predictions", "held_out", "placement", "curves", "statistics", "oracles", "scale", "contention"}
    assert all(math.isfinite(f["value"]) for f in report["figures"].values())
    assert (tmp_path / "planner.png").read_bytes().startswith(b"\x89PNG")

    lines = sections["predictions"]["lines"]
    assert len(lines) == 3
    for line in lines + sections["held_out"]["lines"]:
        assert line["predicted"]["step_ms"] >= line["dense_ms"] > 0
        assert line["measured"]["step_ms"] > 0
        assert 0 <= line["predicted"]["miss_ratio"] <= 1
    whole, cached = lines[1], lines[2]
    assert whole["measured"]["misses"] == whole["predicted"]["miss_ratio"] == 0
    assert lines[0]["measured"]["read_ios"] > cached["measured"]["read_ios"] > 0

    (placed,) = sections["placement"]["lines"]
    plans = placed["plans"]
    assert set(plans) == {"ours", "equal", "greedy", "uniform"}
    assert plans["ours"]["predicted_ms"] <= min(plan["predicted_ms"] for plan in plans.values())
    assert all(plan["misses"] > 0 for plan in plans.values())
    for oracle in sections["oracles"]:
        assert oracle["bound_ms"] <= oracle["best_ms"] * (1 + 1e-6)
        assert oracle["found_ms"] >= oracle["best_ms"] * (1 - 1e-6)
    (large,) = sections["scale"]
    assert large["ours"]["bound_ms"] <= large["ours"]["step_ms"]


def test_drawn_jobs_are_the_same_every_time_and_within_their_ranges() -> None:
    assert _planner_placement.drawn(_planner_placement.FULL) == _planner_placement.drawn(_planner_placement.FULL)
    fitted = {c.job for c in _planner_predictions.CONFIGURATIONS}
    for c in _planner_predictions.held_out(30):
        assert c.job not in fitted
        assert all(50_000 <= t.rows <= 1_000_000 and 1 <= t.pooling <= 10 for t in c.job.tables)
        assert all(pool + cache <= t.rows for t, pool, cache in zip(c.job.tables, c.pool_rows, c.cache_rows, strict=True))


def test_the_batches_of_a_mixed_job_have_each_tables_own_lookups() -> None:
    job = Job((JobTable(50, 1.0, 2), JobTable(80, 0.5, 5)), 16, 8)
    traces = job.traces(3)
    batch = next(MixedBatches(job.shape, traces).from_number(1))
    assert batch.sparse_features.lengths().view(2, 8).tolist() == [[2] * 8, [5] * 8]
    assert batch.sparse_features["f1"].values().tolist() == traces[1].ids[1].tolist()
    assert job.traces(3, stream=1)[0].ids.tolist() != traces[0].ids.tolist()


def test_steps_that_take_turns_are_measured_by_what_they_take_together() -> None:
    assert steady_ms([0.024, 0.182] * 10) == pytest.approx(103)
    assert steady_ms([0.01] * 16 + [0.5] + [0.01] * 3) == pytest.approx(10)
    assert steady_ms([0.01, 0.03]) == pytest.approx(20)


def test_a_device_is_read_in_place_and_its_calibration_scaled_by_that(tmp_path: Path) -> None:
    write_noise(tmp_path / "segment_00000001.log", 1 << 20)
    write_noise(tmp_path / "manifest_0000000000000001.bin", 1 << 20)
    found = read_in_place(tmp_path)
    assert found.reads_per_s > 0
    assert found.probes >= 3
    hardware = hardware_profiles()["optane"]
    twice = as_read(hardware, 2 * calibrated_reads(hardware))
    assert hardware.ssd is not None
    assert twice.ssd is not None
    for block, depth, share in ((4096, 128, 1.0), (65_536, 7, 0.5), (4096, 1, 0.0)):
        assert twice.ssd.operations_per_s(block, depth, share) == pytest.approx(2 * hardware.ssd.operations_per_s(block, depth, share))
    assert replace(twice, ssd=hardware.ssd) == hardware


def test_rounds_tell_plans_apart_where_few_of_them_disagree() -> None:
    told = _planner_placement.told_apart
    assert told([0.9] * 12 + [1.1] * 3)
    assert not told([0.9] * 11 + [1.1] * 4)
    assert told([0.9] * 3 + [1.1] * 12)
    assert not told([0.9] * 4 + [1.1]), "of five rounds nothing is told"
    assert not told([0.9] * 12 + [1.1] * 3, looks=3)
    assert told([0.9] * 13 + [1.1] * 2, looks=3)
