"""A slot pool of one table without a TBE: its slots are a plain array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels import _core
from ..kernels.tiered_tbe import BATCH_LIMIT


@dataclass
class PoolBatch:
    """A batch as the native pool reads it, and the arrays it points into."""

    native: Any
    slots: np.ndarray
    ids: np.ndarray
    offsets: np.ndarray


class Pool:
    """``pool_rows`` slots over a table of a volume. ``values``: their records, (pool_rows, record bytes)."""

    def __init__(self, table: Any, pool_rows: int) -> None:
        self.table, self.values = table, np.zeros((pool_rows, table.record_bytes), np.uint8)
        part = _core.Part(self.values.ctypes.data, table.record_bytes, table.record_bytes)
        spec = _core.SlotPoolTable(table.name, table.volume._native, table._id, table.row_count, pool_rows, [part])
        self.native = _core.SlotPool([spec], [0], BATCH_LIMIT)

    def batch(self, ids: np.ndarray) -> PoolBatch:
        """Shapes: ids (n,) int64."""
        ids, offsets = np.ascontiguousarray(ids), np.array([0, len(ids)], np.int64)
        native = _core.Batch(ids.ctypes.data, False, len(ids), offsets.ctypes.data)
        return PoolBatch(native, np.empty(len(ids), np.int64), ids, offsets)

    def prefetch(self, batch: PoolBatch, dirty: bool) -> int:
        """The number of a ticket that is on its way. The batch must outlive it."""
        return int(self.native.prefetch(batch.native, batch.slots.ctypes.data, dirty))

    def finish(self, seq: int, dirty: bool) -> None:
        """Takes the ticket, waits for its rows and lets them go."""
        assert self.native.acquire(seq, dirty), "a pool has room for all that is prefetched"
        self.native.wait(seq)
        self.native.release(seq)

    def look_up(self, batch: PoolBatch, dirty: bool) -> None:
        """The whole life of a ticket that was not prefetched."""
        seq = self.native.begin(batch.native, batch.slots.ctypes.data, dirty)
        self.native.wait(seq)
        self.native.release(seq)
