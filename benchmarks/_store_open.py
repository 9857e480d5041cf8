"""Opening a volume, after a clean close and after a crash, and what bounds it.

A volume of small records is filled and committed by a child process that then closes it, or puts more and is killed; a fresh
process opens it. Its processor time and the bytes it read say what bounds it, beside the rate at which one thread can read
the same segments.
"""

from __future__ import annotations

import math
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from torchrec_mtrains.kernels import SsdVolume, VolumeTable

from _children import in_child
from _common import Figure, cpu_seconds, own_io_bytes
from torchrec_mtrains.meters import peak_rss_bytes

HOWS = ("clean", "crash")


RECORD_BYTES = 8


def _records(rows: np.ndarray) -> np.ndarray:
    """The row's number. Shape (n, RECORD_BYTES) uint8."""
    return rows.astype("<i8").view(np.uint8).reshape(-1, RECORD_BYTES)


def _volume(folder: str, rows: int) -> tuple[SsdVolume, VolumeTable]:
    volume = SsdVolume((folder,), rows * 100 + (256 << 20))
    return volume, volume.table("t", row_count=rows, record_bytes=RECORD_BYTES)


def _fill(folder: str, rows: int) -> None:
    volume, table = _volume(folder, rows)
    for ids in _hopping(rows, rows):
        table.put(ids, _records(ids))
    volume.checkpoint(1)
    volume.close()


def _hopping(rows: int, count: int) -> Iterator[np.ndarray]:
    """The first ``count`` of an order that hops all over the index, as evictions do, without holding a permutation of all rows."""
    stride = next(s for s in range(rows * 61 // 100 + 1, 2 * rows + 2) if math.gcd(s, rows) == 1)
    part = 1_000_000
    for first in range(0, count, part):
        yield np.arange(first, min(count, first + part)) * stride % rows


def _put_more_and_die(folder: str, rows: int) -> None:
    volume, table = _volume(folder, rows)
    for ids in _hopping(rows, rows // 20):
        table.put(ids, _records(ids + 1))
    volume.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _open(folder: str, rows: int) -> dict[str, Any]:
    before, start, cpu = own_io_bytes()[0], perf_counter(), cpu_seconds()
    volume, table = _volume(folder, rows)
    seconds, cpu = perf_counter() - start, cpu_seconds() - cpu
    read = own_io_bytes()[0] - before
    ids = np.arange(0, rows, max(1, rows // 10_000))
    out = np.empty((len(ids), RECORD_BYTES), np.uint8)
    table.get(ids, out)
    assert np.array_equal(out, _records(ids)), "opened with other records than were committed"
    volume.close()
    return {"seconds": seconds, "cpu_seconds": cpu, "read_bytes": read, "peak_rss_bytes": peak_rss_bytes()}


def sequential_bytes_per_s(folder: Path, seconds: float) -> float:
    """The rate at which one thread reads the files of a folder with O_DIRECT, a MiB at a time."""
    buffer, done, start = mmap.mmap(-1, 1 << 20), 0, perf_counter()
    for file in sorted(f for f in folder.iterdir() if f.stat().st_size >= 1 << 20):
        opened = os.open(file, os.O_RDONLY | os.O_DIRECT)
        while (n := os.readv(opened, [buffer])) and perf_counter() - start < seconds:
            done += n
        os.close(opened)
    return done / (perf_counter() - start)


def measure(root: Path, *, rows: int) -> dict[str, Any]:
    """What it takes to open a volume of that many rows, after a clean close and after a crash."""
    folder = root / "open"
    folder.mkdir()
    f: dict[str, Any] = {"rows": rows, "record_bytes": RECORD_BYTES}
    in_child(_fill, str(folder), rows)
    for how in HOWS:
        if how == "crash":
            in_child(_put_more_and_die, str(folder), rows, killed=True)
        f["log_bytes"] = sum(file.stat().st_size for file in folder.iterdir())
        rate = sequential_bytes_per_s(folder, 2.0)
        r = in_child(_open, str(folder), rows)
        device = r["read_bytes"] / rate / r["seconds"]
        cpu = r["cpu_seconds"] / r["seconds"]
        f[how] = {**r, "device_share": device, "cpu_share": cpu, "bound": _bound(device, cpu)}
    return f


def _bound(device_share: float, cpu_share: float) -> str:
    if max(device_share, cpu_share) < 0.7:
        return "neither alone: reading and processing take turns"
    return "the processor" if cpu_share > device_share else "the device"


def show(f: dict[str, Any]) -> None:
    for how in HOWS:
        r = f[how]
        print(
            f"open after {how}: {r['seconds']:.1f} s for {f['rows']:,} rows of {f['record_bytes']} bytes, {f['log_bytes'] / 1e9:.2f} GB; "
            f"read {r['read_bytes'] / 1e9:.2f} GB, {r['cpu_seconds']:.1f} s of CPU, peak memory {r['peak_rss_bytes'] / 1e9:.2f} GB; "
            f"device busy {r['device_share']:.0%}, processor {r['cpu_share']:.0%}: bound by {r['bound']}"
        )


def figures(f: dict[str, Any]) -> list[Figure]:
    return [Figure(f"open of {f['rows'] / 1e6:,.1f}M rows, {how}, s", f[how]["seconds"]) for how in HOWS]
