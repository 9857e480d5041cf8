"""Synthetic batches: the published figures hold, and a batch is a function of (seed, index, rank) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_mtrains.data import SyntheticConfig, SyntheticSource
from torchrec_mtrains.data.popularity import LAWS, PUBLISHED, measure
from torchrec_mtrains.data.scatter import Scatter
from torchrec_mtrains.errors import ConfigurationError

# Scale factor of the statistics test: active rows a table against the published sets' average table (rows used / tables).
# 128.4 M / 856 = 150,000 rows for 2021 and 110.3 M / 788 = 140,000 for 2022, so 40,000 active rows are about 0.27.
ACTIVE_ROWS = 40_000
TABLE_COUNT = 8


def same(a, b) -> bool:
    return (
        torch.equal(a.dense_features, b.dense_features)
        and torch.equal(a.sparse_features.values(), b.sparse_features.values())
        and torch.equal(a.sparse_features.lengths(), b.sparse_features.lengths())
        and torch.equal(a.labels, b.labels)
    )


@pytest.mark.parametrize("name", ["meta2021", "meta2022"])
def test_the_law_has_the_published_figures_in_expectation(name):
    published, expected = PUBLISHED[name], LAWS[name].expected_statistics(PUBLISHED[name].heavy_above)
    assert expected.once_rows == pytest.approx(published.once_rows, rel=1e-3)
    assert expected.reuse == pytest.approx(published.reuse, rel=2e-3)
    assert expected.heavy_rows == pytest.approx(published.heavy_rows, rel=2e-3)
    assert expected.heavy_accesses == pytest.approx(published.heavy_accesses, rel=2e-3)


@pytest.mark.parametrize("name", ["meta2021", "meta2022"])
@pytest.mark.parametrize("drift", [0.0, 0.05])
def test_generated_ids_have_the_published_figures_within_15_percent(name, drift):
    config = SyntheticConfig(table_count=TABLE_COUNT, rows=ACTIVE_ROWS * 5 // 4, pooling=8, calibration=name, drift=drift)
    source = SyntheticSource(config, batch_size=500, seed=3)
    batches = round(config.window_lookups / (500 * config.pooling))
    ids = [source.batch(k).sparse_features.values().view(TABLE_COUNT, -1).numpy() for k in range(batches)]
    found = measure(list(np.concatenate(ids, axis=1)), PUBLISHED[name].heavy_above)
    published = PUBLISHED[name]
    for figure in ("once_rows", "reuse", "heavy_rows", "heavy_accesses"):
        assert getattr(found, figure) == pytest.approx(getattr(published, figure), rel=0.15), figure


def test_drift_replaces_its_share_of_the_active_rows_in_one_window():
    config = SyntheticConfig(table_count=1, rows=50_000, pooling=8, calibration="uniform", active_share=0.5, drift=0.2)
    source = SyntheticSource(config, batch_size=500)
    window = config.window_lookups // (500 * 8)

    def active(at: int) -> set[int]:
        return {int(i) for k in range(40) for i in source.batch(1_000_000 + k, drift_index=at).sparse_features.values()}

    before, after = active(0), active(window)
    assert len(after - before) / config.active_rows == pytest.approx(0.2, rel=0.05)


@given(n=st.integers(1, 3000), key=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_scatter_is_a_permutation_of_any_range(n, key):
    rows = Scatter(n, key)(np.arange(n))
    assert np.array_equal(np.sort(rows), np.arange(n))


@given(start=st.integers(0, 50), seed=st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_a_resumed_job_sees_the_batches_that_it_would_have_seen(start, seed):
    config = SyntheticConfig(table_count=2, rows=500)
    first, second = SyntheticSource(config, 8, seed=seed), SyntheticSource(config, 8, seed=seed)
    for _ in range(start):
        first.batch(0)
    straight = second.train_batches(0)
    for _ in range(start):
        next(straight)
    assert same(next(first.train_batches(start)), next(straight))


def test_seeds_ranks_and_indexes_give_different_batches():
    config = SyntheticConfig(table_count=2, rows=500)
    base = SyntheticSource(config, 8).batch(0)
    assert not same(base, SyntheticSource(config, 8).batch(1))
    assert not same(base, SyntheticSource(config, 8, seed=1).batch(0))
    assert not same(base, SyntheticSource(config, 8, rank=1, world_size=2).batch(0))


def test_held_out_batches_are_fixed_and_never_trained_on():
    config = SyntheticConfig(table_count=2, rows=500)
    source = SyntheticSource(config, 8, held_out_batch_count=3)
    once, again = list(source.held_out_batches(7)), list(source.held_out_batches(7))
    assert len(once) == 3
    assert all(same(a, b) for a, b in zip(once, again, strict=True))
    assert not any(same(held, source.batch(k)) for held in once for k in range(20))


@given(
    rows=st.integers(1, 400),
    active=st.floats(0.05, 1),
    pooling=st.integers(1, 5),
    size=st.integers(1, 9),
    law=st.sampled_from(["meta2022", "uniform"]),
)
@settings(max_examples=40, deadline=None)
def test_every_id_is_a_row_of_its_table(rows, active, pooling, size, law):
    config = SyntheticConfig(table_count=2, rows=rows, pooling=pooling, active_share=active, calibration=law, drift=0.0)
    batch = SyntheticSource(config, size).batch(123)
    ids = batch.sparse_features.values()
    assert ids.numel() == 2 * size * pooling
    assert int(ids.min()) >= 0
    assert int(ids.max()) < rows


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", 0),
        ("table_count", 0),
        ("pooling", 0),
        ("active_share", 0.0),
        ("active_share", 1.5),
        ("drift", -1.0),
        ("calibration", "zipf"),
    ],
)
def test_a_bad_size_names_its_field(field, value):
    with pytest.raises(ConfigurationError, match=field):
        SyntheticConfig(**{field: value})


def test_drift_without_rows_to_take_over_is_refused():
    with pytest.raises(ConfigurationError, match="drift"):
        SyntheticConfig(active_share=1.0, drift=0.1)
