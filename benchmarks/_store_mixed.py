"""Mixed load: as many rows written back as are read, as evictions do it, with cleaning going on.

Batches of unique, uniformly drawn rows go through a slot pool of a tenth of the rows, the next one begun before the last one is
awaited: nine rows in ten are missing, each is read and its victim put. Uniform is nearly what a pool lets through, and the
worst case for cleaning. In the read-only turns the same batches are looked up and not trained, so that no victim is dirty.
The volume is filled to a share of its capacity and churned until cleaning is in its steady state. RocksDB reads the same
kind of batches, and writes back those of ``LAG`` batches before; it is churned as much, and counts with the best of its thread
counts. Turns of at least ``seconds`` alternate.

What the device itself has left for reads beside such writes is measured too: the bare random reads of the volume's engine, alone
and beside sequential reads and writes at the rates of the volume's cleaning, write-backs included.
"""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torchrec_mtrains.kernels import _core
from torchrec_mtrains.planner.perf_model import QUEUE_DEPTH

from _common import Figure, Turn, median, take_turn
from _store_writes import PooledTable, capacity_for, filled
from _subjects import RocksDb, first_bytes
from torchrec_mtrains.calibration.block_device import PAGE_BYTES, write_noise

LAG = 4
ROCKSDB_THREADS = (1, 4, 16)


class Draws:
    """Batches of unique rows to read, each with the rows to write back meanwhile."""

    def __init__(self, rows: int, batch: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.rows, self.batch = rows, batch
        self.waiting = [self._draw() for _ in range(LAG)]

    def _draw(self) -> np.ndarray:
        return self.rng.choice(self.rows, self.batch, replace=False)

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        self.waiting.append(self._draw())
        return self.waiting[-1], self.waiting.pop(0)


def ssd_turn(pooled: PooledTable, draws: Draws, seconds: float, train: bool) -> Turn:
    waiting: list[tuple[int, torch.Tensor, np.ndarray]] = []

    def finish() -> None:
        seq, slots, rows = waiting.pop()
        pooled.pool.wait(seq)
        assert np.array_equal(pooled.memory[slots, 0].numpy(), first_bytes(rows))
        pooled.pool.release(seq)

    def work(rows: np.ndarray) -> int:
        before = pooled.misses
        seq, slots = pooled.begin(torch.from_numpy(rows), train)
        if waiting:
            finish()
        waiting.append((seq, slots, rows))
        return pooled.misses - before

    turn = take_turn(seconds, lambda: draws.next()[0], work)
    finish()
    pooled.pool.flush()
    return turn


def rocksdb_turn(rocksdb: RocksDb, draws: Draws, seconds: float) -> Turn:
    def prepare() -> list[tuple[Any, Any]]:
        read, back = draws.next()
        return list(zip(rocksdb.prepare(read), map(rocksdb.batch, rocksdb.parts(back)), strict=True))

    def one(part: tuple[Any, Any]) -> int:
        rocksdb.database.write(part[1])
        return len(rocksdb.database[part[0]])

    return take_turn(seconds, prepare, lambda prepared: sum(rocksdb.pool.map(one, prepared)))


class Traffic:
    """A thread that reads or writes a file from end to end with O_DIRECT at a given rate, while the ``with`` lasts."""

    def __init__(self, file: Path, bytes_per_s: float, write: bool) -> None:
        self.file, self.rate, self.write, self.stop = file, bytes_per_s, write, threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        opened = os.open(self.file, os.O_RDWR | os.O_DIRECT)
        buffer, done, start, size = mmap.mmap(-1, 1 << 20), 0, perf_counter(), self.file.stat().st_size
        while not self.stop.is_set():
            at = done % size
            done += os.pwrite(opened, buffer, at) if self.write else os.preadv(opened, [buffer], at)
            self.stop.wait(max(0.0, done / self.rate - (perf_counter() - start)))
        os.close(opened)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def device_share(root: Path, rates: dict[str, float], backend: str, seconds: float, rounds: int) -> float:
    """Random reads of the bare device beside sequential traffic at these rates, ÷ those without."""
    raw, other = root / "raw", root / "other"
    for file in (raw, other):
        write_noise(file, 256 << 20)

    def reads() -> float:
        return _core.random_io([str(raw)], PAGE_BYTES, QUEUE_DEPTH, 1.0, seconds, backend, 0).operations_per_s

    ratios = []
    for _ in range(rounds):
        alone = reads()
        with Traffic(other, rates["written"], write=True), Traffic(other, rates["cleaner_read"], write=False):
            ratios.append(reads() / alone)
    return median(ratios)


def measure(
    root: Path, *, rows: int, record_bytes: int, batch: int, seconds: float, rounds: int, churn: float, fills: tuple[float, ...]
) -> dict[str, Any]:
    """``churn``: rows rewritten before measuring, as a multiple of all rows."""
    pools = {}
    for fill in fills:
        volume = filled(root / f"volume_{fill}", rows, record_bytes, capacity_for(rows, record_bytes, fill))
        pools[fill] = PooledTable(volume, rows, record_bytes, rows // 10)
    rocksdb = RocksDb(root / "rocksdb", rows, record_bytes)
    draws = {subject: Draws(rows, batch, 2) for subject in (*fills, "rocksdb")}
    for _ in range(int(rows * churn / batch)):
        for fill, pooled in pools.items():
            pooled.train(torch.from_numpy(draws[fill].next()[0]))
        rocksdb.database.write(rocksdb.batch(draws["rocksdb"].next()[1]))
    turns: dict[str, list[Turn]] = {}
    counted = {fill: dict.fromkeys(("write_bytes", "clean_read_bytes", "cleaned_segments"), 0) for fill in fills}
    for round_ in range(rounds + 1):
        done = {}
        for fill, pooled in pools.items():
            before = pooled.volume.stats()
            done[f"mixed_{fill:.0%}"] = ssd_turn(pooled, draws[fill], seconds, train=True)
            pooled.volume.flush()
            if round_ > 0:
                for key in counted[fill]:
                    counted[fill][key] += pooled.volume.stats()[key] - before[key]
            done[f"read_only_{fill:.0%}"] = ssd_turn(pooled, draws[fill], seconds, train=False)
        for threads in ROCKSDB_THREADS:
            rocksdb.on(threads)
            done[f"rocksdb_{threads}"] = rocksdb_turn(rocksdb, draws["rocksdb"], seconds)
        if round_ > 0:
            for name, turn in done.items():
                turns.setdefault(name, []).append(turn)
    best = max((f"rocksdb_{t}" for t in ROCKSDB_THREADS), key=lambda name: median([t.rows_per_s for t in turns[name]]))

    def ratio(name: str, to: str) -> float:
        return median([a.rows_per_s / b.rows_per_s for a, b in zip(turns[name], turns[to], strict=True)])

    def rates(fill: float) -> dict[str, float]:
        spent = sum(t.seconds for t in turns[f"mixed_{fill:.0%}"])
        return {"written": counted[fill]["write_bytes"] / spent, "cleaner_read": counted[fill]["clean_read_bytes"] / spent}

    backend = next(iter(pools.values())).volume.backend
    f = {
        "rows": rows,
        "record_bytes": record_bytes,
        "rows_per_s": {name: median([t.rows_per_s for t in ts]) for name, ts in turns.items()},
        "cpu_us_per_row": {name: median([t.cpu_seconds / t.rows for t in ts]) * 1e6 for name, ts in turns.items()},
        "cleaned_segments": {f"{fill:.0%}": counted[fill]["cleaned_segments"] for fill in fills},
        "bytes_per_s": {f"{fill:.0%}": rates(fill) for fill in fills},
        "over_read_only": {f"{fill:.0%}": ratio(f"mixed_{fill:.0%}", f"read_only_{fill:.0%}") for fill in fills},
        "device_share": {f"{fill:.0%}": device_share(root, rates(fill), backend, seconds, rounds) for fill in fills},
        "over_rocksdb": {f"{fill:.0%}": ratio(f"mixed_{fill:.0%}", best) for fill in fills},
        "best_rocksdb": best,
    }
    for pooled in pools.values():
        pooled.volume.close()
    rocksdb.close()
    return f


def show(f: dict[str, Any]) -> None:
    print(f"{f['rows']:,} rows of {f['record_bytes']} bytes, pool of 10%; segments cleaned in the turns: {f['cleaned_segments']}")
    for name, rate in f["rows_per_s"].items():
        print(f"{name:<16}{rate:>12,.0f} rows read/s{f['cpu_us_per_row'][name]:>8.2f} µs CPU a row")
    for fill, rates in f["bytes_per_s"].items():
        written, cleaner = rates["written"] / 1e6, rates["cleaner_read"] / 1e6
        print(f"{fill} full: {written:,.0f} MB/s written, {cleaner:,.0f} MB/s read by the cleaner")


def figures(f: dict[str, Any]) -> list[Figure]:
    goals, best, lines = {"70%": "≥ 0.93", "85%": "≥ 0.90"}, f["best_rocksdb"], []
    for fill, share in f["over_read_only"].items():
        lines += [
            Figure(f"mixed load: ours ÷ read-only, {fill} full", share, goals[fill]),
            Figure(f"… the bare device beside as much traffic, {fill} full", f["device_share"][fill]),
            Figure(f"mixed load: ours ÷ {best}, {fill} full", f["over_rocksdb"][fill], "≥ 2"),
        ]
    return lines
