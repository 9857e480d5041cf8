"""The benchmark of sampled curves: what it compares, and with what."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from torchrec_mtrains.kernels import _core

import _planner_curves
import _train_traces


def test_sampled_curves_are_compared_with_those_of_every_row() -> None:
    lines = _planner_curves.run(rows=120_000, lookups=4096, batches=60, movielens=None, copies=0, only=["zipf 0.9"])
    policies = [line["policy"] for line in lines if line["against"] == "every row"]
    assert policies == ["lookahead 0", "lookahead 8", "lookahead 64", "LRU"]
    for line in lines:
        assert line["sampled_share"] == pytest.approx(50 / 120)
        assert line["points"] >= 3
        assert 0 < line["mean_error"] <= 0.02
        assert line["mean_error"] == pytest.approx(np.mean([abs(a - b) for a, b in line["ratios"].values()]))
    figures = _planner_curves.figures(lines)
    assert len(figures) == 2 * len(lines)
    assert all(figure.met for figure in figures)


def test_every_row_sampled_has_no_error() -> None:
    for line in _planner_curves.run(
        rows=3000, lookups=300, batches=60, movielens=None, copies=0, sample_share=1.0, only=["zipf 1.05, drifting"]
    ):
        assert line["mean_error"] == pytest.approx(0, abs=1e-12)


def test_the_lru_curve_is_libcachesim_s() -> None:
    """Where it is installed (pip install libcachesim==0.3.5)."""
    pytest.importorskip("libcachesim", reason="libcachesim is not installed")
    trace = _train_traces.zipf_trace("zipf 1.05", 5000, 300, _train_traces.Stretch(0, 100, 0), 0)
    uses = _planner_curves.uses_of(trace)
    sizes = [400, 1000, 3000]
    profiler = _core.TableProfiler(5000, 5000, 0, sizes, [0], 0, 10)
    for ids in trace.ids[:50]:
        profiler.push(ids)
    before = profiler.lru_misses()
    for ids in trace.ids[50:]:
        profiler.push(ids)
    counted = (np.array(profiler.lru_misses()) - before) / 50
    assert counted.tolist() == [_planner_curves._libcachesim(uses, size) for size in sizes]
