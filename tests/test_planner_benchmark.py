"""``benchmarks/planner.py``: it runs on real training, and what it predicts without misses is what its profile says."""

from __future__ import annotations

import math
from pathlib import Path

from test_benchmarks import run


def test_the_planner_benchmark_predicts_what_it_trains_and_draws_it(tmp_path: Path) -> None:
    report = run("planner.py", tmp_path, "--pmem-path", str(tmp_path), "--picture", str(tmp_path / "planner.png"))
    lines = report["figures"]["sections"]["predictions"]["lines"]
    assert len(lines) == 3
    for line in lines:
        assert line["predicted"]["step_ms"] >= line["dense_ms"] > 0
        assert line["measured"]["step_ms"] > 0
        assert 0 <= line["predicted"]["miss_ratio"] <= 1
    whole, cached = lines[1], lines[2]
    assert whole["measured"]["misses"] == whole["predicted"]["miss_ratio"] == 0
    assert lines[0]["measured"]["read_ios"] > cached["measured"]["read_ios"] > 0
    assert all(math.isfinite(f["value"]) for f in report["figures"]["figures"].values())
    assert (tmp_path / "planner.png").read_bytes().startswith(b"\x89PNG")
