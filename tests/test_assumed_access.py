"""Assumed access: its curves are those of the simulated policies under the same law."""

from __future__ import annotations

from importlib import import_module

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
        assert errors.mean() < 0.015
        assert errors.max() < 0.04  # at pools of little more than a batch


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


@settings(deadline=None, max_examples=15)
@given(st.integers(100, 10**9), st.floats(10, 1e5), st.floats(0.5, 1.4))
def test_curves_are_where_small_steps_end(rows: int, lookups: float, exponent: float) -> None:
    """The fixed point is found in long steps, and pools that have settled are left out: small steps of all, to the end, end there too."""
    assumed = import_module("torchrec_mtrains.planner.assumed_access")
    counts, probability = assumed._groups(rows, exponent)
    use = np.clip(-np.expm1(-lookups * probability), 1e-12, 1 - 1e-12)
    unique = float((counts * use).sum())
    pools = np.array([p for p in assumed.curve_sizes(rows, unique) if unique <= p < rows], np.float64)
    of_all = counts, use, np.tile(pools, len(LOOKAHEADS)), np.repeat(LOOKAHEADS, len(pools))
    found = assumed._our_misses(*of_all)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(assumed, "_SETTLED", 0.0)
        patched.setattr(assumed, "_STEP", 0.3)
        patched.setattr(assumed, "_MOST_ROUNDS", 1000)
        slowly = assumed._our_misses(*of_all)
    assert np.abs(found - slowly).max(initial=0) < 1e-3 * unique


def test_what_is_no_law_is_refused() -> None:
    for sizes in ((0, 1.0, 1, 1.0), (10, 0.0, 1, 1.0), (10, 1.0, 0, 1.0), (10, 1.0, 1, -0.1)):
        with pytest.raises(ConfigurationError, match="assumed_access"):
            assumed_access(*sizes)
