"""What a table's accesses would be under a popularity law, for planning without data.

Every lookup is an independent draw from Zipf's law over the rows (probability ∝ rank^-exponent), ids scattered over the table, nothing
drifts. Unique rows follow from that exactly; misses by the equations of ``eviction_model.py``.

``tests/test_assumed_access.py`` holds both against the simulated policies.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from ..errors import ConfigurationError
from .access_profile import MissCurve, TableAccess
from .eviction_model import lru_misses, our_misses

LOOKAHEADS = (0, 8, 64)
"""Windows that curves are measured and assumed for."""

CURVE_POINTS = 12
SMALLEST_POOL = 0.001
"""Share of the rows. Curves are measured and assumed at ``CURVE_POINTS`` sizes, geometric from here to all rows, or from what a batch needs
where that is more."""

_MORE_THAN_A_BATCH = 1.25  # batches differ, of a sample more so, and the smallest pool is to hold each of them

SAMPLE_SCALES = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
"""Batches, where unique rows are measured and assumed."""

REUSE_CLASSES = 12
"""Classes of batches since a row's last use: 1, 2, 3-4, …, and none within the largest."""

POPULARITY_SHARES = (0.0001, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
ROW_RANGES = 64

_GROUPS = 100  # of ranks alike; 400 change no miss ratio by 1e-3


def curve_sizes(rows: int, unique_rows: float) -> list[int]:
    """The pool sizes of a table's curve, the smallest first. ``unique_rows``: of a batch, which a pool has to hold."""
    smallest = min(rows, max(1.0, SMALLEST_POOL * rows, _MORE_THAN_A_BATCH * unique_rows))
    return np.unique(np.rint(np.geomspace(smallest, rows, CURVE_POINTS)).astype(np.int64)).tolist()


def _groups(rows: int, exponent: float) -> tuple[np.ndarray, np.ndarray]:
    """Ranks in groups: rows of each, and the probability of each of its rows in a lookup."""
    edges = np.unique(np.rint(np.geomspace(1, rows + 1, _GROUPS)).astype(np.int64))
    first, last = edges[:-1].astype(np.float64), edges[1:].astype(np.float64) - 1
    exact = first == last  # groups of one rank
    lower, upper = np.maximum(first - 0.5, 0.5), last + 0.5
    power = 1 - exponent
    mass = np.log(upper / lower) if abs(power) < 1e-9 else (upper**power - lower**power) / power
    mass = np.where(exact, first**-exponent, mass)
    counts = last - first + 1
    return counts, mass / mass.sum() / counts


def assumed_access(
    rows: int,
    lookups_per_batch: float,
    batch_samples: int,
    zipf_exponent: float = 1.05,
    *,
    name: str = "assumed",
    row_bytes: int | None = None,
) -> TableAccess:
    """A table of ``rows`` with ``lookups_per_batch`` lookups in a global batch of ``batch_samples``.

    Raises: ConfigurationError for sizes or exponents that are no law.
    """
    return replace(_assumed(rows, lookups_per_batch, batch_samples, zipf_exponent), name=name, row_bytes=row_bytes)


@lru_cache(maxsize=4096)
def _assumed(rows: int, lookups_per_batch: float, batch_samples: int, zipf_exponent: float) -> TableAccess:
    if rows < 1 or lookups_per_batch <= 0 or batch_samples < 1 or zipf_exponent < 0:
        raise ConfigurationError(
            "assumed_access: rows, lookups_per_batch and batch_samples must be positive and zipf_exponent not negative, got "
            f"{rows}, {lookups_per_batch}, {batch_samples}, {zipf_exponent}"
        )
    counts, probability = _groups(rows, zipf_exponent)
    use = np.clip(-np.expm1(-lookups_per_batch * probability), 1e-12, 1 - 1e-12)
    unique = min(float((counts * use).sum()), lookups_per_batch, float(rows))
    pools = np.array([p for p in curve_sizes(rows, unique) if unique <= p < rows], np.float64)

    def curve(misses: np.ndarray, lookahead: int = 0) -> MissCurve:
        falling = tuple(np.minimum.accumulate(np.minimum(unique, misses)).tolist()) if len(pools) else ()
        sizes = (0, *(int(p) for p in pools), rows)
        points = (unique, *falling, 0.0)
        return MissCurve(sizes, points, points, batch_samples, lookahead, full_rows=rows)

    by_window = np.minimum.accumulate([our_misses(counts, use, pools, lookahead) for lookahead in LOOKAHEADS])

    def unique_of(lookups: float) -> float:
        return float((counts * -np.expm1(-lookups * probability)).sum())

    share_of_rows, share_of_lookups = np.cumsum(counts) / rows, np.cumsum(counts * probability)
    gap = 2.0 ** np.arange(REUSE_CLASSES - 1)
    within = (counts[:, None] * use[:, None] * -np.expm1(np.log1p(-use)[:, None] * gap)).sum(0) / (counts * use).sum()
    return TableAccess(
        name="assumed",
        rows=rows,
        batch_samples=batch_samples,
        batches=0,
        lookups_per_batch=lookups_per_batch,
        unique_rows_per_batch=unique,
        used_rows=rows,
        unique_rows_by_samples=tuple((batch_samples * s, unique_of(lookups_per_batch * s)) for s in SAMPLE_SCALES),
        lookup_share_by_row_range=(1 / ROW_RANGES,) * ROW_RANGES,
        lookup_share_by_popularity=tuple((s, float(np.interp(s, share_of_rows, share_of_lookups))) for s in POPULARITY_SHARES),
        reuse_batches=(*np.diff(within, prepend=0.0).tolist(), float(1 - within[-1])),
        drift=0.0,
        drift_batches=0,
        miss_curves=tuple(map(curve, by_window, LOOKAHEADS)),
        lru_miss_curve=curve(lru_misses(counts, use, pools)),
        assumed=True,
    )
