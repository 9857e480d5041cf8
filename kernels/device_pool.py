"""``DevicePool``: the slot pools of a group on a device, with host memory below them: rows as users see them, and counters.

How batches move through both: ``DeviceBatches``. Whatever is here is done when nothing else is under way on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import errors
from . import _core
from .device_batches import DeviceBatches
from .device_below import MOVE_ROWS
from .device_directory import HOST, SLOT
from .device_ids import Batch
from .device_planes import native_part

_INT64 = torch.int64


class DevicePool(DeviceBatches):
    """What ``SlotPool`` is on a CPU."""

    # -- rows, as users see them

    def read(self, table: int, first_row: int, row_count: int) -> list[Tensor]:
        """The current values of consecutive rows, on the CPU: one tensor a part of the record. Shapes: (row_count, …)."""
        with self._lock, self._quiet():
            of, (slots, hosts, below) = self.tables[table], self._sort(table, first_row, row_count)
            values = [torch.empty((row_count, *p.shape[1:]), dtype=p.dtype) for p in of.upper]
            for (at, places), parts in ((slots, of.upper), (hosts, of.lower)):
                for value, part in zip(values, parts, strict=True):
                    value[at] = part.index_select(0, places.to(part.device)).cpu()
            if below.numel():
                request = _core.GetRequest(of.id, (below + first_row).numpy(), below.int().numpy(), [native_part(v) for v in values], False)
                of.volume.wait(_core.submit_gets(of.volume, [request]))
            return values

    def write(self, table: int, first_row: int, row_count: int, values: Sequence[Tensor | None]) -> None:
        """Replaces values of consecutive rows, wherever they are; None keeps that part. Shapes: as ``read`` returns."""
        with self._lock, self._quiet():
            of, (slots, hosts, below) = self.tables[table], self._sort(table, first_row, row_count)
            for kind, (at, places), parts in ((SLOT, slots, of.upper), (HOST, hosts, of.lower)):
                for value, part in zip(values, parts, strict=True):
                    if value is not None:
                        part.index_copy_(0, places.to(part.device), value[at].to(part.device))
                self.directory.mark_dirty(places + self.directory.first_place[kind][table])
            if below.numel():
                whole = values if all(v is not None for v in values) else self.read(table, first_row, row_count)
                record = [w if v is None else v for v, w in zip(values, whole, strict=True)]
                rows = (below + first_row).numpy()
                _core.put_rows(of.volume, of.id, rows, below.int().numpy(), [native_part(r) for r in record if r is not None])
            self._streams.finish_all()

    def _sort(self, table: int, first_row: int, row_count: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        """Consecutive rows by where they are: (which of them, place within the table) in slots and in host places, and which are below."""
        if first_row < 0 or row_count < 0 or first_row + row_count > self.tables[table].rows:
            raise errors.IdOutOfRangeError(f"rows [{first_row}, {first_row + row_count}) are not all in table {self.tables[table].name!r}")
        places, device = self.directory.places_of(table, first_row, row_count).cpu().long(), self._device
        sorted_: list[tuple[Tensor, Tensor]] = []
        for kind in (SLOT, HOST):
            mine = self.directory.segment(kind, table)
            at = ((places >= mine.start) & (places < mine.stop)).nonzero().squeeze(1)
            sorted_.append((at, (places[at] - mine.start).to(device)))
        return sorted_[0], sorted_[1], (places < 0).nonzero().squeeze(1)

    def flush(self) -> None:
        """Puts every dirty row into its volume; rows that an outstanding ticket may still change stay dirty."""
        with self._lock, self._quiet():
            oldest = min(self._held, default=self._last_seq + 1)
            for table, counted in enumerate(self._counts):
                for kind in (SLOT, HOST):
                    mine = self.directory.segment(kind, table)
                    stamps = self.directory.stamp[mine]
                    dirty = ((stamps >= 0) & (stamps & 1).bool()).nonzero().squeeze(1) + mine.start
                    self._put(table, kind, dirty)
                    if kind == SLOT:
                        counted.flushed_rows += dirty.numel()
                    else:
                        counted.host_flushed_rows += dirty.numel()
                    stamps = self.directory.stamp.index_select(0, dirty)
                    self._mark_clean(dirty[stamps < 2 * oldest] if kind == SLOT else dirty)

    def trickle(self, table: int, min_age: int, looks: int) -> int:
        """Puts dirty rows that no batch has used for ``min_age`` batches, among the ``looks`` slots where a hand that goes round the pool
        comes next. They stay, clean. Returns the rows put."""
        with self._lock, self._quiet():
            size, mine = self.tables[table].pool_rows, self.directory.segment(SLOT, table)
            youngest = min(self._last_seq - min_age, min(self._held, default=self._last_seq + 1) - 1)
            looks = min(looks, size)
            looked = (self._hands[table] + torch.arange(looks, device=self._device)) % size + mine.start
            stamps = self.directory.stamp.index_select(0, looked)
            old = looked[(stamps >= 0) & (stamps & 1).bool() & (stamps < 2 * (youngest + 1))]
            self._put(table, SLOT, old)
            self._mark_clean(old)
            self._hands[table] = (self._hands[table] + looks) % size
            self._counts[table].trickled_rows += old.numel()
            return old.numel()

    def _mark_clean(self, places: Tensor) -> None:
        self.directory.stamp.index_copy_(0, places, self.directory.stamp.index_select(0, places) & ~1)

    def _put(self, table: int, kind: int, places: Tensor) -> None:
        of, first = self.tables[table], self.directory.segment(kind, table).start
        for some in places.split(MOVE_ROWS) if places.numel() else ():
            rows, within = self.directory.row_of_place.index_select(0, some).long().cpu().numpy(), some - first
            if kind == HOST:
                parts, slots = of.lower, within.cpu().int().numpy()
            else:
                parts, slots = [p.index_select(0, within).cpu() for p in of.upper], np.arange(len(rows), dtype=np.int32)
            _core.put_rows(of.volume, of.id, rows, slots, [native_part(p) for p in parts])

    def forget(self) -> None:
        """Every row leaves the pools and the host places, unwritten. Raises: TicketError while forward passes await their backward."""
        with self._lock, self._quiet():
            while self._revoke_youngest():
                pass
            if self._held:
                raise errors.TicketError(
                    f"{len(self._held)} forward passes of tiered tables have not run their backward; run it or drop their outputs before "
                    "the tables are restored"
                )
            self.directory.forget()

    def resident_rows(self, table: int) -> Any:
        """The rows in the pool, the longest unused first. Shapes: (n,) int64, numpy."""
        with self._lock, self._quiet():
            return self.directory.rows_by_age(table).cpu().numpy()

    def warm(self, table: int, rows: Any) -> int:
        """Reads rows, in the order of eviction, into free slots; of too many the last ones. Returns the rows read."""
        with self._lock:
            room = self.tables[table].pool_rows - self.directory.resident(SLOT, table)
            rows = torch.as_tensor(rows, dtype=_INT64)
            rows = rows[max(0, rows.numel() - room) :]
            features = len(self._table_of_feature)
            mine = torch.arange(features + 1) > self._table_of_feature.index(table)
            before = self._sums_of(table)[1]
            for some in rows.split(max(1, min(rows.numel() // 32, MOVE_ROWS))) if rows.numel() else ():
                device = self._device
                begun = self.begin(Batch(some.to(device), torch.where(mine, some.numel(), 0).to(device), 1), True, False)
                self.wait(begun[0])
                self.release(begun[0])
            return self._sums_of(table)[1] - before

    # -- looking in

    def stats(self, table: int) -> dict[str, int]:
        """Counters since creation: ids looked up, and rows."""
        with self._lock:
            self._look_at_all()
            counted, (hits, misses, _, lookups) = self._counts[table], self._sums_of(table)
            return {
                "lookups": lookups,
                "unique_rows": hits + misses,
                "misses": misses,
                "refetched_rows": self._sums_of(table, anew=True)[1],
                "admitted_rows": 0,
                "evictions": int(self.directory.evictions[table]),
                "write_backs": int(self.directory.write_backs[table]),
                "flushed_rows": counted.flushed_rows,
                "trickled_rows": counted.trickled_rows,
                "resident_rows": self.directory.resident(SLOT, table),
            }

    def host_stats(self, table: int) -> dict[str, int]:
        """The same of the host places, as of any cache (``CachedVolume.cache_stats``)."""
        with self._lock:
            self._look_at_all()
            counted = self._counts[table]
            misses, below = (a + b for a, b in zip(self._sums_of(table)[1:3], self._sums_of(table, anew=True)[1:3], strict=True))
            return {
                "rows": self.tables[table].host_places,
                "resident_rows": self.directory.resident(HOST, table),
                "hits": misses - below,
                "misses": below,
                "inserted_rows": int(self.directory.evictions[table]),
                "evictions": self._below.evictions[table],
                "write_backs": self._below.write_backs[table],
                "flushed_rows": counted.host_flushed_rows,
            }

    def slot_of_row(self, table: int, row: int) -> int:
        """The slot, counted within the table, or -1."""
        place, mine = int(self.directory.places_of(table, row, 1)), self.directory.segment(SLOT, table)
        return place - mine.start if mine.start <= place < mine.stop else -1

    def check(self) -> None:
        """Tests: raises at a broken invariant."""
        with self._lock:
            self._look_at_all()
            self._let_go()
            self._streams.finish_all()
            self.directory.check()
            for held in self._held.values():
                if (self.directory.row_of_place[held.places] < 0).any() or (held.places >= self.directory.slots).any():
                    raise AssertionError("device pool: a ticket's slot is free, or none")
