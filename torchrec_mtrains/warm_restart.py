"""Which rows are hot, saved beside a checkpoint, so that a job that resumes does not begin with empty pools.

One file a rank, ``resident_rows.rank_<r>.bin``. All numbers are little-endian:

    file    magic "MTRHOT\\r\\n" | version u32 | table count u32 | table* | crc32 u32 of all before
    table   name length u32 | name | row count u32 | rows u32*

Tables are those of the rank's groups in their order; rows are in the order of eviction, the next victim first. The file is
advice: it says what to read, never what a row is. One that is damaged, missing or another model's leaves the pools cold.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .kernels.tiered_tbe import TieredTBE

_MAGIC = b"MTRHOT\r\n"
_VERSION = 1


class _NoAdviceError(Exception):
    """Why the file cannot be used."""


def file_of(folder: Path, rank: int) -> Path:
    """The file of one rank in a checkpoint's folder."""
    return folder / f"resident_rows.rank_{rank}.bin"


def write(path: Path, groups: Sequence[TieredTBE]) -> None:
    """Save which rows are in the pools. Raises: OSError."""
    parts = [_MAGIC, struct.pack("<II", _VERSION, sum(len(g.tables) for g in groups))]
    for group in groups:
        for table, rows in zip(group.tables, group.resident_rows(), strict=True):
            name = table.name.encode()
            parts += [struct.pack("<I", len(name)), name, struct.pack("<I", len(rows)), rows.astype("<u4").tobytes()]
    data = b"".join(parts)
    path.write_bytes(data + struct.pack("<I", zlib.crc32(data)))


def read(path: Path) -> list[tuple[str, np.ndarray]]:
    """Table names and their rows, as saved. Shapes: rows (n,) int64."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise _NoAdviceError(e.strerror) from e
    body = data[:-4]
    if len(data) < 20 or data[:8] != _MAGIC or zlib.crc32(body) != struct.unpack("<I", data[-4:])[0]:
        raise _NoAdviceError("it is damaged")
    version, count = struct.unpack_from("<II", body, 8)
    if version != _VERSION:
        raise _NoAdviceError(f"its format {version} is not {_VERSION}")
    tables, at = [], 16
    for _ in range(count):
        (length,) = struct.unpack_from("<I", body, at)
        name = body[at + 4 : at + 4 + length].decode()
        (rows,) = struct.unpack_from("<I", body, at + 4 + length)
        at += 8 + length
        tables.append((name, np.frombuffer(body, "<u4", rows, at).astype(np.int64)))
        at += 4 * rows
    return tables


def warm(path: Path, groups: Sequence[TieredTBE]) -> int:
    """Read the rows that were hot back into the pools, as many as fit. Returns the rows read; 0, and a warning, without advice.

    Raises: DamagedRecordError, VolumeIoError from the reads themselves.
    """
    tables = [(group, i) for group in groups for i in range(len(group.tables))]
    try:
        saved = read(path)
        if [name for name, _ in saved] != [group.tables[i].name for group, i in tables]:
            raise _NoAdviceError("it belongs to other tables")
    except _NoAdviceError as e:
        warnings.warn(f"{path}: {e}; the job resumes with empty slot pools, slower at first", RuntimeWarning, stacklevel=2)
        return 0
    return sum(group.warm(i, rows[rows < group.tables[i].rows]) for (group, i), (_, rows) in zip(tables, saved, strict=True))
