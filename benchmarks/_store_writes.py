"""Write amplification of the log: bytes the store writes ÷ bytes of the records put, in steady state.

A record on disk is its block ÷ the records in a block: header, alignment and what the block leaves over included. The volume's
fill is live rows ÷ the rows that its capacity would hold, everything included. Two streams:

    evictions   a slot pool of a tenth of the rows over Zipf ids, every batch trained: its misses read, its dirty victims put
    raw         the Zipf ids themselves, put as they are drawn

The store's own count is held against what the kernel says this process wrote (/proc/self/io) and against what the device did
(/proc/diskstats, which counts every process of the machine).

With checkpoints, a segment that was emptied gives its room back only when the last checkpoint that names it goes, up to
keep_checkpoints intervals later. So the cleaner keeps as much free or emptied as keep_checkpoints + 1 intervals put, and the
log has the rest. The planner's formula, with D rows put from one checkpoint to the next:

    disk ÷ live = 1 ÷ fill + (keep_checkpoints + 1) × D ÷ rows
    write amplification = A(fill), which must stay below (keep_checkpoints + 1) ÷ keep_checkpoints

since keep_checkpoints × A × D is what is emptied and not yet given back. A of uniform overwrites and greedy cleaning is 1 ÷
(1 - s), where s, the share of a segment that is live when it is cleaned, solves fill = (s - 1) ÷ ln s. For 2 checkpoints the
fill is at most 0.6; it is run here with 0.5. A checkpoint that the volume asks for in between is committed at once, as a
training loop does, and counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torchrec_mtrains.kernels import MemoryVolume, SsdVolume, _core
from torchrec_mtrains.planner.charges import live_bytes

from _common import Figure, ZipfIds, own_io_bytes
from _subjects import records, shuffled
from torchrec_mtrains.calibration.pool import Pool
from torchrec_mtrains.meters import disk_counters

POOL_SHARE = 0.1
ZIPF_EXPONENT = 1.05
LOOKUPS_PER_ROW = 1 / 488
"""Ids of a batch ÷ rows of the table: a batch of 1,024 × 4 ids on a table of 2M rows."""


def capacity_for(rows: int, record_bytes: int, fill: float) -> int:
    """The capacity that these rows fill to that share."""
    return int(live_bytes(rows, record_bytes) / fill)


def uniform_write_amplification(fill: float) -> float:
    """Of uniform overwrites and greedy cleaning: 1 ÷ (1 - s) where fill = (s - 1) ÷ ln s."""
    low, high = 1e-9, 1 - 1e-9
    for _ in range(60):
        s = (low + high) / 2
        low, high = (s, high) if (s - 1) / math.log(s) < fill else (low, s)
    return 1 / (1 - s)


class AnnouncedIds(NamedTuple):
    """What the pool reads until the batch begins, and the batch's number."""

    ids: torch.Tensor
    offsets: torch.Tensor
    number: int


class PooledTable:
    """A slot pool over one table of a volume. Batches are looked up and read, used, and released."""

    def __init__(self, volume: SsdVolume | MemoryVolume, rows: int, record_bytes: int, pool_rows: int) -> None:
        self.volume = volume
        self.home = volume.table("t", row_count=rows, record_bytes=record_bytes)
        self._slots = Pool(self.home, pool_rows)
        self.pool, self.memory = self._slots.native, torch.from_numpy(self._slots.values)

    def announce(self, ids: torch.Tensor) -> AnnouncedIds:
        """The ids of a coming batch, for ``train``."""
        offsets = torch.tensor([0, len(ids)])
        return AnnouncedIds(ids, offsets, self.pool.announce(_core.Batch(ids.data_ptr(), False, len(ids), offsets.data_ptr())))

    def begin(self, ids: torch.Tensor, train: bool = True, announced: int = 0) -> tuple[int, torch.Tensor]:
        """Its ticket and its slots, which are filled after ``wait``."""
        offsets, slots = torch.tensor([0, len(ids)]), torch.empty(len(ids), dtype=torch.int64)
        seq = self.pool.begin(_core.Batch(ids.data_ptr(), False, len(ids), offsets.data_ptr()), slots.data_ptr(), train, announced)
        return seq, slots

    def train(self, ids: torch.Tensor, announced: int = 0) -> None:
        seq, _slots = self.begin(ids, announced=announced)
        self.pool.wait(seq)
        self.pool.release(seq)

    @property
    def misses(self) -> int:
        """Rows read so far."""
        return self.pool.stats(0)["misses"]

    def checkpoint(self, epoch: int) -> None:
        self.pool.flush()
        self.volume.checkpoint(epoch)


class Written:
    """What was put and written since it was made."""

    def __init__(self, volume: SsdVolume, folder: Path, record_bytes: int) -> None:
        self.volume, self.folder, self.record_bytes = volume, folder, record_bytes
        self.start = self._now()

    def _now(self) -> dict[str, int]:
        self.volume.flush()
        s, disk = self.volume.stats(), disk_counters(self.folder)
        return {
            "put_rows": s["put_rows"],
            "moved_rows": s["moved_rows"],
            "written_bytes": s["write_bytes"],
            "process_bytes": own_io_bytes()[1],
            "device_bytes": disk.written_bytes if disk else 0,
        }

    def figures(self) -> dict[str, float]:
        now = self._now()
        d = {k: now[k] - self.start[k] for k in now}
        payload = d["put_rows"] * self.record_bytes
        return {
            **d,
            "write_amplification": d["written_bytes"] / (d["put_rows"] * live_bytes(1_000_000, self.record_bytes) / 1e6),
            "over_payload": d["written_bytes"] / payload,
            "process_over_own": d["process_bytes"] / d["written_bytes"],
            "device_over_own": d["device_bytes"] / d["written_bytes"],
        }


def filled(folder: Path, rows: int, record_bytes: int, capacity_bytes: int) -> SsdVolume:
    """A volume with every row of one table put, in an order that scatters them."""
    folder.mkdir()
    volume = SsdVolume((str(folder),), capacity_bytes)
    table = volume.table("t", row_count=rows, record_bytes=record_bytes)
    for part in shuffled(rows, 20_000):
        table.put(part, records(part, record_bytes))
    return volume


def _steps(volume: SsdVolume, rows: int, record_bytes: int, stream: str, batch: int) -> tuple[Callable[[], None], PooledTable | None]:
    zipf = ZipfIds(rows, ZIPF_EXPONENT, torch.Generator().manual_seed(3))
    if stream == "evictions":
        pooled = PooledTable(volume, rows, record_bytes, int(rows * POOL_SHARE))
        return lambda: pooled.train(zipf.draw(batch)), pooled
    table = volume.table("t", row_count=rows, record_bytes=record_bytes)
    values = records(np.arange(batch), record_bytes)
    return lambda: table.put(zipf.draw(batch), values), None


def steady_state(root: Path, stream: str, fill: float, *, rows: int, record_bytes: int, churn: float, measured: float) -> dict[str, Any]:
    """``churn`` and ``measured``: puts before and while measuring, as multiples of all rows."""
    folder = root / f"{stream}_{fill}"
    capacity = capacity_for(rows, record_bytes, fill)
    volume = filled(folder, rows, record_bytes, capacity)
    step, _pool = _steps(volume, rows, record_bytes, stream, max(64, int(rows * LOOKUPS_PER_ROW)))
    halves = []
    for share in (churn, measured / 2, measured / 2):
        written, until = Written(volume, folder, record_bytes), volume.stats()["put_rows"] + int(rows * share)
        while volume.stats()["put_rows"] < until:
            step()
        halves.append(written)
        if len(halves) == 2:
            first = written.figures()["write_amplification"]
    whole = halves[1].figures()
    used = volume.stats()["disk_bytes"]
    assert used <= capacity
    volume.close()
    return {**whole, "first_half": first, "disk_over_live": used / live_bytes(rows, record_bytes)}


def with_checkpoints(
    root: Path, fill: float, *, rows: int, record_bytes: int, checkpoints: int, keep: int, steps_between: int
) -> dict[str, Any]:
    """Evictions, with a checkpoint every ``steps_between`` steps. ``fill``: what the formula is asked to plan for.

    The rows written between two checkpoints are counted on an ample volume first, as a profile would tell a planner.
    """
    batch = max(64, int(rows * LOOKUPS_PER_ROW))

    def run(folder: Path, capacity: int, count: int, measure_from: int) -> tuple[dict[str, float], int, list[int]]:
        volume = filled(folder, rows, record_bytes, capacity)
        step, pooled = _steps(volume, rows, record_bytes, "evictions", batch)
        assert pooled
        used, put, written = [], volume.stats()["put_rows"], None
        epochs = itertools.count(1)
        for interval in range(1, count + 1):
            if interval == measure_from:
                written, put = Written(volume, folder, record_bytes), volume.stats()["put_rows"]
            for _ in range(steps_between):
                step()
                used.append(volume.stats()["disk_bytes"])
                if volume.wants_checkpoint:
                    pooled.checkpoint(next(epochs))
            pooled.checkpoint(next(epochs))
        assert written
        per_interval = (volume.stats()["put_rows"] - put) // (count - measure_from + 1)
        result = {**written.figures(), "asked_for": next(epochs) - 1 - count}, per_interval, used
        volume.close()
        return result

    _, per_interval, _ = run(root / "ample", rows * (record_bytes + 64) * 8 + (64 << 20), 3, 2)
    live = live_bytes(rows, record_bytes)
    capacity = int(live * (1 / fill + (keep + 1) * per_interval / rows))
    figures, per_interval, used = run(root / "capped", capacity, checkpoints, checkpoints // 2 + 1)
    steady = used[len(used) // 2 :]
    return {
        **figures,
        "fill": fill,
        "keep_checkpoints": keep,
        "rows_per_interval_over_rows": per_interval / rows,
        "planned_disk_over_live": capacity / live,
        "disk_over_live_mean": float(np.mean(steady)) / live,
        "disk_over_live_peak": max(steady) / live,
        "planned_write_amplification": uniform_write_amplification(fill),
    }


GOALS = {("evictions", 0.7): 1.9, ("evictions", 0.85): 3.2, ("raw", 0.7): 1.7, ("raw", 0.85): 2.5}


def measure(
    root: Path, *, rows: int, record_bytes: int, churn: float, measured: float, checkpoints: int, steps_between: int
) -> dict[str, Any]:
    f: dict[str, Any] = {"rows": rows, "record_bytes": record_bytes, "steady_state": []}
    for (stream, fill), goal in GOALS.items():
        result = steady_state(root, stream, fill, rows=rows, record_bytes=record_bytes, churn=churn, measured=measured)
        f["steady_state"].append({"stream": stream, "fill": fill, "goal": goal, **result})
        print(f"{stream} at {fill:.0%}: {result['write_amplification']:.2f}", flush=True)
    f["with_checkpoints"] = with_checkpoints(
        root, 0.5, rows=rows, record_bytes=record_bytes, checkpoints=checkpoints, keep=2, steps_between=steps_between
    )
    return f


def show(f: dict[str, Any]) -> None:
    print(f"{f['rows']:,} rows of {f['record_bytes']} bytes, Zipf {ZIPF_EXPONENT}, pool of {POOL_SHARE:.0%}")
    print(f"{'stream':<12}{'full':>6}{'writes ÷ puts':>15}{'first half':>12}{'÷ payload':>11}{'/proc/self/io':>15}{'diskstats':>11}")
    for s in f["steady_state"]:
        print(
            f"{s['stream']:<12}{s['fill']:>6.0%}{s['write_amplification']:>15.2f}{s['first_half']:>12.2f}{s['over_payload']:>11.2f}"
            f"{s['process_over_own']:>14.3f}×{s['device_over_own']:>10.3f}×"
        )
    c = f["with_checkpoints"]
    put, planned, measured = f"{c['rows_per_interval_over_rows']:.0%}", c["planned_disk_over_live"], c["disk_over_live_mean"]
    print(f"{c['keep_checkpoints']} checkpoints kept ({c['asked_for']} more asked for), {put} of the rows put between two")
    print(f"  planned {planned:.2f} × live on disk, {c['planned_write_amplification']:.2f} writes a put")
    print(f"  measured {measured:.2f} ×, at most {c['disk_over_live_peak']:.2f} ×, {c['write_amplification']:.2f} writes a put")


def figures(f: dict[str, Any]) -> list[Figure]:
    lines = [
        Figure(f"write amplification: {s['stream']}, {s['fill']:.0%} full", s["write_amplification"], f"≤ {s['goal']}")
        for s in f["steady_state"]
    ]
    c = f["with_checkpoints"]
    return [
        *lines,
        Figure("write amplification: evictions, 2 checkpoints kept", c["write_amplification"]),
        Figure("… by the planner's formula", c["planned_write_amplification"]),
        Figure("bytes on disk ÷ live, 2 checkpoints kept, peak", c["disk_over_live_peak"]),
        Figure("… capacity by the planner's formula", c["planned_disk_over_live"]),
    ]
