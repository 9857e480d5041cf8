"""Calibrated synthetic batches: skewed, drifting, and a function of (seed, batch index, rank) alone.

- *Skew*: every table's ids follow the ``popularity`` law of a published set. ``active_rows`` of a table's rows are in use at
  a time; a window is ``mean_uses × active_rows`` lookups, and in it the published figures hold.
- *Drift*: the rows in use slide over the table. ``drift`` is the share of them that is replaced in one window; the
  newcomer takes over the popularity of the row that leaves, so the figures hold throughout.
- *Scatter*: ids are a keyed permutation of those places, so that neither hot rows nor newcomers are neighbours.
- *Labels*: a planted model. The log odds are a linear function of the dense features plus an effect of every row looked
  up, a hash of the row; so the loss falls as rows are learned.

Nothing is remembered between batches: a resumed job asks for batch k and gets the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torchrec.datasets.utils import Batch

from ..errors import ConfigurationError
from .popularity import LAWS
from .scatter import Scatter, hash32, stream_key
from .source import TableShape, make_batch

# Streams of randomness, apart from each other by these words.
_SCATTER, _EFFECT, _PLANTED, _BATCH = 1, 2, 3, 4
# Held-out batches are batches from far beyond any job's end, over the rows in use at its last batch.
_HELD_OUT = 1 << 40


@dataclass(frozen=True)
class SyntheticConfig:
    """Sizes of the synthetic data. All tables are alike.

    ``calibration``: "meta2021", "meta2022" or "uniform" (every active row equally likely).
    ``active_share``: share of a table's rows in use at a time. ``drift``: share of those replaced in one window.
    ``signal``: standard deviation of the planted log odds.
    """

    table_count: int = 8
    rows: int = 200_000
    pooling: int = 4
    dense_dim: int = 13
    calibration: str = "meta2021"
    active_share: float = 0.8
    drift: float = 0.05
    signal: float = 2.0

    def __post_init__(self) -> None:
        rules = (
            ("table_count", self.table_count >= 1, "at least 1"),
            ("rows", self.rows >= 1, "at least 1"),
            ("pooling", self.pooling >= 1, "at least 1"),
            ("dense_dim", self.dense_dim >= 1, "at least 1"),
            ("active_share", 0 < self.active_share <= 1, "above 0 and at most 1"),
            ("drift", self.drift >= 0, "0 or more"),
            ("calibration", self.calibration in (*LAWS, "uniform"), f"one of {[*LAWS, 'uniform']}"),
        )
        for field, good, rule in rules:
            if not good:
                raise ConfigurationError(f"synthetic data: {field} must be {rule}, got {getattr(self, field)!r}")
        if self.drift > 0 and self.active_rows == self.rows:
            raise ConfigurationError(
                f"synthetic data: with active_share {self.active_share} all {self.rows} rows are in use and none can "
                "take over; lower active_share, or set drift to 0"
            )

    @property
    def active_rows(self) -> int:
        """Rows of one table that are in use at a time."""
        return max(1, round(self.rows * self.active_share))

    @property
    def window_lookups(self) -> int:
        """Lookups of one table in which the published figures hold."""
        mean_uses = LAWS[self.calibration].mean_uses if self.calibration in LAWS else 1.0
        return max(1, round(mean_uses * self.active_rows))


class SyntheticSource:
    """Endless training batches and a fixed held-out set, made on the fly."""

    def __init__(
        self,
        config: SyntheticConfig,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        held_out_batch_count: int = 16,
    ) -> None:
        if batch_size < 1:
            raise ConfigurationError(f"synthetic data: batch_size must be at least 1, got {batch_size}")
        self.config = config
        self.batch_size = batch_size
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._held_out_batch_count = held_out_batch_count
        self.tables = tuple(TableShape(f"t{t}", f"f{t}", config.rows, config.pooling) for t in range(config.table_count))
        self.dense_dim = config.dense_dim
        self.train_steps: int | None = None
        self.endless = True
        law = LAWS.get(config.calibration)
        self._quantiles = np.linspace(0, 1, 2) if law is None else law.rank_quantiles()
        self._slopes = np.diff(self._quantiles)
        active = config.active_rows
        # Spreads ranks over places, so that drift replaces hot and cold rows alike; golden section, made coprime.
        stride = max(1, round(active * 0.6180339887498949))
        while math.gcd(stride, active) > 1:
            stride += 1
        self._stride = stride
        self._scatters = [Scatter(config.rows, seed, _SCATTER, t) for t in range(config.table_count)]
        self._effect_keys = [stream_key(seed, _EFFECT, t) for t in range(config.table_count)]
        planted = np.random.default_rng([seed, _PLANTED])
        weights = planted.standard_normal(config.dense_dim)
        # Half of the log odds' variance from the dense features, half from the rows.
        spread = config.signal / math.sqrt(2)
        self._dense_weights = (weights * spread / np.linalg.norm(weights)).astype(np.float32)
        self._effect_scale = np.float32(spread * math.sqrt(3 / (config.table_count * config.pooling)))

    @property
    def name(self) -> str:
        """For reports."""
        c = self.config
        return f"synthetic ({c.calibration}: {c.table_count} tables × {c.rows:,} rows, pooling {c.pooling})"

    def _places(self, draws: np.ndarray, index: int) -> np.ndarray:
        """Uniform draws → places on the table, the rows in use at batch ``index``."""
        cells = draws * self._slopes.size
        cell = cells.astype(np.int64)
        cells -= cell
        share = self._slopes[cell]
        share *= cells
        share += self._quantiles[cell]
        active, rows = self.config.active_rows, self.config.rows
        share *= active
        places = share.astype(np.int64)
        np.minimum(places, active - 1, out=places)
        # The place with this residue modulo ``active`` that lies in [first, first + active). numpy divides by a scalar
        # much faster than it takes remainders, hence the long form.
        first = self._first_place(index)
        places *= self._stride
        places += active - first % active
        places -= places // active * active
        places += first % rows
        places -= rows * (places >= rows)
        return places

    def _first_place(self, index: int) -> int:
        lookups = index * self.batch_size * self._world_size * self.config.pooling
        return int(lookups * self.config.drift * self.config.active_rows / self.config.window_lookups)

    def batch(self, index: int, *, drift_index: int | None = None) -> Batch:
        """Global batch ``index`` as this rank sees it; ``drift_index`` overrides which rows are in use."""
        config, size = self.config, self.batch_size
        lookups = size * config.pooling
        rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence([self._seed, _BATCH, index, self._rank])))
        draws = rng.random((config.table_count, lookups))
        dense = rng.standard_normal((size, config.dense_dim), dtype=np.float32)
        values = np.empty((config.table_count, lookups), np.int64)
        log_odds = dense @ self._dense_weights
        for t in range(config.table_count):
            values[t] = self._scatters[t](self._places(draws[t], index if drift_index is None else drift_index))
            effect = hash32(values[t].view(np.uint64), self._effect_keys[t]).astype(np.float32)
            effect *= np.float32(2.0**-31)
            effect -= 1
            log_odds += self._effect_scale * effect.reshape(size, config.pooling).sum(1)
        labels = (rng.random(size, dtype=np.float32) < 1 / (1 + np.exp(-log_odds))).astype(np.float32)
        lengths = np.full(config.table_count * size, config.pooling, np.int32)
        return make_batch([t.feature for t in self.tables], values.reshape(-1), lengths, dense, labels)

    def train_batches(self, start: int = 0) -> Iterator[Batch]:
        """Training batches from ``start`` on, without end."""
        index = start
        while True:
            yield self.batch(index)
            index += 1

    def held_out_batches(self, after: int = 0) -> Iterator[Batch]:
        """Batches that no training sees, over the rows in use when ``after`` batches have been trained."""
        for i in range(self._held_out_batch_count):
            yield self.batch(_HELD_OUT + i, drift_index=after)
