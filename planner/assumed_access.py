"""What a table's accesses would be under a popularity law, for planning without data.

Every lookup is an independent draw from Zipf's law over the rows (probability ∝ rank^-exponent), ids scattered over the table, nothing
drifts. Unique rows follow from that exactly. Misses come from mean-field equations, no simulation, so that plans need no native core:

    LRU   a row is there if it was used in the last T batches; T such that the expected rows in the pool are its size (Che's
          approximation)
    ours  S3-FIFO with a window of announced batches (kernels/csrc/eviction_order.h). A row that enters a list has no use in the
          window. It passes small in T_small batches, a lap of main takes T_main, and a row that left small is remembered for T_ghost.
          At the end of small or of a lap it is awaited, and in no list until its last announced use; or it was used, and goes on in
          main; or it leaves. The expected rows in small and in main, at most a tenth of the pool and the rest of what awaited rows
          leave, and those that leave small in T_ghost, as many as the pool has rows, determine the three. If awaited rows alone do not
          fit, those used last go first, as if the window were shorter: it is, until the others fit.

Of a row with probability q of being used in a batch, a lap of main sees no use and one use beyond the window with probabilities ``a0``
and ``a1`` and ends without an awaited use with probability ``e``: a stay in main has (1 - e a1) ÷ (e a0)² laps, since it ends with a lap
without a use that began without one left, and two are remembered.

``tests/test_assumed_access.py`` holds both against the simulated policies.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import ConfigurationError
from .access_profile import MissCurve, TableAccess

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
_MOST_ROUNDS = 400
_STEP = 0.7  # of the way to where each equation has its time; 0.5 takes half as many rounds more
_SETTLED = 1e-4  # of the misses, from one round to the next
_QUIET_ROUNDS = 2  # in a row: misses may turn at a moment
_SMALL_SHARE = 0.1  # of the pool: eviction_order.h
_ANY_BATCH = 1e-3  # expected uses within a stretch of batches, below which any of them is as likely as another to have the use


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


def _lru_misses(counts: np.ndarray, use: np.ndarray, pools: np.ndarray) -> np.ndarray:
    low, high = np.full(len(pools), -20.0), np.full(len(pools), 60.0)
    stays = np.log1p(-use)[:, None]
    for _ in range(60):
        middle = (low + high) / 2
        resident = (counts[:, None] * -np.expm1(stays * np.exp(middle))).sum(0)
        low, high = np.where(resident < pools, middle, low), np.where(resident < pools, high, middle)
    return (counts[:, None] * use[:, None] * np.exp(stays * np.exp(low))).sum(0)


def _our_misses(counts: np.ndarray, use: np.ndarray, pools: np.ndarray, lookahead: np.ndarray) -> np.ndarray:
    """The fixed point of the times and the window, in steps of their logarithms; all pools at once.

    Shapes: counts, use (groups,); pools, lookahead (pools,) → (pools,). A miss begins a cycle of a row: presence, then absence until the
    next miss.
    """
    q, n, none = use[:, None], counts[:, None], np.log1p(-use)[:, None]
    batch = (n * q).sum()

    def unused(batches: np.ndarray) -> np.ndarray:
        return np.exp(np.maximum(batches * none, -100))

    def gap(within: np.ndarray, none_within: np.ndarray) -> np.ndarray:
        """Batches to the next use, if it comes within so many, and ``none_within`` is the probability that it does not."""
        likely = q * (1 - none_within)
        exact = (1 - none_within * (1 + within * q)) / np.maximum(likely, 1e-300)
        return np.where(within * q > _ANY_BATCH, exact, (within + 1) / 2)

    small, main, ghost = (np.log(np.maximum(1.0, share * pools / batch)) for share in (_SMALL_SHARE, 1.0, 1.0))
    longest = np.log(np.maximum(lookahead - 1, 1e-9))  # the batch that is looked up is the first of its window
    window = np.minimum(longest, np.log(pools / batch))
    misses, found, quiet, moving = np.zeros(len(pools)), np.zeros(len(pools)), np.zeros(len(pools), np.int64), np.arange(len(pools))
    for _ in range(_MOST_ROUNDS):
        in_small, in_main, ahead = np.exp(small), np.exp(main), np.exp(window)
        away = unused(ahead)
        seen_in_small, seen_in_main = np.minimum(in_small, ahead), np.minimum(in_main, ahead)
        unmet_in_small, unmet_in_main = unused(seen_in_small), unused(seen_in_main)
        used_in_small = 1 - unused(np.maximum(in_small - ahead, 0))
        uses = -none * np.maximum(in_main - ahead, 0)
        a0 = np.exp(np.maximum(-uses, -100))
        laps = (1 - unmet_in_main * uses * a0) / (unmet_in_main * a0) ** 2
        more_laps = laps + 1 / (unmet_in_main * a0)
        back_in_time = 1 - unused(np.maximum(np.exp(ghost) - ahead, 0))
        again = away * unmet_in_small * (1 - used_in_small) * back_in_time
        to_small = 1 / (1 + again)
        from_small = to_small * away
        time_in_small = from_small * in_small
        laps_in_main = (1 - away + from_small * (1 - unmet_in_small)) * more_laps
        laps_in_main += (from_small * unmet_in_small * used_in_small + (1 - to_small) * away) * laps
        time_in_main = laps_in_main * in_main
        further = (1 - away) / away * gap(ahead, away)
        after_small = gap(seen_in_small, unmet_in_small) + ahead - seen_in_small + further
        after_main = gap(seen_in_main, unmet_in_main) + ahead - seen_in_main + further
        time_awaited = further + from_small * (1 - unmet_in_small) * after_small + laps_in_main * (1 - unmet_in_main) * after_main
        per_batch = n / (time_in_small + time_in_main + time_awaited + ahead + 1 / q)
        before, misses = misses, per_batch.sum(0)
        found[moving] = misses
        quiet = np.where(np.abs(misses - before) <= _SETTLED * misses, quiet + 1, 0)
        rows_in_small, rows_in_main, rows_awaited = ((per_batch * t).sum(0) for t in (time_in_small, time_in_main, time_awaited))
        left = (per_batch * from_small * unmet_in_small * (1 - used_in_small)).sum(0)
        at_least = rows_in_small * np.exp(-small) + rows_in_main * np.exp(-main)  # a batch's rows stay for that batch
        room = np.maximum(pools - rows_awaited, 0.001 * pools)
        small = np.clip(small + _STEP * np.log(np.minimum(_SMALL_SHARE * pools, room) / rows_in_small), 0, 60)
        main = np.clip(main + _STEP * np.log(np.maximum(room - rows_in_small, 0.001 * pools) / rows_in_main), 0, 60)
        ghost += _STEP * (np.log(pools / np.maximum(left, 1e-12)) - ghost)
        most = np.maximum(pools - at_least, 0.05 * pools)
        window = np.minimum(longest, window + _STEP * np.log(most / np.maximum(rows_awaited, 1e-12)))
        if (quiet >= _QUIET_ROUNDS).any():
            still = quiet < _QUIET_ROUNDS
            state: list[Any] = [moving, pools, longest, small, main, ghost, window, misses, quiet]
            moving, pools, longest, small, main, ghost, window, misses, quiet = (of_pool[still] for of_pool in state)
            if not len(moving):
                break
    return found


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

    of_all = _our_misses(counts, use, np.tile(pools, len(LOOKAHEADS)), np.repeat(LOOKAHEADS, len(pools)))
    by_window = np.minimum.accumulate(of_all.reshape(len(LOOKAHEADS), len(pools)))

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
        lru_miss_curve=curve(_lru_misses(counts, use, pools)),
        assumed=True,
    )
