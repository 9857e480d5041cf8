"""``CacheStatistics`` of a profile in TorchRec's own planner: its plans get better, and are what the statistics say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import _planner_statistics


def test_stock_plans_with_statistics_of_a_profile_miss_less() -> None:
    lines = _planner_statistics.run(rows=10_000, samples=256, batches=120, hbm_shares=(0.5,))
    default, even, profiled = lines
    assert [line["plan"] for line in lines] == ["default", "even", "profiled"]
    assert len(set(even["shares"].values())) == 1
    assert profiled["lru_misses_per_batch"] < 0.9 * even["lru_misses_per_batch"] < 0.9 * default["lru_misses_per_batch"]
    assert profiled["fetching_ms"] < 0.9 * even["fetching_ms"] < 0.9 * default["fetching_ms"]
    for line in lines:
        assert line["expected_misses_per_batch"] == pytest.approx(line["lru_misses_per_batch"], rel=0.1)
    assert len(_planner_statistics.figures(lines)) == 6
