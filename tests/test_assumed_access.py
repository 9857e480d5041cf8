"""Assumed access: its curves are those of the simulated policies under the same law."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec_mtrains.kernels import _core
from torchrec_mtrains.planner import assumed_access
from torchrec_mtrains.planner.assumed_access import LOOKAHEADS

from torchrec_mtrains.errors import ConfigurationError

ROWS, LOOKUPS, WARM, COUNTED = 10_000, 500, 500, 500


@pytest.mark.parametrize("exponent", [0.0, 0.9, 1.05, 1.3])
def test_assumed_curves_are_what_simulated_pools_and_lrus_miss(exponent: float) -> None:
    assumed = assumed_access(ROWS, LOOKUPS, LOOKUPS, exponent)
    pools = list(assumed.miss_curve.pool_rows[1:-1])
    rng = np.random.default_rng(0)
    law = np.cumsum(np.arange(1, ROWS + 1.0) ** -exponent)
    row_of_rank = rng.permutation(ROWS)
    profiler = _core.TableProfiler(ROWS, ROWS, 0, pools, list(LOOKAHEADS), 0, 16)
    before = None
    for batch in range(WARM + COUNTED):
        if batch == WARM:
            before = profiler.pools(), profiler.lru_misses()
        profiler.push(row_of_rank[np.searchsorted(law, rng.random(LOOKUPS) * law[-1])])
    assert before is not None
    unique = profiler.counts()["unique_rows"] / (WARM + COUNTED)
    assert assumed.unique_rows_per_batch == pytest.approx(unique, rel=0.01)
    lru = (np.array(profiler.lru_misses()) - before[1]) / COUNTED / unique
    assert np.abs([assumed.lru_miss_curve.misses(p) / unique for p in pools] - lru).max() < 0.015
    for curve, first, last in zip(assumed.miss_curves, before[0], profiler.pools(), strict=True):
        assert curve.lookahead == last["lookahead"]
        ours = (np.array(last["misses"]) - first["misses"]) / (last["batches"] - first["batches"]) / unique
        errors = np.abs([curve.misses(p) / unique for p in pools] - ours)
        assert errors.mean() < 0.01
        assert errors.max() < 0.025  # at pools of little more than a batch


@settings(deadline=None)
@given(st.integers(1, 10**10), st.floats(0.5, 1e6), st.floats(0, 2))
def test_any_sizes_have_curves(rows: int, lookups: float, exponent: float) -> None:
    access = assumed_access(rows, lookups, 1024, exponent)
    assert access.assumed
    assert access.miss_curve.misses(rows) == 0
    assert 0 < access.unique_rows_per_batch <= min(rows, lookups)
    counts = [access.unique_rows(n) for n in (1, 64, 1024, 65_536)]
    assert counts == sorted(counts)
    assert sum(access.reuse_batches) == pytest.approx(1)


@settings(deadline=None, max_examples=50)
@given(st.integers(100, 10**9), st.floats(10, 1e5), st.floats(0, 1.4))
def test_misses_fall_with_the_pool_and_with_the_window_and_are_fewer_than_an_lrus(rows: int, lookups: float, exponent: float) -> None:
    access = assumed_access(rows, lookups, 1024, exponent)
    unique = access.unique_rows_per_batch
    curves = [np.array(curve.misses_per_batch) for curve in access.miss_curves]
    for curve, further in pairwise([*curves, np.zeros_like(curves[0])]):
        assert (np.diff(curve) <= 1e-9 * unique).all()
        assert (further <= curve + 1e-9 * unique).all()
    assert (curves[0] <= np.array(access.lru_miss_curve.misses_per_batch) + 0.01 * unique).all()


def test_what_is_no_law_is_refused() -> None:
    for sizes in ((0, 1.0, 1, 1.0), (10, 0.0, 1, 1.0), (10, 1.0, 0, 1.0), (10, 1.0, 1, -0.1)):
        with pytest.raises(ConfigurationError, match="assumed_access"):
            assumed_access(*sizes)
