"""``ResidentPool``: what ``DevicePool`` is, of a group whose pools have a slot for every row.

Row r of a table is in slot r, so the ids of a batch are its slots: none is looked up, none is missed, none leaves, and there are neither
host places nor exchanges. Rows come into the slots before the first batch, or before anyone reads or writes them, all of them at once
(``_fill``); ``forget`` has them come anew. What is left to know of a row is when it was used last and whether it was changed (``Stamps``).

Tickets are soft and hard as in ``SlotPool`` (csrc/slot_pool.h), and nothing depends on which: a ticket that is outstanding says that its
rows may still change, so that a flush leaves them dirty. A batch is used when it begins, on the caller's stream; its forward looks at what
became of that, so its ids are checked before it trains. Rows never move, so no stream waits for another; but where bad ids are rewritten
(``copies``), the stream that trains reads a copy that the caller's stream has made.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import errors
from . import _core
from .device_ids import Batch
from .device_planes import native_part
from .device_sequences import SEQUENCES
from .device_stamps import Use, stamps_type

MOVE_ROWS = 65536
"""Rows that come from a volume, or go there, at a time; a guess."""

_INT64 = torch.int64


@dataclass
class _Held:
    """An outstanding ticket."""

    batch: Batch
    hard: bool
    copied: Any = None  # an event: after it the ids are there


@dataclass
class ResidentTable:
    """One table of the group, as its pool sees it."""

    name: str
    volume: Any  # native, below the pool
    id: int
    rows: int
    parts: list[Tensor]  # the record's, (rows or more, …) each, in the record's order
    cached: bool  # whether caches in front of the home may have rows that it has not


class ResidentPool:
    """The pools of ``tables``, whose features are ``table_of_feature``; see the module."""

    announced = revoked = declined = 0

    def __init__(self, tables: Sequence[ResidentTable], table_of_feature: Sequence[int], copies: bool, device: torch.device) -> None:
        self._copies = copies and device.type == "cuda"
        self.tables, self._table_of_feature, self._device = list(tables), list(table_of_feature), device
        slots = [t.parts[0].shape[0] for t in tables]
        self.stamps = stamps_type(device)([t.name for t in tables], [t.rows for t in tables], slots, table_of_feature, device)
        self.batches, self._last_seq, self._filled = 0, 0, False
        self._unseen: deque[Use] = deque()  # that the host has not looked at, the oldest first
        self._held: dict[int, _Held] = {}
        self._failed: dict[int, errors.MTrainsError] = {}  # why batches were refused that nobody has asked for yet
        # The sums of all batches: distinct rows by table, and where features begin.
        self._sums = np.zeros(len(tables) + len(table_of_feature) + 1, dtype=np.int64)
        self._flushed, self._trickled, self._hands = ([0] * len(tables) for _ in range(3))
        self._lock = threading.RLock()  # hooks run on autograd's thread

    # -- batches

    def begin(self, batch: Batch, hard: bool, dirty: bool, announced: int = 0, lost: int = 0) -> tuple[int, Tensor]:
        """Starts a batch. Ids and offsets stay as they are until it is released. Returns its number, and the slot of each id.

        Raises: IdOutOfRangeError, ConfigurationError (of a soft begin, its ``acquire`` may): nothing was changed. What reading the rows
        failed with.
        """
        with self._lock:
            self._fill()
            seq = self._last_seq = self._last_seq + 1
            if batch.ids.numel():
                if len(self._unseen) == SEQUENCES:  # what was told of the oldest is written over
                    self._look()
                self._unseen.append(self.stamps.use(batch, seq, dirty))
            self._held[seq] = _Held(batch, hard, torch.cuda.current_stream(self._device).record_event() if self._copies else None)
            if hard:
                self._look_up_to(seq)
                if refused := self._failed.pop(seq, None):
                    raise refused
            return seq, batch.ids

    def _look(self) -> None:
        use = self._unseen.popleft()
        try:
            self._sums += self.stamps.outcome(use)
            self.batches += 1
        except errors.MTrainsError as e:
            if self._held.pop(use.seq, None) is not None:
                self._failed[use.seq] = e

    def _look_up_to(self, seq: int) -> None:
        while self._unseen and self._unseen[0].seq <= seq:
            self._look()

    def acquire(self, seq: int, dirty: bool) -> bool:
        """Soft → hard. ``dirty``: its rows will be changed, and were not marked so.

        Raises: IdOutOfRangeError, ConfigurationError: what the batch is refused for.
        """
        with self._lock:
            self._look_up_to(seq)
            if refused := self._failed.pop(seq, None):
                raise refused
            held = self._held.get(seq)
            if held is None:
                return False
            held.hard = True
            if dirty:
                self.stamps.mark_dirty(held.batch)
            return True

    def wait(self, seq: int) -> None:
        """After this the current stream finds the batch's slots."""
        if self._copies:
            held, stream = self._held[seq], torch.cuda.current_stream(self._device)
            stream.wait_event(held.copied)
            held.batch.ids.record_stream(stream)

    def release(self, seq: int) -> None:
        """The batch will change its rows no longer, once what is queued on the device is done. Twice is harmless."""
        self._held.pop(seq, None)
        self._failed.pop(seq, None)

    def gave_way(self, seq: int) -> bool:
        """Never: every row has a slot."""
        return False

    def alive(self, seq: int) -> bool:
        """Whether a ticket is outstanding."""
        return seq in self._held

    @property
    def outstanding(self) -> int:
        """Tickets begun and not released."""
        return len(self._held)

    def rows_of_a_batch(self, table: int) -> float:
        """Distinct rows, on average; 0 before the first batch."""
        return self._sums[table] / max(1, self.batches)

    # -- rows, between here and the volumes

    def _fill(self) -> None:
        """Every row comes into its slot, if that has not been. Raises: what reading them fails with; then nobody has any."""
        if self._filled:
            return
        for t, of in enumerate(self.tables):
            staged = [p.new_empty((min(MOVE_ROWS, of.rows), *p.shape[1:]), device="cpu") for p in of.parts]
            for first in range(0, of.rows, MOVE_ROWS):
                rows = np.arange(first, min(first + MOVE_ROWS, of.rows))
                places = np.arange(len(rows), dtype=np.int32)
                # Caches give away what they may have alone: it is dirty here.
                request = _core.GetRequest(of.id, rows, places, [native_part(s) for s in staged], of.cached)
                of.volume.wait(_core.submit_gets(of.volume, [request]))
                for part, values in zip(of.parts, staged, strict=True):
                    part[first : first + len(rows)].copy_(values[: len(rows)])
            self.stamps.of_table(t).fill_(int(of.cached))
        self._finish()
        self._filled = True

    def _finish(self) -> None:
        """What is queued on the device is done, and the host knows what became of every batch."""
        self._look_up_to(self._last_seq)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _put(self, table: int, rows: Tensor) -> None:
        of = self.tables[table]
        for some in rows.split(MOVE_ROWS) if rows.numel() else ():
            values = [p.index_select(0, some).cpu() for p in of.parts]
            places = np.arange(some.numel(), dtype=np.int32)
            _core.put_rows(of.volume, of.id, some.cpu().numpy(), places, [native_part(v) for v in values])

    def flush(self) -> None:
        """Puts every dirty row into its volume; rows that an outstanding ticket may still change stay dirty."""
        with self._lock:
            self._finish()
            oldest = min(self._held, default=self._last_seq + 1)
            for t in range(len(self.tables)):
                stamps = self.stamps.of_table(t)
                dirty = (stamps & 1).nonzero().squeeze(1)
                self._put(t, dirty)
                self._flushed[t] += dirty.numel()
                self._mark_clean(t, dirty[stamps.index_select(0, dirty) < 2 * oldest])
            self._finish()

    def trickle(self, table: int, min_age: int, looks: int) -> int:
        """Puts dirty rows that no batch has used for ``min_age`` batches, among the ``looks`` rows where a hand that goes round the table
        comes next. Returns the rows put."""
        with self._lock:
            self._finish()
            size, stamps = self.tables[table].rows, self.stamps.of_table(table)
            youngest = min(self._last_seq - min_age, min(self._held, default=self._last_seq + 1) - 1)
            looks = min(looks, size)
            looked = (self._hands[table] + torch.arange(looks, device=self._device)) % max(1, size)
            of_looked = stamps.index_select(0, looked)
            old = looked[(of_looked & 1).bool() & (of_looked < 2 * (youngest + 1))]
            self._put(table, old)
            self._mark_clean(table, old)
            self._hands[table] = (self._hands[table] + looks) % max(1, size)
            self._trickled[table] += old.numel()
            self._finish()
            return old.numel()

    def _mark_clean(self, table: int, rows: Tensor) -> None:
        stamps = self.stamps.of_table(table)
        stamps.index_copy_(0, rows, stamps.index_select(0, rows) & ~1)

    def forget(self) -> None:
        """Every row leaves the pools, unwritten. Raises: TicketError while forward passes await their backward."""
        with self._lock:
            self._finish()
            self._held = {seq: held for seq, held in self._held.items() if held.hard}
            if self._held:
                raise errors.TicketError(
                    f"{len(self._held)} forward passes of tiered tables have not run their backward; run it or drop their outputs before "
                    "the tables are restored"
                )
            self._filled = False
            self.stamps.stamp.zero_()

    # -- rows, as users see them

    def read(self, table: int, first_row: int, row_count: int) -> list[Tensor]:
        """The current values of consecutive rows, on the CPU: one tensor a part of the record. Shapes: (row_count, …)."""
        with self._lock:
            self._check_range(table, first_row, row_count)
            self._fill()
            self._finish()
            return [p[first_row : first_row + row_count].to("cpu", copy=True) for p in self.tables[table].parts]

    def write(self, table: int, first_row: int, row_count: int, values: Sequence[Tensor | None]) -> None:
        """Replaces values of consecutive rows; None keeps that part. Shapes: as ``read`` returns."""
        with self._lock:
            self._check_range(table, first_row, row_count)
            self._fill()
            self._finish()
            for part, value in zip(self.tables[table].parts, values, strict=True):
                if value is not None:
                    part[first_row : first_row + row_count].copy_(value)
            self.stamps.of_table(table)[first_row : first_row + row_count] |= 1
            self._finish()

    def _check_range(self, table: int, first_row: int, row_count: int) -> None:
        if first_row < 0 or row_count < 0 or first_row + row_count > self.tables[table].rows:
            raise errors.IdOutOfRangeError(f"rows [{first_row}, {first_row + row_count}) are not all in table {self.tables[table].name!r}")

    def resident_rows(self, table: int) -> Any:
        """The rows in the pool, the longest unused first. Shapes: (n,) int64, numpy."""
        with self._lock:
            self._finish()
            rows = (self.stamps.of_table(table) >> 1).argsort(stable=True)
            return rows[: len(rows) if self._filled else 0].cpu().numpy()

    def warm(self, table: int, rows: Any) -> int:
        """All rows come into their slots. Returns how many of these were not there."""
        with self._lock:
            came = 0 if self._filled else len(rows)
            self._fill()
            return came

    # -- looking in

    def stats(self, table: int) -> dict[str, int]:
        """Counters since creation: ids looked up, and rows."""
        with self._lock:
            self._look_up_to(self._last_seq)
            by_feature = np.diff(self._sums[len(self.tables) :])
            return {
                "lookups": sum(int(n) for t, n in zip(self._table_of_feature, by_feature, strict=True) if t == table),
                "unique_rows": int(self._sums[table]),
                "misses": 0,
                "refetched_rows": 0,
                "admitted_rows": 0,
                "evictions": 0,
                "write_backs": 0,
                "flushed_rows": self._flushed[table],
                "trickled_rows": self._trickled[table],
                "resident_rows": self.tables[table].rows if self._filled else 0,
            }

    def host_stats(self, table: int) -> dict[str, int]:
        """Of host places, of which there are none (``CachedVolume.cache_stats``)."""
        names = ("rows", "resident_rows", "hits", "misses", "inserted_rows", "evictions", "write_backs", "flushed_rows")
        return dict.fromkeys(names, 0)

    def slot_of_row(self, table: int, row: int) -> int:
        """The slot, counted within the table, or -1."""
        return row if self._filled else -1

    def check(self) -> None:
        """Tests: raises at a broken invariant."""
        with self._lock:
            self._finish()
            stamps = self.stamps.stamp[:-1]
            if (stamps < 0).any() or (stamps >= 2 * (self._last_seq + 1)).any():
                raise AssertionError("resident pool: a stamp is of no batch")
            if not self._filled and stamps.any():
                raise AssertionError("resident pool: a row was used that is not there")
