"""How the tables of a job are used: measured by ``mtrains profile``, or assumed (``assumed_access``), and saved as JSON.

A *batch* is a global one, the samples of all ranks together. A *miss* is a unique row of a batch that is not in the pool when the
batch is looked up. A curve's points are pool sizes and the misses a batch that our own policy has there in its steady state:

    (0, unique rows)      no pool: every row is missing
    simulated             where the pool can hold a batch and is smaller than what was used
    (used rows, first)    whatever was used fits: only rows used for the first time are missing
    (all rows, 0)         the table is in the pool

Between points misses fall linearly in the logarithm of the pool. Above ``full_rows`` no pool had filled up when the counting began: there
the curve is what the data were long enough to show, and an endless job has at least as many misses.

A table has a curve for each of several lookahead windows, of one set of sizes; between them misses go with the logarithm of the window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torchrec.distributed.types import CacheStatistics

from ..errors import ConfigurationError
from ..lookahead import useful_batches
from .profile_files import ProfileFormat

_FILES = ProfileFormat("access profile", 1, "mtrains profile")


def _require(good: bool, what: str) -> None:
    if not good:
        raise ConfigurationError(f"access profile: {what}; make it anew with mtrains profile")


@dataclass(frozen=True)
class MissCurve:
    """Misses a batch by pool size, for batches of ``batch_samples`` and a lookahead window of ``lookahead`` batches (None: each size has
    its own).

    ``write_backs_per_batch``: rows that leave the pool changed, at the same sizes. ``sampled_share``: of the rows, those that
    were simulated.
    """

    pool_rows: tuple[int, ...]
    misses_per_batch: tuple[float, ...]
    write_backs_per_batch: tuple[float, ...]
    batch_samples: int
    lookahead: int | None = 0
    sampled_share: float = 1.0
    full_rows: int = 0

    def __post_init__(self) -> None:
        points = len(self.pool_rows)
        lengths = len(self.misses_per_batch), len(self.write_backs_per_batch)
        _require(
            points >= 2 and lengths == (points, points), f"a curve has as many misses and write-backs as sizes, got {points}, {lengths}"
        )
        rising = self.pool_rows[0] == 0 and all(a < b for a, b in zip(self.pool_rows, self.pool_rows[1:], strict=False))
        _require(rising, f"the pool sizes of a curve rise from 0, got {self.pool_rows}")
        falling = all(a >= b >= 0 for a, b in zip(self.misses_per_batch, self.misses_per_batch[1:], strict=False))
        _require(falling, f"the misses of a curve never rise, got {self.misses_per_batch}")
        _require(self.batch_samples >= 1, f"batch_samples must be at least 1, got {self.batch_samples}")

    def misses(self, pool_rows: float) -> float:
        """Rows a batch that a pool of so many rows does not have."""
        return self._at(pool_rows, self.misses_per_batch)

    def write_backs(self, pool_rows: float) -> float:
        """Changed rows a batch that leave such a pool."""
        return self._at(pool_rows, self.write_backs_per_batch)

    def _at(self, pool_rows: float, values: tuple[float, ...]) -> float:
        sizes = np.log1p(np.maximum(0.0, np.array((pool_rows, *self.pool_rows), np.float64)))
        return float(np.interp(sizes[0], sizes[1:], values))


@dataclass(frozen=True)
class TableAccess:
    """How one table is used.

    ``unique_rows_by_samples``: (samples, unique rows of so many samples in a row), the batch among them.
    ``lookup_share_by_row_range``: by equal ranges of the rows. ``lookup_share_by_popularity``: (share of the rows, the most used
    first; share of the lookups that they have). ``reuse_batches``: of the uses of a row in a batch, the share whose last use was
    1, 2, 3-4, 5-8, … batches before; the last one: those without. ``drift``: share of a window's unique rows that the window before
    had not, windows of ``drift_batches``. ``miss_curves``: of our own policy, by rising lookahead. ``lru_miss_curve``: an LRU cache's,
    exact, for TorchRec's ``CacheStatistics``.
    """

    name: str
    rows: int
    batch_samples: int
    batches: int
    lookups_per_batch: float
    unique_rows_per_batch: float
    used_rows: int
    unique_rows_by_samples: tuple[tuple[float, float], ...]
    lookup_share_by_row_range: tuple[float, ...]
    lookup_share_by_popularity: tuple[tuple[float, float], ...]
    reuse_batches: tuple[float, ...]
    drift: float
    drift_batches: int
    miss_curves: tuple[MissCurve, ...]
    lru_miss_curve: MissCurve
    row_bytes: int | None = None
    assumed: bool = False

    def __post_init__(self) -> None:
        _require(
            self.rows >= 1 and self.batch_samples >= 1, f"table '{self.name}' needs rows and samples, got {self.rows}, {self.batch_samples}"
        )
        most = min(self.rows, self.lookups_per_batch)
        fits = 0 <= self.unique_rows_per_batch <= most * (1 + 1e-9)
        _require(fits, f"table '{self.name}' has {self.unique_rows_per_batch} unique rows a batch, more than its rows or lookups ({most})")
        windows = [curve.lookahead or 0 for curve in self.miss_curves]
        alike = len({curve.pool_rows for curve in self.miss_curves}) == 1 and windows == sorted(set(windows))
        _require(alike, f"table '{self.name}' needs curves of the same pool sizes by rising lookahead, got lookaheads {windows}")

    @property
    def pooling_factor(self) -> float:
        """Lookups a sample."""
        return self.lookups_per_batch / self.batch_samples

    def bytes_per_s(self, samples_per_s: float, row_bytes: int | None = None) -> float:
        """Bytes/s of rows that lookups read at so many samples/s: what the table asks of the memory it is in."""
        size = row_bytes or self.row_bytes
        if size is None:
            raise ConfigurationError(f"table '{self.name}': the profile does not know its row_bytes; give them")
        return self.pooling_factor * samples_per_s * size

    def unique_rows(self, batch_samples: int) -> float:
        """Unique rows of a batch of so many samples: measured where it was, linear in logarithms between and beyond, where it
        follows the last stretch, up to all rows."""
        samples, rows = np.log(np.maximum(1e-9, np.array(self.unique_rows_by_samples, np.float64))).T
        at = math.log(batch_samples)
        if len(samples) > 1 and at > samples[-1]:
            slope = (rows[-1] - rows[-2]) / (samples[-1] - samples[-2])
            log_rows = rows[-1] + slope * (at - samples[-1])
        elif at < samples[0]:
            log_rows = rows[0] + at - samples[0]
        else:
            log_rows = float(np.interp(at, samples, rows))
        return min(float(self.rows), self.pooling_factor * batch_samples, math.exp(log_rows))

    @cached_property
    def miss_curve(self) -> MissCurve:
        """``miss_curve_for`` the batches that were profiled, in a pipeline that is left its own choice of lookahead."""
        return self.miss_curve_for(self.batch_samples)

    def miss_curve_for(self, batch_samples: int, lookahead: int | None = None) -> MissCurve:
        """Our own policy's curve for batches of ``batch_samples``, with a lookahead window of so many of them.

        ``lookahead`` None: at each pool size what ``TieredTrainPipeline`` chooses by itself for a pool of that size. Whether a row is still
        in a pool depends on the rows used since its last use, hardly on the batches that these came in, and what a window is worth on the
        samples that it reaches. So for another batch misses a sample stay, up to the unique rows of the batch, and the window is converted
        to batches of the profile.
        """
        factor = batch_samples / self.batch_samples
        unique = self.unique_rows(batch_samples)
        sizes = self.miss_curves[0].pool_rows
        windows = [useful_batches(p / max(unique, 1)) if lookahead is None else lookahead for p in sizes]
        misses, write_backs = (
            [min(unique, self._in_window(k, w * factor, name) * factor) for k, w in enumerate(windows)]
            for name in ("misses_per_batch", "write_backs_per_batch")
        )
        misses[0] = unique
        return replace(
            self.miss_curves[0],
            misses_per_batch=tuple(np.minimum.accumulate(misses).tolist()),
            write_backs_per_batch=tuple(write_backs),
            batch_samples=batch_samples,
            lookahead=lookahead,
        )

    def _in_window(self, point: int, lookahead: float, values: str) -> float:
        """Of the curves' points with this number, at a window between theirs."""
        windows = [math.log1p(curve.lookahead or 0) for curve in self.miss_curves]
        return float(np.interp(math.log1p(lookahead), windows, [getattr(curve, values)[point] for curve in self.miss_curves]))


class TableCacheStatistics(CacheStatistics):
    """A table's LRU curve as TorchRec's planner asks for it, for tables in ``FUSED_UVM_CACHING``, whose cache is an LRU one by default.

    Unlike TorchRec's own ``EmbeddingOffloadStats`` it is no torch tensor, so that options with it are copied fast.
    """

    def __init__(self, access: TableAccess) -> None:
        self._rows, self._unique, self._curve = access.rows, access.unique_rows_per_batch, access.lru_miss_curve

    @property
    def expected_lookups(self) -> float:
        """Unique rows of a global batch."""
        return self._unique

    def expected_miss_rate(self, clf: float) -> float:
        """Misses ÷ unique rows with a cache of this share of the rows."""
        return min(1.0, self._curve.misses(clf * self._rows) / self._unique) if self._unique else 0.0

    @property
    def cacheability(self) -> float:
        """The area under the miss rate over the cache load factor: 0 for a table that any cache can hold."""
        sizes = np.union1d(np.linspace(0, 1, 129), np.array(self._curve.pool_rows) / self._rows)
        rates = np.array([self.expected_miss_rate(float(clf)) for clf in sizes])
        return float(((rates[1:] + rates[:-1]) / 2 * np.diff(sizes)).sum())


@dataclass(frozen=True)
class AccessProfile:
    """The tables of a job by name; ``source``: what was read, and how."""

    tables: Mapping[str, TableAccess]
    source: str
    date: str

    def cache_statistics(self, table: str) -> TableCacheStatistics:
        """For ``ParameterConstraints(cache_params=CacheParams(stats=…))``.

        Raises: ConfigurationError when the profile does not have the table.
        """
        return TableCacheStatistics(self.table(table))

    def table(self, name: str) -> TableAccess:
        """One table's.

        Raises: ConfigurationError when the profile does not have it.
        """
        if name not in self.tables:
            raise ConfigurationError(
                f"access profile: it has no table '{name}', only {', '.join(self.tables)}; profile the data of this job"
            )
        return self.tables[name]

    def save(self, path: str | Path) -> None:
        """Writes JSON, whole or not at all.

        Raises: ConfigurationError when the file cannot be written.
        """
        _FILES.save(path, {"source": self.source, "date": self.date, "tables": [asdict(table) for table in self.tables.values()]})

    @classmethod
    def load(cls, path: str | Path) -> AccessProfile:
        """What ``save`` wrote.

        Raises: ConfigurationError for what is no profile, or one of a newer version.
        """
        return _FILES.load(path, _profile)


def _profile(read: dict[str, Any]) -> AccessProfile:
    tables = [_table(of_table) for of_table in read["tables"]]
    return AccessProfile({t.name: t for t in tables}, read["source"], read["date"])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _table(content: dict[str, Any]) -> TableAccess:
    known = {f.name for f in fields(TableAccess)}
    values = {name: _tuples(value) for name, value in content.items() if name in known}
    values["miss_curves"] = tuple(map(_curve, content["miss_curves"]))
    values["lru_miss_curve"] = _curve(content["lru_miss_curve"])
    return TableAccess(**values)


def _curve(content: dict[str, Any]) -> MissCurve:
    return MissCurve(**{name: _tuples(value) for name, value in content.items()})
