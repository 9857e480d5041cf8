"""``DeviceBatches``: tickets that move batches through the slot pools of a group on a device and host memory below them.

What ``SlotPool`` (csrc/slot_pool.h) is on a CPU; tickets, soft and hard, and what always holds are described there. The differences:

- The directory is ``DeviceDirectory``. A row that is in no slot is in a *host place*, or below, in its table's volume.
- A miss is an exchange: the missed row's record comes out of a host place into a slot, and the record that was in the slot goes into
  that host place. Records are exchanged by the device, all tables in one operation a plane (``Planes``), and the host sees none
  of it. A row from below is read by native code into a host place first, for which a place is chosen and what is there evicted into
  the volume. So the host places are an exclusive cache whose order of eviction is that of entry, and each table has at
  least as many as slots: whatever a batch needs from below has a place.
- Reads of one batch are in flight at most: the next begin waits for them.
- A prefetch does not wait to hear what an earlier attempt found: one that comes before the device has told begins, though the earlier batch
  gives way. And right behind a batch that begins anew, and reads rows from below, a prefetch gives way: it would wait for them.

A batch is first *attempted*: one sequence of launches does all that it needs, and the host looks at what became of it when its forward
comes (``DeviceDirectory.attempt``). Only a batch that the attempt cannot serve, since a row is below or slots are short, goes step by step,
with the host waiting for the counts of each. Where rows were below, so will be some of the next batch: it is not attempted.

Streams. The directory's operations run on a stream of their own, in the order of calls, after what the caller's stream had queued: the
batch's ids are there. Exchanges run on a second one, the mover. They wait for the choice of places, and for the last use of what they
overwrite: at a release the stream of the backward (or of the forward, without one) records an event, for which a later begin lets the
mover wait when it lets the ticket go; exchanges that were queued before do not. Large pools let tickets go a few batches later, so that
exchanges wait for no backward that may still run. A forward waits for its own batch's slots and exchange. Before native code touches
host places the host waits for the mover.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import errors
from .device_announced import Announced
from .device_below import Below, DeviceTable, Read
from .device_directory import HOST, SLOT, Attempt, DeviceDirectory, Lookup, Misses, Turn
from .device_fused import FusedDirectory
from .device_ids import Batch
from .device_planes import Moves, Planes
from .device_sequences import SEQUENCES
from .device_streams import Streams
from .device_turns import Standing, Turns

MOST_LATE, BATCHES_PER_LATE, LATE_EVERY = 4, 4, 64
"""Of tickets that are let go late: at most; one for a pool's room for the rows of so many batches; counted anew every so many batches."""

_INT64 = torch.int64


@dataclass
class _Held:
    """An outstanding ticket: what it pins, and when its rows are in their slots."""

    hard: bool
    standing: Standing
    slots: Tensor  # (n,): of each position, within its table; the caller's
    places: Tensor  # the same through the group
    ready: list[Any]  # events, or None
    attempt: Attempt | None = None  # that the host has not looked at
    give_back: Callable[[], None] | None = None  # slots and places
    released: bool = False


@dataclass
class _Fill:
    """Rows from below on their way: into which host places native code reads them, and for which slots."""

    seq: int
    reads: list[Read]  # in the order of misses
    slots: Tensor  # through the group, by miss
    hosts: Tensor
    table: Tensor


@dataclass
class _Counts:
    """Rows since creation, of one table, but for what ``DevicePool._sums`` has."""

    flushed_rows: int = 0
    trickled_rows: int = 0
    host_flushed_rows: int = 0


class DeviceBatches:
    """The pools of ``tables``, whose features are ``table_of_feature``; see the module."""

    def __init__(self, tables: Sequence[DeviceTable], table_of_feature: Sequence[int], planes: Planes, device: torch.device) -> None:
        self._fill: _Fill | None = None
        self.tables, self._planes, self._table_of_feature = list(tables), planes, list(table_of_feature)
        self.directory = directory_type(device)(
            [t.name for t in tables],
            [t.rows for t in tables],
            [t.pool_rows for t in tables],
            [t.host_places for t in tables],
            table_of_feature,
            device,
        )
        self._streams = Streams(device)
        self._held: dict[int, _Held] = {}
        self._failed: dict[int, errors.MTrainsError] = {}  # why attempts were refused that nobody has asked for yet
        self._released: deque[tuple[int, Any]] = deque()  # with events
        self._attempted: deque[int] = deque(maxlen=SEQUENCES)  # the last of them
        self._announced, self._turns = Announced(self.directory, self._streams), Turns()
        self._below = Below(self.tables, self.directory, self._streams)
        self._last_seq = 0
        self._attempts = True  # no row was below, lately
        self._late = 0
        self._counts = [_Counts() for _ in tables]
        # The sums of all batches, and of those that began anew: as in an attempt's summary, hits, misses and misses below by table, and
        # where features begin.
        self._sums = np.zeros((2, 3 * len(tables) + len(table_of_feature) + 1), dtype=np.int64)
        self._device = device
        self._hands = [0] * len(tables)
        self.revoked = self.declined = self.attempted = self.batches = 0
        self._lock = threading.RLock()  # hooks run on autograd's thread
        for t, table in enumerate(self.tables):
            if table.has_all:
                self._below.fill_host_places(t)

    # -- batches

    def begin(self, batch: Batch, hard: bool, dirty: bool, announced: int = 0, lost: int = 0) -> tuple[int, Tensor]:
        """Starts a batch. Ids and offsets stay as they are until it is released. One that is not ``hard`` gives way where there is no room,
        or it comes too soon behind others: ``gave_way`` says so, or ``acquire``.

        Returns its number, and the slot of each id, counted within its
        table: (n,) int64. ``announced``: the number that ``announce`` gave, or 0. ``lost``: the ticket that this batch had, which gave
        way, or 0.
        Raises: IdOutOfRangeError, ConfigurationError (of a soft begin, its ``acquire`` may), PoolTooSmallError, VolumeFullError: nothing
        was changed. What the reads of the batch before failed with.
        """
        with self._lock:
            self._let_go(self._late)
            for number in self._turns.unwanted():
                self.withdraw(number)
            self._look_at_told()
            standing = self._turns.standing_of(lost, self._last_seq + 1, announced)
            if not hard and self._comes_too_soon(standing, lost):
                self._turns.forget(lost)
                self._last_seq += 1
                return self._declined(self._last_seq, standing)
            self._finish_fill()
            announced, standing.announced = standing.announced or announced, 0
            self._announced.begins(announced)
            begun = self._begin(batch, hard, dirty, announced, standing)
            self._turns.began(self._last_seq, lost)
            return begun

    def _comes_too_soon(self, standing: Standing, lost: int) -> bool:
        """Whether an earlier batch waits for room; or one that did has just begun, so that this one would wait for its reads."""
        behind_reads = not lost and self._fill is not None and self._fill.seq == self._turns.began_anew
        return behind_reads or self._turns.others_are_before(standing)

    def _begin(self, batch: Batch, hard: bool, dirty: bool, announced: int, standing: Standing) -> tuple[int, Tensor]:
        if self._attempts and batch.ids.numel():
            seq = self._attempt(batch, hard, dirty, announced, standing)
            if not hard or self._look(seq):
                return seq, self._held[seq].slots
        with self._streams.on_directory():
            return self._begin_step_by_step(batch, hard, dirty, announced, standing)

    def _declined(self, seq: int, standing: Standing) -> tuple[int, Tensor]:
        self._turns.gives_way(seq, standing)
        self.declined += 1
        return seq, torch.empty(0, dtype=_INT64)

    def _begin_step_by_step(self, batch: Batch, hard: bool, dirty: bool, announced: int, standing: Standing) -> tuple[int, Tensor]:
        self._let_go()
        self._look_at_all()
        self._announced.tell_but(0)
        seq = self._last_seq = self._last_seq + 1
        found = self.directory.lookup(batch, seq, dirty, announced)
        sums = self._sums[int(standing.counted)]
        if not found.missing_count:
            self._attempts = True
        elif not self._bring(found, seq, hard, dirty, sums):
            return self._declined(seq, standing)
        self.batches += not standing.counted
        sums[: len(self.tables)] += found.hits
        sums[3 * len(self.tables) + 1 :] += np.cumsum(found.lookups)
        standing.counted = True
        self._held[seq] = _Held(hard, standing, found.slot, found.place, [self._streams.now(), self._streams.moves_now()])
        return seq, found.slot

    def _attempt(self, batch: Batch, hard: bool, dirty: bool, announced: int, standing: Standing) -> int:
        """Queues all that the batch needs."""
        if len(self._attempted) == SEQUENCES:  # the directory uses what it told of that one in again
            self._look_without_asking(self._attempted[0])
        seq = self._last_seq = self._last_seq + 1
        self._attempted.append(seq)
        turn = Turn(seq, min(self._held, default=seq), dirty, announced, self._announced.oldest)
        attempt = self.directory.attempt(batch, turn, self._exchange, self._streams, self._announced.told_by_attempt())
        self._held[seq] = _Held(hard, standing, attempt.slot, attempt.place, [attempt.done], attempt, attempt.give_back)
        return seq

    def _look(self, seq: int) -> bool:
        """Whether the batch of a ticket has its slots. The host waits for an attempt's look-up. Raises: what it was refused for."""
        held = self._held.get(seq)
        if held is None or held.attempt is None:
            return held is not None
        attempt, held.attempt = held.attempt, None
        try:
            fits = self.directory.outcome(attempt)
        except BaseException:
            del self._held[seq]
            raise
        if not fits:
            tables = len(self.tables)
            self._attempts = not attempt.summary[2 + 2 * tables : 2 + 3 * tables].any()
            if held.hard:
                del self._held[seq]
            else:
                self.declined += 1
                self._give_way(seq)
            return False
        self.attempted += 1
        self.batches += not held.standing.counted
        self._sums[int(held.standing.counted)] += attempt.summary[2:-1]
        held.standing.counted = True
        if self.batches % LATE_EVERY == 0:
            self._late = self._late_releases()
        return True

    def _late_releases(self) -> int:
        """How many of the last released tickets the pools have room to keep a while: exchanges then need not wait for their backward."""
        held = [t.pool_rows / max(1.0, self.rows_of_a_batch(i)) for i, t in enumerate(self.tables) if t.pool_rows < t.rows]
        return min(MOST_LATE, int(min(held, default=0)) // BATCHES_PER_LATE)

    def _look_without_asking(self, seq: int) -> None:
        try:
            self._look(seq)
        except errors.MTrainsError as e:
            self._failed[seq] = e

    def _look_at_told(self) -> None:
        """Of attempts, those of which the device has told by now."""
        for seq, held in list(self._held.items()):
            if held.attempt is not None:
                if held.attempt.summary[-1] != seq:
                    return
                self._look_without_asking(seq)

    def _look_at_all(self) -> None:
        """The host knows what became of every attempt."""
        for seq in [seq for seq, held in self._held.items() if held.attempt is not None]:
            self._look_without_asking(seq)

    def announce(self, batch: Batch) -> int:
        """A coming batch will use these rows. Returns the number to begin or withdraw it by; 0: too many are announced."""
        with self._lock:
            return self._announced.announce(batch)

    def withdraw(self, number: int) -> None:
        """The announced batch will not come."""
        with self._lock:
            self._announced.withdraw(number)

    @property
    def announced(self) -> int:
        """Batches announced and not begun."""
        return len(self._announced)

    def rows_of_a_batch(self, table: int) -> float:
        """Distinct rows, on average; 0 before the first batch."""
        hits, misses, _, _ = self._sums_of(table)
        return (hits + misses) / max(1, self.batches)

    def _sums_of(self, table: int, anew: bool = False) -> tuple[int, int, int, int]:
        """Hits, misses and misses below, in rows, and ids looked up."""
        sums = self._sums[int(anew)]
        hits, misses, below = sums[: 3 * len(self.tables)].reshape(3, -1)[:, table].tolist()
        by_feature = np.diff(sums[3 * len(self.tables) :])
        return hits, misses, below, sum(int(n) for t, n in zip(self._table_of_feature, by_feature, strict=True) if t == table)

    def _bring(self, found: Lookup, seq: int, hard: bool, dirty: bool, sums: Any) -> bool:
        """Gives every missed row a slot, and starts bringing it there. False when there is no room."""
        directory = self.directory
        misses = directory.claim(found, seq)
        try:
            places = self._find_room(found, misses, seq, hard)
            if places is None:
                directory.unclaim(misses)
                return False
            slots, choice, counts, below_counts = places
            self._attempts = choice is None
            total, below_total = sum(counts), sum(below_counts)
            table, hosts = misses.table[:total], misses.was[:total]
            reads: list[Read] = []
            if choice is not None:
                from_below = torch.nonzero_static(misses.below[:total], size=below_total).squeeze(1)
                hosts = hosts.index_copy(0, from_below, choice)
                reads = self._below.read(misses, from_below, choice, below_counts, seq, dirty)
        except BaseException:
            directory.unclaim(misses)
            raise
        directory.commit(misses, slots, hosts, seq, dirty)
        directory.settle(found, misses)
        sums[len(self.tables) : 3 * len(self.tables)] += counts + below_counts
        if below_total:
            mine = [x.index_select(0, from_below) for x in (slots, hosts, table)]
            self._fill = _Fill(seq, reads, *mine)
            in_host = torch.nonzero_static(~misses.below[:total], size=total - below_total).squeeze(1)
            slots, hosts, table = (x.index_select(0, in_host) for x in (slots, hosts, table))
        if total > below_total:
            self._move(slots, hosts, table)
        return True

    def _find_room(self, found: Lookup, misses: Misses, seq: int, hard: bool) -> tuple[Tensor, Tensor | None, list[int], list[int]] | None:
        """Slots for all misses, host places for those from below, if there are any, and the counts of both by table."""
        directory, first = self.directory, self._announced.oldest
        slots = directory.choose(SLOT, misses.count, misses.most)
        counts, have, below = self._pull(misses.count, slots.available, misses.below_count)
        if _short(have, counts):
            directory.refill(SLOT, counts, seq, min([seq, *self._held]), first_announced=first)
            slots = directory.choose(SLOT, misses.count, misses.most)
            (have,) = self._pull(slots.available)
        while _short(have, counts):  # the stamps are conservative: which slots tickets use is the exact answer
            directory.refill(SLOT, counts, seq, 0, self._pinned(found), first)
            slots = directory.choose(SLOT, misses.count, misses.most)
            (have,) = self._pull(slots.available)
            if not _short(have, counts):
                break
            if not hard:
                return None
            if not self._revoke_youngest():
                self._refuse(found, counts, have)
        places = slots.places[: sum(counts)]
        if not any(below):
            return places, None, counts, below
        hosts = directory.choose(HOST, misses.below_count, sum(below))
        (have,) = self._pull(hosts.available)
        if _short(have, below):
            directory.refill(HOST, below, seq, seq, first_announced=first)
            hosts = directory.choose(HOST, misses.below_count, sum(below))
            (have,) = self._pull(hosts.available)
            assert not _short(have, below), "a table has as many host places as slots"
        return places, hosts.places, counts, below

    def _pull(self, *by_table: Tensor) -> list[list[int]]:
        return torch.stack(by_table).tolist()

    def _pinned(self, found: Lookup | None) -> Tensor:
        """The slots that outstanding tickets use, and this batch. Shapes: (slots,) bool."""
        pinned = torch.zeros(self.directory.slots + 1, dtype=torch.bool, device=self._device)
        if found is not None:
            pinned[torch.where(found.missing, self.directory.slots, found.place)] = True
        for held in self._held.values():
            pinned[held.places] = True
        return pinned[:-1]

    def _revoke_youngest(self) -> bool:
        for seq in sorted(self._held, reverse=True):
            if not self._held[seq].hard:
                self._give_way(seq)
                self.revoked += 1
                return True
        return False

    def _give_way(self, seq: int) -> None:
        """Of a soft ticket. Who releases it at the same time, without the lock, finds it in one of the two, or is found out here."""
        held = self._held[seq]
        self._turns.gives_way(seq, held.standing)
        del self._held[seq]
        if held.released:
            self._turns.forget(seq)

    def _refuse(self, found: Lookup, counts: list[int], have: list[int]) -> None:
        table = next(t for t, (c, h) in enumerate(zip(counts, have, strict=True)) if h < c)
        mine = self.directory.segment(SLOT, table)
        own = torch.zeros(self.directory.slots + 1, dtype=torch.bool, device=self._device)
        own[torch.where(found.missing, self.directory.slots, found.place)] = True
        needed, others = counts[table] + int(own[mine].sum()), int(self._pinned(None)[mine].sum())
        raise errors.PoolTooSmallError(
            f"table {self.tables[table].name!r}: this batch has {needed} distinct rows, its slot pool has {self.tables[table].pool_rows} "
            f"(pool_rows), and {others} slots are pinned by {len(self._held)} forward passes whose backward has not run. Nothing was "
            f"changed. Raise pool_rows to at least {needed + others}, use smaller batches, or drop outputs that need no backward"
        )

    def _move(self, slots: Tensor, hosts: Tensor, table: Tensor) -> None:
        """Queues an exchange. Places are counted through the group."""
        moves = Moves(slots, hosts, table, torch.full((2,), slots.numel(), dtype=_INT64, device=self._device))
        with self._streams.on_mover():
            self._exchange(moves)
        self._streams.keep(self._streams.moves_now(), moves)

    def _exchange(self, moves: Moves) -> None:
        self._planes.exchange(moves, (self.directory._first_place[SLOT], self.directory._first_place[HOST]))

    def _finish_fill(self) -> None:
        """The host waits for the reads in flight, and queues their exchange. Rows that could not be read leave the pool again.

        Raises: the first error. Soft tickets from that batch on are revoked.
        """
        fill, self._fill = self._fill, None
        if fill is None:
            return
        with self._streams.on_directory():
            self._finish(fill)

    def _finish(self, fill: _Fill) -> None:
        failed: list[slice] = []
        cause: BaseException | None = None
        for read in fill.reads:
            try:
                read.wait()
            except BaseException as e:
                cause = cause or e
                failed.append(read.misses)
        if cause is None:
            self._move(fill.slots, fill.hosts, fill.table)
            if fill.seq in self._held:
                self._held[fill.seq].ready.append(self._streams.moves_now())
            return
        for mine in (read.misses for read in fill.reads):
            if mine in failed:
                self.directory.give_back(fill.slots[mine], fill.hosts[mine], fill.table[mine])
            else:
                self._move(fill.slots[mine], fill.hosts[mine], fill.table[mine])
        for seq in [s for s, held in self._held.items() if s >= fill.seq and not held.hard]:
            self._give_way(seq)
        raise cause

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """No read and no exchange is in flight, and what is queued on the device is done; the directory's stream is current."""
        with self._streams.on_directory():
            self._let_go()
            self._look_at_all()
            self._finish_fill()
            self._streams.finish_all()
            yield

    def acquire(self, seq: int, dirty: bool) -> bool:
        """Soft → hard. False when the ticket was revoked, or got no room. ``dirty``: its rows will be changed, and were not marked so.

        Raises: IdOutOfRangeError, ConfigurationError: what the batch is refused for.
        """
        with self._lock:
            if refused := self._failed.pop(seq, None):
                raise refused
            if not self._look(seq):
                return False
            held = self._held[seq]
            held.hard = True
            if dirty:
                with self._streams.on_directory():
                    self.directory.mark_dirty(held.places)
            return True

    def wait(self, seq: int) -> None:
        """After this the current stream finds the batch's rows in their slots. Raises: what its reads failed with."""
        with self._lock:
            try:
                if self._fill is not None and self._fill.seq <= seq:
                    self._finish_fill()
            except BaseException:
                self._held.pop(seq, None)
                raise
            self._streams.wait(*self._held[seq].ready)

    def release(self, seq: int) -> None:
        """The batch needs its slots no longer, once what the current stream has queued is done. Twice is harmless."""
        # Without the lock: a begin on another thread may hold it while it waits for the device.
        self._failed.pop(seq, None)
        held = self._held.get(seq)
        if held is not None and not held.released:
            held.released = True
            self._released.append((seq, self._streams.now()))
        self._turns.released(seq)

    def _let_go(self, but: int = 0) -> None:
        """Of released tickets, except for so many of the last ones."""
        while len(self._released) > but:
            seq, event = self._released.popleft()
            self._look_without_asking(seq)
            self._failed.pop(seq, None)
            self._streams.moves_wait(event)
            if (held := self._held.pop(seq, None)) is None:
                self._streams.keep(event)
            else:
                self._streams.keep(event, held, then=held.give_back)
        self._streams.let_go()

    def gave_way(self, seq: int) -> bool:
        """Whether a soft ticket is gone, as far as the device has told, and its batch has not begun anew."""
        with self._lock:
            self._look_at_told()
            return seq in self._turns

    def alive(self, seq: int) -> bool:
        """Whether a ticket is outstanding."""
        held = self._held.get(seq)
        return held is not None and not held.released

    @property
    def outstanding(self) -> int:
        """Tickets begun and not released."""
        with self._lock:
            self._let_go()
            return len(self._held)

    def __del__(self) -> None:
        for read in self._fill.reads if self._fill is not None else ():
            with suppress(errors.MTrainsError):  # nobody waits for these rows any more
                read.wait()  # it writes into host places until then


def directory_type(device: torch.device) -> type[DeviceDirectory]:
    """Of the directories of a device the fastest."""
    return FusedDirectory if device.type == "cuda" else DeviceDirectory


def _short(have: Sequence[int], wanted: Sequence[int]) -> bool:
    return any(h < w for h, w in zip(have, wanted, strict=True))
