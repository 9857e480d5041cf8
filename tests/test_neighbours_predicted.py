"""Misses that neighbours save, as the planner predicts them: bounds, and a job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchrec_mtrains.planner import TableAccess, assumed_access
from torchrec_mtrains.planner.neighbours import curve_over_ssd, misses_and_reads

from torchrec_mtrains.data import SyntheticConfig, SyntheticSource
from torchrec_mtrains.job_model import ModelOptions
from torchrec_mtrains.placement import PlacementOptions
from torchrec_mtrains.process_group import process_group
from torchrec_mtrains.profiling import ProfileOptions, profile
from torchrec_mtrains.train import TrainOptions, train

TABLE = assumed_access(100_000, 5000, 1000)


@given(st.integers(2000, 100_000), st.integers(1, 100), st.integers(0, 64))
def test_neighbours_never_add_misses_and_spare_more_in_larger_blocks_and_windows(pool: int, records: int, lookahead: int) -> None:
    alone = TABLE.miss_curve_for(1000, lookahead).misses(pool)
    misses, reads = misses_and_reads(TABLE, pool, 1000, records, lookahead)
    assert 0 <= reads <= misses <= alone * (1 + 1e-9)
    assert misses_and_reads(TABLE, pool, 1000, records + 1, lookahead)[0] <= misses * (1 + 1e-9)
    assert misses_and_reads(TABLE, pool, 1000, records, lookahead + 1)[0] <= misses * (1 + 1e-9)
    assert misses_and_reads(TABLE, pool, 1000, 1, lookahead)[0] == pytest.approx(alone)
    assert misses_and_reads(TABLE, pool, 1000, records, 0)[0] == pytest.approx(TABLE.miss_curve_for(1000, 0).misses(pool))


def test_a_job_with_lookahead_misses_what_is_predicted_and_less_than_its_pools_alone_would(tmp_path: Path) -> None:
    steps, pool, lookahead, rows = 160, 8000, 16, 40_000

    def source() -> SyntheticSource:
        return SyntheticSource(SyntheticConfig(table_count=1, rows=rows), 512)

    options = TrainOptions(
        model=ModelOptions(embedding_dim=32, dense_layers=(8,), over_layers=(8,)),
        placement=PlacementOptions(ssd=(str(tmp_path),), ssd_capacity_bytes=1 << 30, pool_rows=pool),
        steps=steps,
        lookahead=lookahead,
    )
    with process_group() as pg:
        counted = train(source(), options, pg).steps[steps // 2 :]
    unique = sum(step.tiers["unique_rows"] for step in counted)
    (table,) = profile(source(), ProfileOptions(batches=steps)).tables.values()
    assert isinstance(table, TableAccess)
    alone = table.miss_curve_for(512, lookahead).misses(pool) / table.unique_rows_per_batch
    predicted, reads = (n / table.unique_rows_per_batch for n in misses_and_reads(table, pool, 512, 4096 // 156, lookahead))
    missed, read = (sum(step.tiers[name] for step in counted) / unique for name in ("misses", "read_ios"))
    assert abs(predicted - missed) < 0.03 < alone - missed
    assert abs(reads - read) < 0.03


def test_rows_that_a_profile_saw_for_the_first_time_have_records_in_a_job_that_goes_on() -> None:
    seen = replace(TABLE, used_rows=20_000)
    size = next(rows for rows in seen.miss_curve.pool_rows if rows >= seen.used_rows)
    alone = seen.miss_curve_for(1000, 16).misses(size)
    assert 0 < alone < seen.rows
    assert misses_and_reads(seen, size, 1000, 30, 16) == pytest.approx((alone, 0.0))
    assert curve_over_ssd(seen, 1000, 30, 16).misses(size) < 0.98 * alone
    assert curve_over_ssd(seen, 1000, 1, 16).misses(size) == pytest.approx(alone)
