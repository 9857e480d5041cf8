"""The report: its curves are means of the steps, and its page holds what the job did."""

from __future__ import annotations

import base64
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jobs
from torchrec_mtrains.errors import ConfigurationError
from torchrec_mtrains.report import page, stretches, write_report
from torchrec_mtrains.show import summary
from torchrec_mtrains.tier_table import tier_rows, written_row_bytes
from torchrec_mtrains.train import TrainResult


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> TrainResult:
    checkpoint = tmp_path_factory.mktemp("checkpoint")  # so that rows leave the write buffer
    return jobs.run(jobs.options(tmp_path_factory.mktemp("ssd"), checkpoint=str(checkpoint), checkpoint_every=5, prefetch_depth=0))


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50), st.integers(1, 60))
def test_stretches_cover_every_step_once(values, points):
    at, mean = stretches(values, points)
    parts = np.array_split(np.arange(len(values)), min(len(values), points))
    assert np.allclose(at, [part.mean() for part in parts])
    assert np.allclose(mean, [np.array(values)[part].mean() for part in parts])


def test_the_page_holds_four_pictures_that_are_png_files(done):
    pictures = re.findall(r'base64,([^"]+)"', page(done))
    assert len(pictures) == 4
    assert all(base64.b64decode(p).startswith(b"\x89PNG\r\n") for p in pictures)


def test_the_page_of_a_job_in_memory_has_no_tier_pictures():
    text = page(jobs.run(jobs.options(None)))
    assert "Hit ratio" not in text
    assert text.count("base64,") == 2


def test_names_in_the_page_are_escaped(done):
    name, done.data = done.data, "<script>"
    try:
        assert "<script>" not in page(done)
    finally:
        done.data = name


def test_the_phases_of_a_step_add_up_to_it(done):
    for step in done.steps:
        assert sum(step.phases.values()) == pytest.approx(step.seconds)


def test_tiers_count_every_lookup_once(done):
    pool, generated, ssd = tier_rows(done)
    assert pool.lookups == jobs.STEPS * jobs.BATCH_SIZE * jobs.SIZES.pooling * jobs.SIZES.table_count
    assert pool.lookups - pool.hits == generated.lookups
    assert generated.lookups - generated.hits == ssd.lookups == ssd.hits
    assert 0 < pool.hits < pool.lookups
    assert ssd.reads > 0
    assert ssd.writes > 0


def test_the_steps_add_up_to_the_jobs_counters(done):
    total = done.tiers_total()
    assert total["lookups"] == sum(t["lookups"] for t in done.tables)
    assert total["write_bytes"] <= sum(v["write_bytes"] for v in done.volumes)
    assert done.hit_ratio == pytest.approx(1 - total["misses"] / total["lookups"])


def test_written_rows_are_distinct(done):
    record = done.tables[0]["record_bytes"]
    distinct = sum(t["rows"] for t in done.tables)
    assert 0 < written_row_bytes(done) <= distinct * record


def test_the_summary_says_steps_quality_and_memory(done):
    text = "\n".join(summary(done))
    for part in (f"trained {jobs.STEPS} steps", "held out: 32 samples", "peak resident memory"):
        assert part in text


def test_a_report_that_cannot_be_written_is_a_typed_error(done, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="--report"):
        write_report(done, tmp_path / "file" / "report.html")
