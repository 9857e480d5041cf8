"""Criteo's Kaggle display-advertising format, streamed: label, 13 integers, 26 hexadecimal categories, tab-separated.

Any of the 39 features may be missing (an empty field). A category is a 32-bit hexadecimal number and goes to row
``value % rows`` of its table; a missing one goes to row 0. Integers x become log(1 + max(x, 0)), missing ones 0.

The file is in order of time: the lines that begin in its last ``held_out_share`` bytes are held out. Memory is one batch.
A resumed job skips the lines of the batches that it has trained.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from torchrec.datasets.utils import Batch

from ..errors import ConfigurationError, DataError
from .source import TableShape, make_batch

DENSE_COUNT = 13
CATEGORY_COUNT = 26
FIELD_COUNT = 1 + DENSE_COUNT + CATEGORY_COUNT
# The longest well-formed line: 13 integers of 20 digits and 26 categories of 8, with room to spare.
_LINE_LIMIT_BYTES = 4096
_DIGITS = b"0123456789"
_HEX_DIGITS = b"0123456789abcdefABCDEF"


class CriteoSource:
    """Batches streamed from one uncompressed file of Criteo's Kaggle format."""

    def __init__(
        self,
        path: str | Path,
        batch_size: int,
        *,
        rows: int = 100_000,
        epochs: int = 1,
        held_out_share: float = 0.1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for field, value, good, rule in (
            ("rows", rows, rows >= 1, "at least 1"),
            ("batch_size", batch_size, batch_size >= 1, "at least 1"),
            ("held_out_share", held_out_share, 0 < held_out_share < 1, "between 0 and 1"),
        ):
            if not good:
                raise ConfigurationError(f"criteo: {field} must be {rule}, got {value}")
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file; criteo:PATH names one uncompressed Kaggle TSV file")
        self.batch_size, self.epochs = batch_size, epochs
        self._rows = rows
        self._rank, self._world_size = rank, world_size
        self._size_bytes = os.path.getsize(self.path)
        self._split_byte = round(self._size_bytes * (1 - held_out_share))
        self.tables = tuple(TableShape(f"c{c}", f"cat_{c}", rows) for c in range(CATEGORY_COUNT))
        self.dense_dim = DENSE_COUNT
        self.train_steps: int | None = None
        self.endless = False
        self.name = f"criteo ({self.path.name}, {rows:,} rows a table)"

    def _fail(self, line: int, what: str) -> DataError:
        return DataError(f"{self.path}, line {line}: {what}")

    def _parse(self, lines: list[tuple[int, bytes]]) -> Batch:
        labels = np.empty(len(lines), np.float32)
        dense = np.zeros((len(lines), DENSE_COUNT), np.float32)
        values = np.zeros((CATEGORY_COUNT, len(lines)), np.int64)
        for i, (number, line) in enumerate(lines):
            cells = line.rstrip(b"\r\n").split(b"\t")
            if len(cells) != FIELD_COUNT:
                raise self._fail(
                    number, f"expected {FIELD_COUNT} tab-separated fields (label, 13 integers, 26 categories), "
                    f"got {len(cells)}"
                )  # fmt: skip
            if cells[0] not in (b"0", b"1"):
                raise self._fail(number, f"the label must be 0 or 1, got {cells[0].decode(errors='replace')!r}")
            labels[i] = cells[0] == b"1"
            for c, cell in enumerate(cells[1 : 1 + DENSE_COUNT]):
                if cell:
                    dense[i, c] = self._integer(number, c, cell, 10)
            for c, cell in enumerate(cells[1 + DENSE_COUNT :]):
                if cell:
                    values[c, i] = self._integer(number, DENSE_COUNT + c, cell, 16) % self._rows
        np.log1p(np.maximum(dense, 0, out=dense), out=dense)
        lengths = np.ones(values.size, np.int32)
        return make_batch([t.feature for t in self.tables], values.reshape(-1), lengths, dense, labels)

    def _integer(self, line: int, feature: int, cell: bytes, base: int) -> int:
        # int() alone would also take blanks, underscores, "0x" and "+".
        digits = _HEX_DIGITS if base == 16 else _DIGITS
        bare = cell[1:] if base == 10 and cell.startswith(b"-") else cell
        value = int(cell, base) if bare and not bare.strip(digits) else 1 << 63
        if not -(1 << 63) < value < 1 << 63:
            kind = "a hexadecimal category" if base == 16 else "an integer"
            raise self._fail(line, f"field {feature + 2} must be {kind} or empty, got {cell.decode(errors='replace')!r}")
        return value

    def _lines(self, *, held_out: bool) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            position, number = 0, 0
            while True:
                line = file.readline(_LINE_LIMIT_BYTES)
                if not line:
                    return
                number += 1
                if len(line) == _LINE_LIMIT_BYTES and not line.endswith(b"\n"):
                    raise self._fail(number, f"longer than {_LINE_LIMIT_BYTES} bytes; is this a TSV text file?")
                if (position >= self._split_byte) == held_out:
                    yield number, line
                elif not held_out:
                    return
                position += len(line)

    def _batches(self, lines: Iterator[tuple[int, bytes]], skip: int) -> Iterator[Batch]:
        """Whole global batches; this rank's part of each. ``skip`` batches are read over, unparsed."""
        whole = self.batch_size * self._world_size
        if skip:
            next(islice(lines, skip * whole - 1, None), None)
        while len(chunk := list(islice(lines, whole))) == whole:
            yield self._parse(chunk[self._rank * self.batch_size : (self._rank + 1) * self.batch_size])

    def _batches_per_epoch(self) -> int:
        count = sum(1 for _ in self._lines(held_out=False))
        return count // (self.batch_size * self._world_size)

    def train_batches(self, start: int = 0) -> Iterator[Batch]:
        """Training batches from global batch ``start`` on; an epoch's last, incomplete batch is dropped.

        Raises: DataError at the first malformed line.
        """
        epoch = 0
        if start:
            per_epoch = self._batches_per_epoch()
            if per_epoch:
                epoch, start = divmod(start, per_epoch)
        while epoch < self.epochs:
            empty = True
            for batch in self._batches(self._lines(held_out=False), start):
                empty = False
                yield batch
            if empty and start == 0:
                raise DataError(
                    f"{self.path}: the training part holds less than one batch of {self.batch_size} × "
                    f"{self._world_size} ranks; lower the batch size"
                )
            epoch, start = epoch + 1, 0

    def held_out_batches(self, after: int = 0) -> Iterator[Batch]:
        """The last lines of the file, whole batches only."""
        yield from self._batches(self._lines(held_out=True), 0)
