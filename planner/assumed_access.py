"""What a table's accesses would be under a popularity law, for planning without data.

Every lookup is an independent draw from Zipf's law over the rows (probability ∝ rank^-exponent), ids scattered over the table, nothing
drifts. Unique rows follow from that exactly. Misses come from mean-field equations in closed form, no simulation, so that plans need no
native core:

    LRU   a row is there if it was used in the last T batches; T such that the expected rows in the pool are its size (Che's
          approximation)
    ours  S3-FIFO (kernels/csrc/eviction_order.h) without a lookahead window. A row passes small in T_small batches, a lap of main
          takes T_main, and a row that left small is remembered for T_ghost. The expected rows in small and main, a tenth of the
          pool and the rest, and those that leave small in T_ghost, as many as the pool has rows, determine the three.

Of a row with probability q of being used in a batch, with ``a0`` and ``a1`` the probabilities that a lap of main sees none and one batch
that uses it: a stay in main has (1 - a1) ÷ a0² laps, since it ends with a lap without a use that began without one left, and two are
remembered.

``tests/test_assumed_access.py`` holds both against the simulated policies.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..errors import ConfigurationError
from .access_profile import MissCurve, TableAccess

CURVE_POINTS = 12
SMALLEST_POOL = 0.001
"""Share of the rows. Curves are measured and assumed at ``CURVE_POINTS`` sizes, geometric from here to all rows."""

SAMPLE_SCALES = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
"""Batches, where unique rows are measured and assumed."""

REUSE_CLASSES = 12
"""Classes of batches since a row's last use: 1, 2, 3-4, …, and none within the largest."""

POPULARITY_SHARES = (0.0001, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
ROW_RANGES = 64

_GROUPS = 400  # of ranks alike; 100 change no miss ratio by 1e-3
_ROUNDS = 400
_SMALL_SHARE = 0.1  # of the pool: eviction_order.h


def curve_sizes(rows: int) -> list[int]:
    """The pool sizes of a table's curve, the smallest first."""
    shares = np.geomspace(SMALLEST_POOL, 1, CURVE_POINTS)
    return sorted({max(1, round(rows * share)) for share in shares})


def _groups(rows: int, exponent: float) -> tuple[np.ndarray, np.ndarray]:
    """Ranks in groups: rows of each, and the probability of each of its rows in a lookup."""
    edges = np.unique(np.rint(np.geomspace(1, rows + 1, _GROUPS)).astype(np.int64))
    first, last = edges[:-1].astype(np.float64), edges[1:].astype(np.float64) - 1
    exact = first == last  # groups of one rank
    lower, upper = np.maximum(first - 0.5, 0.5), last + 0.5
    if abs(exponent - 1) < 1e-9:
        mass = np.log(upper / lower)
    else:
        mass = (upper ** (1 - exponent) - lower ** (1 - exponent)) / (1 - exponent)
    mass = np.where(exact, first**-exponent, mass)
    counts = last - first + 1
    return counts, mass / mass.sum() / counts


def _lru_misses(counts: np.ndarray, use: np.ndarray, pools: np.ndarray) -> np.ndarray:
    low, high = np.full(len(pools), -20.0), np.full(len(pools), 60.0)
    stays = np.log1p(-use)[:, None]
    for _ in range(60):
        middle = (low + high) / 2
        resident = (counts[:, None] * -np.expm1(stays * np.exp(middle))).sum(0)
        low, high = np.where(resident < pools, middle, low), np.where(resident < pools, high, middle)
    return (counts[:, None] * use[:, None] * np.exp(stays * np.exp(low))).sum(0)


def _s3_fifo_misses(counts: np.ndarray, use: np.ndarray, pools: np.ndarray) -> np.ndarray:
    """The fixed point of the three times, in steps of their logarithms; all pools at once."""
    q, n, none = use[:, None], counts[:, None], np.log1p(-use)[:, None]
    batch = (n * q).sum()
    small, main, ghost = (np.log(np.maximum(1.0, share * pools / batch)) for share in (_SMALL_SHARE, 1.0, 1.0))
    misses = np.zeros(len(pools))
    for _ in range(_ROUNDS):
        in_small, in_main, remembered = np.exp(small), np.exp(main), np.exp(ghost)
        used_in_small, back_in_time = -np.expm1(none * in_small), -np.expm1(none * remembered)
        uses = -none * in_main
        a0 = np.exp(np.maximum(-uses, -300))
        a1 = uses * a0
        stay = (1 - a1) / a0**2 * in_main
        again = (1 - used_in_small) * back_in_time  # of those that entered small: left it, and came back as ghosts
        to_small = 1 / (1 + again)
        per_batch = 1 / (to_small * (in_small + used_in_small * stay) + (1 - to_small) * stay + 1 / q)
        misses = (n * per_batch).sum(0)
        rows_in_small = (n * per_batch * to_small * in_small).sum(0)
        rows_in_main = (n * per_batch * (to_small * used_in_small + 1 - to_small) * stay).sum(0)
        left = (n * per_batch * to_small * (1 - used_in_small)).sum(0)
        small = np.clip(small + 0.5 * np.log(_SMALL_SHARE * pools / rows_in_small), 0, 60)  # a batch's rows stay for that batch
        room = np.maximum(pools - rows_in_small, 0.01 * pools)
        main = np.clip(main + 0.5 * np.log(room / rows_in_main), 0, 60)
        ghost = np.log(pools / np.maximum(left, 1e-12)) * 0.5 + ghost * 0.5
    return misses


@lru_cache(maxsize=4096)
def assumed_access(
    rows: int, lookups_per_batch: float, batch_samples: int, zipf_exponent: float = 1.05, *, name: str = "assumed", row_bytes: int | None = None
) -> TableAccess:
    """A table of ``rows`` with ``lookups_per_batch`` lookups in a global batch of ``batch_samples``.

    Raises: ConfigurationError for sizes or exponents that are no law.
    """
    if rows < 1 or lookups_per_batch <= 0 or batch_samples < 1 or zipf_exponent < 0:
        raise ConfigurationError(
            "assumed_access: rows, lookups_per_batch and batch_samples must be positive and zipf_exponent not negative, got "
            f"{rows}, {lookups_per_batch}, {batch_samples}, {zipf_exponent}"
        )
    counts, probability = _groups(rows, zipf_exponent)
    use = np.clip(-np.expm1(-lookups_per_batch * probability), 1e-12, 1 - 1e-12)
    unique = min(float((counts * use).sum()), lookups_per_batch, float(rows))
    pools = np.array([p for p in curve_sizes(rows) if unique <= p < rows], np.float64)

    def curve(misses: np.ndarray) -> MissCurve:
        falling = tuple(np.minimum.accumulate(np.minimum(unique, misses)).tolist()) if len(pools) else ()
        sizes = (0, *(int(p) for p in pools), rows)
        points = (unique, *falling, 0.0)
        return MissCurve(sizes, points, points, batch_samples, full_rows=rows)

    def unique_of(lookups: float) -> float:
        return float((counts * -np.expm1(-lookups * probability)).sum())

    share_of_rows, share_of_lookups = np.cumsum(counts) / rows, np.cumsum(counts * probability)
    gap = 2.0 ** np.arange(REUSE_CLASSES - 1)
    within = (counts[:, None] * use[:, None] * -np.expm1(np.log1p(-use)[:, None] * gap)).sum(0) / (counts * use).sum()
    return TableAccess(
        name=name,
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
        miss_curve=curve(_s3_fifo_misses(counts, use, pools)),
        lru_miss_curve=curve(_lru_misses(counts, use, pools)),
        row_bytes=row_bytes,
        assumed=True,
    )
