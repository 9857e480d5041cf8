"""Mixed load: every batch of rows that is read is matched by a batch of as many rows written back, as evictions do it.

Rows are drawn uniformly, which is nearly what a slot pool lets through and the worst case for cleaning; a batch is written back
while one drawn ``LAG`` batches later is read. The volume is filled to a share of its capacity and churned until cleaning is in
its steady state. Read-only turns, mixed turns and, if it takes part, RocksDB on the same load take turns of at least
``seconds``; RocksDB is churned as much before, and counts with the best of its thread counts.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from _common import Figure, Turn, median, take_turn
from _store_writes import capacity_for
from _subjects import RocksDb, Ssd, first_bytes, records

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


def ssd_turn(ssd: Ssd, draws: Draws, writer: ThreadPoolExecutor, seconds: float, write: bool) -> Turn:
    def prepare() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        read, back = draws.next()
        return ssd.prepare(read), back, records(back, ssd.record_bytes)

    def work(prepared: tuple[np.ndarray, np.ndarray, np.ndarray]) -> int:
        read, back, values = prepared
        writing = writer.submit(ssd.table.put, back, values) if write else None
        got = ssd.read(read)
        if writing:
            writing.result()
        assert np.array_equal(got, first_bytes(read))
        return len(read)

    return take_turn(seconds, prepare, work)


def rocksdb_turn(rocksdb: RocksDb, draws: Draws, seconds: float) -> Turn:
    def prepare() -> list[tuple[Any, Any]]:
        read, back = draws.next()
        return list(zip(rocksdb.prepare(read), map(rocksdb.batch, rocksdb.parts(back)), strict=True))

    def one(part: tuple[Any, Any]) -> int:
        rocksdb.database.write(part[1])
        return len(rocksdb.database[part[0]])

    return take_turn(seconds, prepare, lambda prepared: sum(rocksdb.pool.map(one, prepared)))


def measure(
    root: Path, *, rows: int, record_bytes: int, batch: int, seconds: float, rounds: int, churn: float, fills: tuple[float, ...]
) -> dict[str, Any]:
    """``churn``: rows rewritten before measuring, as a multiple of all rows."""
    writer = ThreadPoolExecutor(1)
    volumes = {}
    for fill in fills:
        capacity = capacity_for(rows, record_bytes, fill)
        volumes[fill] = Ssd(root / f"volume_{fill}", rows, record_bytes, capacity_bytes=capacity)
    rocksdb = RocksDb(root / "rocksdb", rows, record_bytes)
    draws = {subject: Draws(rows, batch, 2) for subject in (*fills, "rocksdb")}
    for _ in range(int(rows * churn / batch)):
        for fill, ssd in volumes.items():
            back = draws[fill].next()[1]
            ssd.table.put(back, records(back, record_bytes))
        rocksdb.database.write(rocksdb.batch(draws["rocksdb"].next()[1]))
    turns: dict[str, list[Turn]] = {}
    cleaned = {fill: ssd.volume.stats()["cleaned_segments"] for fill, ssd in volumes.items()}
    for round_ in range(rounds + 1):
        done = {}
        for fill, ssd in volumes.items():
            done[f"mixed_{fill:.0%}"] = ssd_turn(ssd, draws[fill], writer, seconds, write=True)
            ssd.volume.flush()
            done[f"read_only_{fill:.0%}"] = ssd_turn(ssd, draws[fill], writer, seconds, write=False)
        for threads in ROCKSDB_THREADS:
            rocksdb.on(threads)
            done[f"rocksdb_{threads}"] = rocksdb_turn(rocksdb, draws["rocksdb"], seconds)
        if round_ > 0:
            for name, turn in done.items():
                turns.setdefault(name, []).append(turn)
    best = max((f"rocksdb_{t}" for t in ROCKSDB_THREADS), key=lambda name: median([t.rows_per_s for t in turns[name]]))

    def ratio(name: str, to: str) -> float:
        return median([a.rows_per_s / b.rows_per_s for a, b in zip(turns[name], turns[to], strict=True)])

    f = {
        "rows": rows,
        "record_bytes": record_bytes,
        "rows_per_s": {name: median([t.rows_per_s for t in ts]) for name, ts in turns.items()},
        "cleaned_segments": {f"{fill:.0%}": ssd.volume.stats()["cleaned_segments"] - cleaned[fill] for fill, ssd in volumes.items()},
        "over_read_only": {f"{fill:.0%}": ratio(f"mixed_{fill:.0%}", f"read_only_{fill:.0%}") for fill in fills},
        "over_rocksdb": {f"{fill:.0%}": ratio(f"mixed_{fill:.0%}", best) for fill in fills},
        "best_rocksdb": best,
    }
    for ssd in volumes.values():
        ssd.close()
    rocksdb.close()
    return f


def show(f: dict[str, Any]) -> None:
    print(f"{f['rows']:,} rows of {f['record_bytes']} bytes; segments cleaned in the turns: {f['cleaned_segments']}")
    for name, rate in f["rows_per_s"].items():
        print(f"{name:<16}{rate:>12,.0f} rows read/s")


def figures(f: dict[str, Any]) -> list[Figure]:
    goals = {"70%": "≥ 0.93", "85%": "≥ 0.90"}
    alone = [Figure(f"mixed load: ours ÷ read-only, {fill} full", v, goals[fill]) for fill, v in f["over_read_only"].items()]
    best = f["best_rocksdb"]
    return alone + [Figure(f"mixed load: ours ÷ {best}, {fill} full", v, "≥ 2") for fill, v in f["over_rocksdb"].items()]
