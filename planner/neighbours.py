"""Misses that blocks of an SSD save: rows that announced batches want come along when their block is read for another row.

A curve counts what a pool misses by itself. Over a volume of blocks with lookahead, a row that is awaited and absent is brought by
any read of its block while the pool has a slot for it. That is for ``reach`` batches before its use: the lookahead window, or what the pool
has room for beside the batches in flight, if it keeps just the rows that are used again within ``reach`` and those that came along.

Which reads of its block there are follows from how a log is written: rows that leave the pool together lie in one block. So when a row
comes back ``age`` batches after its last use, its block was last written about then, and the B - 1 rows beside it are as old. They come
back as all rows do that a pool misses: ``returned(age)`` is the share of misses whose row was used last at most so many batches before, the
longest of the profile's ``reuse_batches``. A row beside that was read is not live there any more. With a share f of misses unspared, a
row is spared with probability ::

    1 - exp(-f · (B - 1) · (returned(age) - returned(age - reach)))

Rows that the profile saw for the first time have not been written for long. They lie with rows like them: each of these is read in a
batch with the probability of a first use, ÷ all rows of the table. f is what is left of the sum over all misses.

In a job that has just begun, first uses have no record to read, and are spared by nothing (``misses_and_reads``). What a profile saw for
the first time a job that goes on has used before: it has a record, and is spared as others are (``curve_over_ssd``).

Nothing in it is fitted (docs/calibrate.md has how well it predicts). Jobs whose samples use rows together are spared more: the volume
packs such rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..lookahead import MOST_BATCHES
from .access_profile import MissCurve, TableAccess

Floats = NDArray[np.float64]

_HALVINGS = 16
_AGES = 4  # of a power of two


def misses_and_reads(
    table: TableAccess, pool_rows: float, batch_samples: int, records_per_block: int, lookahead: int | None = None, prefetch_depth: int = 2
) -> tuple[float, float]:
    """Misses, and reads from the SSD, of a batch. ``lookahead`` as in ``TableAccess.miss_curve_for``."""
    curve = table.miss_curve_for(batch_samples, lookahead)
    missed = curve.misses(pool_rows)
    first_uses = min(missed, curve.misses(table.used_rows)) if table.used_rows < table.rows else 0.0
    again = missed - first_uses
    reads = float(_unspared(table, [again], [pool_rows], batch_samples, records_per_block, lookahead, prefetch_depth, first_uses=False)[0])
    return first_uses + reads, reads


def curve_over_ssd(table: TableAccess, batch_samples: int, records_per_block: int, lookahead: int | None = None) -> MissCurve:
    """``miss_curve_for``, less what neighbours spare in a job that goes on. Write-backs stay: a row that came along leaves too."""
    curve = table.miss_curve_for(batch_samples, lookahead)
    if records_per_block == 1:
        return curve  # nothing lies beside a row
    missed = _unspared(table, curve.misses_per_batch, curve.pool_rows, batch_samples, records_per_block, lookahead)
    return replace(curve, misses_per_batch=tuple(np.minimum.accumulate(missed).tolist()))


def _unspared(
    table: TableAccess,
    missed: Sequence[float],
    pool_rows: Sequence[float],
    batch_samples: int,
    records_per_block: int,
    lookahead: int | None,
    prefetch_depth: int = 2,
    *,
    first_uses: bool = True,
) -> Floats:
    """Of so many misses a batch, of rows with records, those that are read, by size of the pool. ``first_uses``: are among them.

    Shapes: (n,), (n,) → (n,).
    """
    factor = batch_samples / table.batch_samples
    in_flight, window = table.unique_rows((prefetch_depth + 1) * batch_samples), MOST_BATCHES if lookahead is None else lookahead
    room, missed_rows = np.array(pool_rows, np.float64) - in_flight, np.array(missed, np.float64)
    share = np.minimum(1.0, missed_rows / max(1.0, table.unique_rows(batch_samples)))[:, None]

    # Of misses, by time since the last use: the longest times of all uses. Shapes: (n, buckets).
    longest = 2.0 ** np.arange(len(table.reuse_batches) - 1)
    shortest = np.where(longest > 1, longest / 2, 0.0)
    never, uses = (table.reuse_batches[-1] if first_uses else 0.0), np.array(table.reuse_batches[:-1])
    longer = never + np.cumsum(uses[::-1])[::-1] - uses
    taken = np.clip(share - longer, 0.0, uses)
    from_ = longest - (longest - shortest) * taken / np.maximum(uses, 1e-12)
    weight = taken / np.maximum(share, 1e-12)
    never_weight = np.minimum(never, share) / np.maximum(share, 1e-12)

    ends = np.stack([from_, np.broadcast_to(longest, from_.shape)], axis=2).reshape(len(missed_rows), -1)
    up_to = np.stack([np.cumsum(weight, axis=1) - weight, np.cumsum(weight, axis=1)], axis=2).reshape(len(missed_rows), -1)

    def returned(ages: Floats) -> Floats:
        """Of misses, the share whose last use was at most so many batches before. Shapes: (n, ages) → (n, ages)."""
        return np.array([np.interp(*of_pool) for of_pool in zip(ages, ends, up_to, strict=True)])

    middles = (np.arange(_AGES) + 0.5) / _AGES
    ages = (from_[:, :, None] + (longest - from_)[:, :, None] * middles).reshape(len(missed_rows), -1)
    returned_by_age = returned(ages)
    weights = np.hstack([np.repeat(weight / _AGES, _AGES, axis=1), never_weight])
    reads_of_first = never_weight * missed_rows[:, None] / table.rows / factor  # a batch of the profile, of a row beside

    low, high = np.zeros(len(missed_rows)), np.ones(len(missed_rows))
    for _ in range(_HALVINGS):  # the more is read, the more is spared; and the less has come along, the longer is the reach
        unspared = (low + high) / 2
        reach = np.minimum(window * factor, _reach(table, room, (1 - unspared) * missed_rows / factor))[:, None]
        beside = np.hstack([returned_by_age - returned(ages - reach), reach * reads_of_first])
        left = (weights * np.exp(-(records_per_block - 1) * unspared[:, None] * beside)).sum(axis=1)
        low, high = np.where(unspared < left, unspared, low), np.where(unspared < left, high, unspared)
    return np.asarray(missed_rows * high)


def _reach(table: TableAccess, slots: Floats, came: Floats) -> Floats:
    """Batches of the profile, so that as many slots hold every row from a use to the next one, where that is within so many, and rows that
    came along, so many a batch, half as long. Shapes: (n,), (n,) → (n,)."""
    ends = np.concatenate([[0.0], 2.0 ** np.arange(len(table.reuse_batches) - 1)])
    kept = table.unique_rows_per_batch * np.array(table.reuse_batches[:-1]) * (ends[:-1] + 1 + ends[1:]) / 2
    needed = np.concatenate([[0.0], np.cumsum(kept)]) + came[:, None] * ends / 2
    return np.array([np.interp(of_pool, need, ends) for of_pool, need in zip(slots, needed, strict=True)])
