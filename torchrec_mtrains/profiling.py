"""Measuring how a job's tables are used: ``profile`` reads batches of a data source and makes an ``AccessProfile`` of them.

It streams. Of every table, all rows are counted at 2 bits each, and a sample of them, drawn by hashing, is simulated in pools of
``CURVE_POINTS`` sizes for each of ``LOOKAHEADS`` (``kernels/csrc/table_profiler.h``). A sampled row costs 460
bytes (measured). One table at a time works on a thread, so those of a batch share the cores.

A curve is counted over the second half of the batches; the first half fills the pools. A long lookahead window
has seen fewer batches begin than were read; at least a third of those are counted. Pools that are not full by then have missed
nothing but first uses: ``full_rows`` of the curve says from which size on. What a batch misses is that of the sample ÷ its share of the
rows, at most the unique rows, which are counted exactly.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from typing import Any

import numpy as np
from torchrec.datasets.utils import Batch

from .data import BatchSource, TableShape
from .errors import ConfigurationError
from .kernels import _core
from .planner.access_profile import AccessProfile, MissCurve, TableAccess
from .planner.assumed_access import LOOKAHEADS, POPULARITY_SHARES, curve_sizes

LEAST_SAMPLED_ROWS = 50_000
MOST_SAMPLED_ROWS = 1_000_000
"""Of one table: its simulation takes 460 MB."""

DRIFT_WINDOWS = 8
_UNKNOWN_BATCHES = 512
_MOMENTS = 64


@dataclass(frozen=True)
class ProfileOptions:
    """``batches``: how many to read; None: all of a file. ``sample_share``: of a table's rows, at least ``LEAST_SAMPLED_ROWS`` and at most
    ``MOST_SAMPLED_ROWS``. ``prefetch_depth``: of the training pipeline, whose batches in flight keep their rows.
    ``row_bytes``: of one row, for bandwidths.
    """

    batches: int | None = None
    sample_share: float = 0.01
    prefetch_depth: int = 2
    row_bytes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batches is not None and self.batches < 2:
            raise ConfigurationError(f"profile: batches must be at least 2, one to warm up and one to count, got {self.batches}")
        if not 0 < self.sample_share <= 1:
            raise ConfigurationError(f"profile: sample_share must be above 0 and at most 1, got {self.sample_share}")
        if self.prefetch_depth < 0:
            raise ConfigurationError(f"profile: prefetch_depth must be at least 0, got {self.prefetch_depth}")


class TableMeter:
    """One table of a job, measured batch by batch. ``batches``: how many there will be, as far as known."""

    def __init__(self, table: TableShape, batch_samples: int, batches: int | None, options: ProfileOptions) -> None:
        self.table, self._batch_samples, self._options = table, batch_samples, options
        self._sampled = min(table.rows, max(LEAST_SAMPLED_ROWS, min(MOST_SAMPLED_ROWS, round(table.rows * options.sample_share))))
        self._drift_batches = max(1, (batches or _UNKNOWN_BATCHES) // DRIFT_WINDOWS)
        self._batches, self._every = 0, 1
        self._moments: list[list[dict[str, Any]]] = []
        self._native: Any = None

    def _begin(self, ids: np.ndarray) -> None:
        """With pools that can hold a batch like this one."""
        self._sizes = curve_sizes(self.table.rows, len(np.unique(ids)))
        self._native = _core.TableProfiler(
            self.table.rows,
            self._sampled,
            self._options.seed,
            self._sizes,
            list(LOOKAHEADS),
            self._options.prefetch_depth,
            self._drift_batches,
        )
        self._moments.append(self._counted())

    def push(self, ids: np.ndarray) -> None:
        """The ids of one global batch, (n,) int32 or int64.

        Raises: IdOutOfRangeError.
        """
        if self._native is None:
            self._begin(ids)
        self._native.push(ids)
        self._batches += 1
        if self._batches % self._every == 0:
            self._moments.append(self._counted())
            if len(self._moments) > _MOMENTS:
                self._moments = self._moments[::2]
                self._every *= 2

    def _counted(self) -> list[dict[str, Any]]:
        """Misses so far, of each window and of LRU, kept at some moments: which of them is the middle is known at the end."""
        windows, misses = self._native.pools(), self._native.lru_misses()
        lru = {"lookahead": 0, "batches": self._batches, "misses": misses, "write_backs": misses, "resident": windows[0]["resident"]}
        return [*windows, lru]

    def access(self, ended: bool) -> TableAccess:
        """What was measured. ``ended``: the data have no more batches, so lookahead windows are emptied, as a job's are."""
        if ended:
            self._native.finish()
        self._moments.append(self._counted())
        counts, end, batches = self._native.counts(), self._moments[-1], self._batches
        unique, lookups = counts["unique_rows"] / batches, counts["lookups"] / batches
        curves = [self._curve(window, counts["used_rows"], unique) for window, at_end in enumerate(end) if at_end["batches"]]
        reuse, ranges = np.array(counts["sampled_reuse"]), np.array(counts["lookups_of_range"])
        return TableAccess(
            name=self.table.name,
            rows=self.table.rows,
            batch_samples=self._batch_samples,
            batches=batches,
            lookups_per_batch=lookups,
            unique_rows_per_batch=unique,
            used_rows=counts["used_rows"],
            unique_rows_by_samples=self._unique_rows_by_samples(counts, unique),
            lookup_share_by_row_range=_shares(ranges),
            lookup_share_by_popularity=self._popularity(counts["lookups"]),
            reuse_batches=_shares(reuse),
            drift=self._drift(counts["sampled_windows"]),
            drift_batches=self._drift_batches,
            miss_curves=tuple(curves[:-1]),
            lru_miss_curve=curves[-1],
            row_bytes=self._options.row_bytes,
        )

    def _curve(self, window: int, used_rows: int, unique: float) -> MissCurve:
        moments = [moment[window] for moment in self._moments]
        last, half = moments[-1], self._batches / 2
        first = max((m for m in moments if m["batches"] <= min(half, last["batches"] * 2 / 3)), key=lambda m: m["batches"])
        scale = self.table.rows / self._sampled / (last["batches"] - first["batches"])
        misses, write_backs = (
            np.minimum((np.array(last[name]) - first[name]) * scale, unique).tolist() for name in ("misses", "write_backs")
        )
        scaled = self._native.scaled_pools()
        full = [size for size, pool, resident in zip(self._sizes, scaled, first["resident"], strict=True) if 0 <= resident < pool]
        points = {0: (unique, unique)}
        for size, resident, missed, written in zip(self._sizes, last["resident"], misses, write_backs, strict=True):
            if unique <= size < used_rows and resident >= 0:
                points[size] = missed, written
        if 0 < used_rows < self.table.rows:
            points[used_rows] = misses[-1], 0.0
        points[self.table.rows] = 0.0, 0.0
        falling = np.minimum.accumulate([missed for missed, _ in points.values()])
        return MissCurve(
            pool_rows=tuple(points),
            misses_per_batch=tuple(falling.tolist()),
            write_backs_per_batch=tuple(written for _, written in points.values()),
            batch_samples=self._batch_samples,
            lookahead=last["lookahead"],
            sampled_share=self._sampled / self.table.rows,
            full_rows=full[0] if full else self.table.rows,
        )

    def _popularity(self, lookups: int) -> tuple[tuple[float, float], ...]:
        """From the cold end: a sample has its share of cold rows, and of the hottest too many or none."""
        uses = np.sort(self._native.uses_of_sample())[::-1]
        colder = uses.sum() - uses.cumsum(dtype=np.int64)
        places = [max(0, round(share * len(uses)) - 1) for share in POPULARITY_SHARES]
        shares = 1 - colder[places] * (self.table.rows / self._sampled) / max(1, lookups)
        return tuple(zip(POPULARITY_SHARES, np.clip(shares, 0, 1).tolist(), strict=True))

    def _unique_rows_by_samples(self, counts: dict[str, Any], unique: float) -> tuple[tuple[float, float], ...]:
        """Of parts of a batch and of the batch exact; what further batches add, mostly cold rows, by the sample."""
        batches, samples, of_batch = counts["batches"], self._batch_samples, counts["sampled_groups_of_1"]
        parts = (samples / 16, counts["unique_rows_of_sixteenth"] / batches), (samples / 4, counts["unique_rows_of_quarter"] / batches)
        points = [(part, rows) for part, rows in parts if part >= 1 and rows > 0]
        points.append((float(samples), unique))
        for scale in (4, 16):
            group = counts[f"sampled_groups_of_{scale}"]
            if group["complete"]:
                added = group["unique_rows"] / group["complete"] - of_batch["unique_rows"] / of_batch["complete"]
                points.append((float(samples * scale), min(float(self.table.rows), unique + added * self.table.rows / self._sampled)))
        return tuple(points)

    @staticmethod
    def _drift(windows: dict[str, int]) -> float:
        if windows["complete"] < 2 or not windows["unique_rows"]:
            return 0.0
        return (windows["fresh_rows"] / (windows["complete"] - 1)) / (windows["unique_rows"] / windows["complete"])


def _shares(counts: np.ndarray) -> tuple[float, ...]:
    return tuple((counts / max(1, counts.sum())).tolist())


def profile(source: BatchSource, options: ProfileOptions, on_batch: Callable[[int], None] | None = None) -> AccessProfile:
    """Measures the tables of ``source``, whose ``batch_size`` is the global one. ``on_batch`` is told how many samples were read.

    Raises: ConfigurationError when the data have fewer than 2 batches, or never end and ``options.batches`` does not end them;
    DataError, IdOutOfRangeError for data that are not what they should be.
    """
    if source.endless and options.batches is None:
        raise ConfigurationError("profile: these data never end; say how many batches to read (--batches)")
    known = [n for n in (options.batches, source.train_steps) if n is not None]
    meters = [TableMeter(table, source.batch_size, min(known, default=None), options) for table in source.tables]
    read = 0
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        pushed: list[Future[None]] = []
        for batch in islice(source.train_batches(), options.batches):
            ids = _ids(batch, source)
            _wait(pushed)
            pushed = [threads.submit(meter.push, of_table) for meter, of_table in zip(meters, ids, strict=True)]
            read += 1
            if on_batch:
                on_batch(source.batch_size)
        _wait(pushed)
    if read < 2:
        raise ConfigurationError(f"profile: the data have {read} batches of {source.batch_size} samples; a profile needs 2 at least")
    tables = [meter.access(ended=read != options.batches) for meter in meters]
    what = f"{source.name}; {read:,} batches of {source.batch_size:,} samples"
    return AccessProfile({t.name: t for t in tables}, what, datetime.now(timezone.utc).date().isoformat())


def _ids(batch: Batch, source: BatchSource) -> list[np.ndarray]:
    return [np.ascontiguousarray(batch.sparse_features[table.feature].values().numpy()) for table in source.tables]


def _wait(pushed: list[Future[None]]) -> None:
    for one in pushed:
        one.result()
