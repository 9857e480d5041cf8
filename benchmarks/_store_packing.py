"""Rows per I/O: how many of the rows that a slot pool misses one read of a block brings.

Batches are trained through a slot pool of a tenth of the rows over an SSD volume. Three traces:

    independent   Zipf ids
    drifting      the same, and with every batch a share ``DRIFT`` of the ranks changes hands
    co-accessed   groups of ``GROUP`` rows, scattered over the table and always used together, in any order: Zipf over groups

Rows of a block are no neighbours at first, and batches of any of ``APART`` more rows, which no trace uses, leave the pool's slots in no
order. (Rows of the trace would be remembered as used apart, and leave apart for the first few uses.) Then every row is used once, group
by group, and the trace runs until the pool has turned over. Misses that the write buffers answer are left out: they are no I/O.
*At most* is rows missed ÷ groups missed, as if every group lay in one block.

Then again with the next ``WINDOW`` batches announced: block neighbours of missed rows that one of them wants come into the pool with the
read.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchrec_mtrains.kernels import SsdVolume

from _common import Figure, ZipfIds
from _store_writes import LOOKUPS_PER_ROW, POOL_SHARE, ZIPF_EXPONENT, AnnouncedIds, PooledTable, filled

DRIFT = 0.001
GROUP = range(2, 15)  # equally likely sizes; of one size, a group would take the very slots of another
WINDOW = 32
APART = 2  # pools


class Trace:
    """Batches of one kind. ``group[row]`` is alike for rows that are always used together."""

    def __init__(self, kind: str, rows: int, batch: int) -> None:
        self.rows, self.batch, self.drifting = rows, batch, kind == "drifting"
        self.rng = np.random.default_rng(5)
        sizes = self.rng.choice(GROUP, rows) if kind == "co-accessed" else np.ones(rows, np.int64)
        ends = np.cumsum(sizes)
        order, self.mean = self.rng.permutation(rows), sizes.mean()
        self.groups = np.split(order, ends[ends < rows])
        self.group = np.empty(rows, np.int64)
        self.group[order] = np.searchsorted(ends, np.arange(rows), side="right")
        self.zipf = ZipfIds(len(self.groups), ZIPF_EXPONENT, torch.Generator().manual_seed(3))

    def every_row(self) -> np.ndarray:
        return np.concatenate(self.groups)

    def draw(self) -> np.ndarray:
        if self.drifting:
            change = torch.from_numpy(self.rng.choice(self.rows, int(self.rows * DRIFT), replace=False))
            self.zipf.row_of_rank[change] = self.zipf.row_of_rank[change.roll(1)]
        drawn = self.zipf.draw(round(self.batch / self.mean))
        return np.concatenate([self.rng.permutation(self.groups[g]) for g in drawn])


class Reads:
    """Rows and I/Os of a volume since it was made."""

    def __init__(self, volume: SsdVolume) -> None:
        self.volume, self.start = volume, volume.stats()

    def _since(self, key: str) -> int:
        return int(self.volume.stats()[key] - self.start[key])

    @property
    def ios(self) -> int:
        return self._since("read_ios")

    @property
    def rows(self) -> int:
        """Rows asked for that were on the device."""
        return self._since("get_rows") - self._since("get_rows_initial") - self._since("get_rows_buffered")


def through_the_pool(volume: SsdVolume, trace: Trace, record_bytes: int, steps: int) -> dict[str, float]:
    pool_rows = int(trace.rows * POOL_SHARE)
    pooled = PooledTable(volume, trace.rows + APART * pool_rows, record_bytes, pool_rows)
    first = torch.from_numpy(trace.every_row())
    for _ in range(40):
        pooled.train(torch.from_numpy(trace.rows + trace.rng.choice(APART * pool_rows, pool_rows // 4)))
    for part in first.split(trace.batch):
        pooled.train(part)
    for _ in range(steps):
        pooled.train(torch.from_numpy(trace.draw()))
    reads, misses, groups, lookups = Reads(volume), pooled.misses, 0, 0
    for _ in range(steps):
        ids = trace.draw()
        missing = [row for row in np.unique(ids) if pooled.pool.slot_of_row(0, row) < 0]
        groups += len(np.unique(trace.group[missing]))
        lookups += len(ids)
        pooled.train(torch.from_numpy(ids))
    misses = pooled.misses - misses
    result = {"rows_per_io": reads.rows / reads.ios, "at_most": misses / groups, "ios_per_batch": reads.ios / steps}
    pooled.pool.flush()
    return {"miss_ratio": misses / lookups, **result}


def with_lookahead(volume: SsdVolume, trace: Trace, record_bytes: int, steps: int) -> dict[str, float]:
    pool_rows, coming = int(trace.rows * POOL_SHARE), deque[AnnouncedIds]()
    pooled = PooledTable(volume, trace.rows + APART * pool_rows, record_bytes, pool_rows)

    def train() -> None:
        while len(coming) < WINDOW:
            coming.append(pooled.announce(torch.from_numpy(trace.draw())))
        pooled.train(coming[0].ids, coming.popleft().number)

    for _ in range(WINDOW + steps):
        train()
    reads, admitted = Reads(volume), pooled.pool.stats(0)["admitted_rows"]
    for _ in range(steps):
        train()
    admitted = pooled.pool.stats(0)["admitted_rows"] - admitted
    return {"rows_per_io": (reads.rows + admitted) / reads.ios, "ios_per_batch": reads.ios / steps}


def measure(root: Path, *, rows: int, record_bytes: int, steps: int) -> dict[str, Any]:
    """``steps``: batches before each measurement, and in it."""
    batch = int(rows * LOOKUPS_PER_ROW)
    f: dict[str, Any] = {"rows": rows, "record_bytes": record_bytes, "batch": batch, "traces": {}}
    for kind in ("independent", "drifting", "co-accessed"):
        every = rows + APART * int(rows * POOL_SHARE)
        volume = filled(root / kind, every, record_bytes, every * (record_bytes + 64) * 3 + (256 << 20))
        trace = Trace(kind, rows, batch)
        now = through_the_pool(volume, trace, record_bytes, steps)
        f["traces"][kind] = {**now, "ahead": with_lookahead(volume, trace, record_bytes, steps)}
        volume.close()
    return f


def show(f: dict[str, Any]) -> None:
    print(f"{f['rows']:,} rows of {f['record_bytes']} bytes, pool of {POOL_SHARE:.0%}, batches of {f['batch']:,} ids, Zipf {ZIPF_EXPONENT}")
    print(f"{'':<14}{'':>17}{'':>9}{'':>13}{'':>14}{'with neighbours admitted':>28}")
    print(f"{'':<14}{'misses a lookup':>17}{'at most':>9}" + f"{'rows an I/O':>13}{'I/Os a batch':>14}" * 2)
    for kind, t in f["traces"].items():
        columns = "".join(f"{x['rows_per_io']:>13.2f}{x['ios_per_batch']:>14,.0f}" for x in (t, t["ahead"]))
        print(f"{kind:<14}{t['miss_ratio']:>17.3f}{t['at_most']:>9.2f}{columns}")


def figures(f: dict[str, Any]) -> list[Figure]:
    lines = []
    for kind, t in f["traces"].items():
        lines.append(Figure(f"rows an I/O: {kind}", t["rows_per_io"]))
        if kind == "co-accessed":
            lines.append(Figure("… at most, were every group in one block", t["at_most"]))
        lines.append(Figure(f"… {kind}, neighbours of the next {WINDOW} batches admitted", t["ahead"]["rows_per_io"]))
    return lines
