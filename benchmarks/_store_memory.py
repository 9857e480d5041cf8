"""Native memory a row: resident memory of a fresh process before and after every row of a table was touched.

The slot pool's own arrays are left out (the planner charges them by the slot); index, directory, write buffers and whatever
else the volume holds are in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
from torchrec_mtrains.kernels import SsdVolume
from torchrec_mtrains.planner.charges import slot_bytes

from _children import in_child
from _common import Figure
from _store_writes import PooledTable


def _touch(folder: str, rows: int, record_bytes: int) -> int:
    me = psutil.Process()
    volume = SsdVolume((folder,), rows * (record_bytes + 64) * 2 + (64 << 20))
    batch = max(1, rows // 200)
    warm = PooledTable(SsdVolume((folder + "_warm",), 64 << 20), 1000, record_bytes, 100)
    warm.train(torch.arange(100))  # what the first batch of a process loads
    before = me.memory_info().rss
    pooled = PooledTable(volume, rows, record_bytes, 2 * batch)
    for first in range(0, rows, batch):
        pooled.train(torch.arange(first, min(rows, first + batch)))
    pooled.pool.flush()
    volume.flush()
    grown = me.memory_info().rss - before - 2 * batch * slot_bytes(record_bytes)
    assert volume.stats()["put_rows"] == rows
    volume.close()
    return grown


def measure(root: Path, *, rows: int, record_bytes: int) -> dict[str, Any]:
    for name in ("memory", "memory_warm"):
        (root / name).mkdir()
    grown = in_child(_touch, str(root / "memory"), rows, record_bytes)
    return {"rows": rows, "record_bytes": record_bytes, "grown_bytes": grown, "bytes_per_row": grown / rows}


def show(f: dict[str, Any]) -> None:
    grown = f"{f['grown_bytes'] / 1e6:,.1f} MB"
    print(f"touching {f['rows']:,} rows of {f['record_bytes']} bytes made a process grow by {grown}, its pool left out")


def figures(f: dict[str, Any]) -> list[Figure]:
    return [Figure("native memory, bytes a row", f["bytes_per_row"], "≤ 16", 1)]
