"""The stores that are compared: the same records in each, on the same disk, and how each is read cold.

Records are noise that their row determines. RocksDB reads around the page cache and has a block cache too small
to matter; LMDB and mmap can only read through the page cache, so they are made to forget what it holds before every batch
(``forget``), and the bytes fetched from storage are counted beside every figure.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torchrec_mtrains.kernels import SsdVolume
from torchrec_mtrains.planner.perf_model import QUEUE_DEPTH

KEY_BYTES = 8


_NOISE = np.random.default_rng(0).integers(0, 256, 16 << 20, dtype=np.uint8)


def _starts(rows: np.ndarray) -> np.ndarray:
    return rows * 7919 % (len(_NOISE) - (1 << 17))


def first_bytes(rows: np.ndarray) -> np.ndarray:
    """The first byte of each row's record."""
    return _NOISE[_starts(rows)]


def records(rows: np.ndarray, record_bytes: int) -> np.ndarray:
    """Shape (n, record_bytes) uint8. Noise: weights do not compress."""
    return np.lib.stride_tricks.sliding_window_view(_NOISE, record_bytes)[_starts(rows)]


def values(rows: np.ndarray, record_bytes: int) -> list[bytes]:
    """The same, record by record."""
    return _split(records(rows, record_bytes).tobytes(), record_bytes)


def shuffled(rows: int, part: int) -> Iterator[np.ndarray]:
    """All rows in parts, in an order in which neighbours of a block are no neighbours."""
    order = np.random.default_rng(1).permutation(rows)
    for first in range(0, rows, part):
        yield order[first : first + part]


def in_order(rows: int, part: int) -> Iterator[np.ndarray]:
    for first in range(0, rows, part):
        yield np.arange(first, min(rows, first + part))


def keys(rows: np.ndarray) -> list[bytes]:
    return _split(rows.astype(">i8").tobytes(), KEY_BYTES)


def _split(packed: bytes, size: int) -> list[bytes]:
    return [packed[i : i + size] for i in range(0, len(packed), size)]


class Ssd:
    """``SsdVolume``, with room for every record twice."""

    def __init__(self, folder: Path, rows: int, record_bytes: int, depth: int = QUEUE_DEPTH) -> None:
        folder.mkdir()
        self.record_bytes = record_bytes
        self.volume = SsdVolume((str(folder),), rows * (record_bytes + 64) * 2 + (256 << 20), depth=depth)
        self.table = self.volume.table("t", row_count=rows, record_bytes=record_bytes)
        for part in shuffled(rows, 50_000):
            self.table.put(part, records(part, record_bytes))
        self.volume.flush()
        self.out = np.empty((0, record_bytes), dtype=np.uint8)

    def on(self, threads: int) -> None:
        """Nothing to do: one caller keeps the device busy."""

    def prepare(self, rows: np.ndarray) -> np.ndarray:
        if len(self.out) != len(rows):
            self.out = np.empty((len(rows), self.record_bytes), dtype=np.uint8)
        return rows

    def read(self, rows: np.ndarray) -> np.ndarray:
        self.table.get(rows, self.out)
        return self.out[:, 0]

    def forget(self) -> None:
        """Nothing to do: it reads with O_DIRECT."""

    def close(self) -> None:
        self.volume.close()


class _Threaded:
    """A store whose calls block their thread: rows are split over as many as ``on`` said last."""

    threads = 0

    def on(self, threads: int) -> None:
        if threads != self.threads:
            self.threads, self.pool = threads, ThreadPoolExecutor(threads)

    def parts(self, rows: np.ndarray) -> list[np.ndarray]:
        return np.array_split(rows, self.threads)


class RocksDb(_Threaded):
    """rocksdict's ``MultiGet`` and ``WriteBatch``; no log ahead of writes, as ours has none between checkpoints."""

    def __init__(self, folder: Path, rows: int, record_bytes: int) -> None:
        from rocksdict import AccessType, BlockBasedOptions, Cache, DBCompressionType, Options, Rdict, WriteOptions

        table = BlockBasedOptions()
        table.set_block_cache(Cache(8 << 20))
        table.set_bloom_filter(10, False)
        settings = Options(raw_mode=True)
        settings.create_if_missing(True)
        settings.set_use_direct_reads(True)
        settings.set_use_direct_io_for_flush_and_compaction(True)
        settings.set_compression_type(DBCompressionType.none())
        settings.increase_parallelism(os.cpu_count() or 1)
        settings.set_block_based_table_factory(table)
        self.database = Rdict(str(folder), settings, access_type=AccessType.read_write())
        unlogged = WriteOptions()
        unlogged.disable_wal = True
        self.database.set_write_options(unlogged)
        self.record_bytes = record_bytes
        for part in in_order(rows, 50_000):
            self.database.write(self.batch(part))
        self.database.flush()
        self.database.compact_range(None, None)

    def batch(self, rows: np.ndarray) -> Any:
        from rocksdict import WriteBatch

        batch = WriteBatch(raw_mode=True)
        for key, value in zip(keys(rows), values(rows, self.record_bytes), strict=True):
            batch.put(key, value)
        return batch

    def prepare(self, rows: np.ndarray) -> list[list[bytes]]:
        return [keys(part) for part in self.parts(rows)]

    def read(self, prepared: list[list[bytes]]) -> np.ndarray:
        found = self.pool.map(lambda part: self.database[part], prepared)
        return np.array([value[0] for part in found for value in part], dtype=np.uint8)

    def forget(self) -> None:
        """Nothing to do: it reads around the page cache."""

    def close(self) -> None:
        self.database.close()


class Lmdb(_Threaded):
    """LMDB without read-ahead. Its B-tree lives in the page cache alone; to forget is to close it and drop its pages."""

    def __init__(self, folder: Path, rows: int, record_bytes: int) -> None:
        self.folder, self.bytes = folder, rows * (record_bytes + 64) * 2 + (64 << 20)
        self.environment = self._open()
        if self.environment.stat()["entries"] == 0:
            with self.environment.begin(write=True) as transaction:
                for part in in_order(rows, 50_000):
                    transaction.cursor().putmulti(list(zip(keys(part), values(part, record_bytes), strict=True)), append=True)
            self.environment.sync(True)

    def _open(self) -> Any:
        import lmdb

        return lmdb.open(str(self.folder), map_size=self.bytes, readahead=False, sync=False, max_readers=64)

    def prepare(self, rows: np.ndarray) -> list[list[bytes]]:
        return [keys(part) for part in self.parts(rows)]

    def read(self, prepared: list[list[bytes]]) -> np.ndarray:
        def one(part: list[bytes]) -> list[bytes]:
            with self.environment.begin() as transaction:
                return [transaction.get(key) for key in part]

        return np.array([value[0] for part in self.pool.map(one, prepared) for value in part], dtype=np.uint8)

    def forget(self) -> None:
        self.environment.close()
        drop_pages(self.folder / "data.mdb")
        self.environment = self._open()

    def close(self) -> None:
        self.environment.close()


class Mapped(_Threaded):
    """A plain file of records, mapped: each row is a page fault. To forget is to unmap its pages and drop them."""

    def __init__(self, file: Path, rows: int, record_bytes: int) -> None:
        self.file = file
        if not file.exists():
            with file.open("wb") as out:
                for part in in_order(rows, 50_000):
                    out.write(records(part, record_bytes).tobytes())
                out.flush()
                os.fsync(out.fileno())
        with file.open("rb") as opened:
            self.map = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
        self.map.madvise(mmap.MADV_RANDOM)
        self.rows_of_file = np.frombuffer(self.map, dtype=np.uint8).reshape(rows, record_bytes)

    def prepare(self, rows: np.ndarray) -> list[np.ndarray]:
        return self.parts(rows)

    def read(self, prepared: list[np.ndarray]) -> np.ndarray:
        found = self.pool.map(lambda part: np.take(self.rows_of_file, part, axis=0)[:, 0], prepared)
        return np.concatenate(list(found))

    def forget(self) -> None:
        self.map.madvise(mmap.MADV_DONTNEED)
        drop_pages(self.file)

    def close(self) -> None:
        del self.rows_of_file
        self.map.close()


def drop_pages(file: Path) -> None:
    """Have the page cache forget a file that nobody has mapped."""
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
