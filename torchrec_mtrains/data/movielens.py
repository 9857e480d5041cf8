"""MovieLens in RecBole's atomic format (``ml-100k.inter``): who rated what, when; a rating of 4 or 5 is a click.

The file is tab-separated; its header names and types the columns (``user_id:token``, ``timestamp:float``). Every token
column becomes a table (tokens numbered in order of first appearance), every other float column but the rating becomes a
dense feature, and the time stamp six: its place in the data's span, hour and weekday as sines and cosines, and a constant.

The split is by time: the last ``held_out_share`` of the ratings are held out, so nothing is trained on its own future.
Their users and items keep their rows, trained or not. Training batches are a seeded shuffle of the rest, a new one each
epoch; the last, incomplete batch of an epoch is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torchrec.datasets.utils import Batch

from ..errors import ConfigurationError, DataError
from .source import TableShape, make_batch

_SECONDS_A_DAY = 86_400.0
_SHUFFLE = 1


def find_interactions(path: str | Path) -> Path:
    """The ``.inter`` file at ``path``, which may also be the folder that holds exactly one.

    Raises: DataError when there is none, or more than one.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.inter"))
        if len(found) != 1:
            raise DataError(f"{path}: expected exactly one .inter file in this folder, found {len(found)}")
        return found[0]
    if not path.is_file():
        raise DataError(f"{path}: no such file; get ml-100k with: python examples/get_movielens.py")
    return path


def _header(path: Path, line: str) -> list[tuple[str, str]]:
    columns = []
    for cell in line.rstrip("\r\n").split("\t"):
        name, _, kind = cell.partition(":")
        if not name or kind not in ("token", "float"):
            raise DataError(f"{path}, line 1: a header cell must read name:token or name:float, got {cell!r}")
        columns.append((name, kind))
    names = [name for name, _ in columns]
    for needed in ("user_id", "item_id", "rating", "timestamp"):
        if needed not in names:
            raise DataError(f"{path}, line 1: the header must name {needed}, got {names}")
    return columns


class MovieLensSource:
    """The ratings of one ``.inter`` file, in memory (24 bytes a rating and token column)."""

    def __init__(
        self,
        path: str | Path,
        batch_size: int,
        *,
        epochs: int = 1,
        held_out_share: float = 0.1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 < held_out_share < 1:
            raise ConfigurationError(f"movielens: held_out_share must lie between 0 and 1, got {held_out_share}")
        self.path = find_interactions(path)
        self.batch_size, self.epochs = batch_size, epochs
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._read()
        split = round(len(self._labels) * (1 - held_out_share))
        self.batches_per_epoch = split // (batch_size * world_size)
        self.train_count, self.held_out_count = split, len(self._labels) - split
        if self.batches_per_epoch == 0 or self.held_out_count == 0:
            raise ConfigurationError(
                f"movielens: {self.path} has {split} ratings to train on and {self.held_out_count} held out, which is "
                f"less than one batch of {batch_size} × {world_size} ranks; lower the batch size"
            )
        self.train_steps: int | None = epochs * self.batches_per_epoch
        self.endless = False
        self.name = f"movielens ({self.path.name}: {len(self._labels):,} ratings)"

    def _read(self) -> None:
        with self.path.open(encoding="utf-8") as file:
            columns = _header(self.path, file.readline())
            tokens: dict[str, dict[str, int]] = {name: {} for name, kind in columns if kind == "token"}
            ids: dict[str, list[int]] = {name: [] for name in tokens}
            floats: dict[str, list[float]] = {name: [] for name, kind in columns if kind == "float"}
            for number, line in enumerate(file, start=2):
                cells = line.rstrip("\r\n").split("\t")
                if len(cells) != len(columns):
                    raise DataError(
                        f"{self.path}, line {number}: expected {len(columns)} tab-separated fields as in the header, got {len(cells)}"
                    )
                for (name, kind), cell in zip(columns, cells, strict=True):
                    if kind == "token":
                        ids[name].append(tokens[name].setdefault(cell, len(tokens[name])))
                        continue
                    floats[name].append(self._number(number, name, cell))
        times = np.array(floats.pop("timestamp"), np.float64)
        order = np.argsort(times, kind="stable")
        ratings = np.array(floats.pop("rating"))[order]
        self._ids = np.array([ids[name] for name in tokens], np.int64)[:, order]
        self._labels = (ratings >= 4).astype(np.float32)
        others = [np.array(column, np.float64)[order] for column in floats.values()]
        self._dense = self._dense_features(times[order], others)
        self.dense_dim = self._dense.shape[1]
        self.tables = tuple(TableShape(name.removesuffix("_id"), name, len(numbers)) for name, numbers in tokens.items())

    def _number(self, line: int, name: str, cell: str) -> float:
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{self.path}, line {line}: {name} must be a number, got {cell!r}")
        return value

    @staticmethod
    def _dense_features(times: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
        if times.size == 0:
            return np.empty((0, 6 + len(others)), np.float32)
        span = max(times[-1] - times[0], 1.0)
        day = 2 * np.pi * (times % _SECONDS_A_DAY) / _SECONDS_A_DAY
        week = 2 * np.pi * (times % (7 * _SECONDS_A_DAY)) / (7 * _SECONDS_A_DAY)
        columns = [(times - times[0]) / span, np.sin(day), np.cos(day), np.sin(week), np.cos(week)]
        columns += [np.ones_like(times)]
        columns += [(column - column.mean()) / max(column.std(), 1e-12) for column in others]
        return np.stack(columns, axis=1).astype(np.float32)

    def _batch(self, samples: np.ndarray) -> Batch:
        values = self._ids[:, samples]
        return make_batch(
            [t.feature for t in self.tables],
            values.reshape(-1),
            np.ones(values.size, np.int32),
            self._dense[samples],
            self._labels[samples],
        )

    def train_batches(self, start: int = 0) -> Iterator[Batch]:
        """Training batches from global batch ``start`` to the end of the last epoch."""
        for epoch in range(start // self.batches_per_epoch, self.epochs):
            order = np.random.default_rng([self._seed, _SHUFFLE, epoch]).permutation(self.train_count)
            first = start - epoch * self.batches_per_epoch if epoch * self.batches_per_epoch < start else 0
            for k in range(first, self.batches_per_epoch):
                begin = (k * self._world_size + self._rank) * self.batch_size
                yield self._batch(order[begin : begin + self.batch_size])

    def held_out_batches(self, after: int = 0) -> Iterator[Batch]:
        """The last ratings in time, each once; the ranks take turns and get the same number of batches, some shorter."""
        mine = np.arange(self.train_count + self._rank, len(self._labels), self._world_size)
        count = -(-self.held_out_count // (self.batch_size * self._world_size))
        for part in np.array_split(mine, count):
            yield self._batch(part)
