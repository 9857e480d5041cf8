"""Where the rows of a group of tables are, in tensor operations on the device of their pools.

A *place* is where a record may lie above its table's volume: a slot of the pool, or a place in host memory below it. Places are
numbered through the group: the slots of every table, then the host places of every table, so that one number says both.

    place_of_row   int32 (rows + 1)    where the row is: a slot, a host place (from ``slots`` on), or -1, below. All that a row which
                                       is not above costs. Inside ``claim`` a smaller number is the claim of one of the positions
                                       that miss the row.
    row_of_place   int32 (places + 1)  the row, counted within its table, or -1 while the place is free
    stamp          int64 (places + 1)  batch · 2 + dirty: the last batch that used the slot, or that brought the record to the host
                                       place; -1 while free. So one store records recency and pins: a slot is pinned while its
                                       batch is not older than the oldest one outstanding.
    window         int64 (places + 1)  bit w % WINDOW: batch w, announced and not begun, will use the row. It goes where the row goes;
                                       of rows that are below nothing is remembered.

The last element of each is a sink, for elements that take no part in an operation.

Invariants between batches (``check`` verifies them): ``place_of_row`` and ``row_of_place`` are inverse to each other, no claim is
left, exactly the free places have stamp -1, they await nothing, and every place is one of its row's table.

Who leaves first: free places, then rows that no announced batch will use, the longest unused first, then the others, those used
furthest in the future first. Candidates are in queues: that order's first sixteenth of each table's places, or what a batch needs,
collected in one pass by histogram. A candidate that was used or announced since is skipped; so taking one is stamping it. What is
announced is advice: a wrong future costs misses.

Everything is deterministic: claims and bins are integers, of several positions with one row the first one's claim wins, and queues
are in the order of places. A batch goes through ``lookup`` → (``claim`` → ``choose`` → ``commit`` → ``settle``, or ``unclaim``), with
the host looking at numbers in between; or all of it is one ``attempt``, which the host looks at later. An attempt changes nothing but
stamps where it cannot give every row a slot: a row is below, or too few slots are older than ``before``. Not thread-safe: ``DevicePool``
locks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import errors
from .device_ids import Batch, GroupIds, set_before, starts, told
from .device_planes import Moves
from .device_streams import Streams

SLOT, HOST = 0, 1
"""The two kinds of places, and their queues."""

ATTEMPTS = 2
"""The queue of slots for attempts: what becomes of one does not depend on batches that were not attempted."""

WINDOW = 63
"""Batches that can be announced and not begun: as many bits as a positive int64 has."""

BUCKETS = 1024
"""Ages that one pass over the stamps tells apart: every batch of the youngest half, then ``FAR_BATCHES`` together. A queue's last bucket
is filled in the order of places."""

FAR_BATCHES = 64

STAYS = BUCKETS + WINDOW + 1
"""The bucket of what may not leave."""

QUEUE_SHARE = 16
"""A queue is at most this part of a table's places: how often the pass runs against how exact the order is. A guess."""

_INT32, _INT64 = torch.int32, torch.int64


class Turn(NamedTuple):
    """What an attempt is told of its batch: its number; slots of which batches may not be taken, from ``before`` on; whether it changes its
    rows; the number under which it was announced, or 0; and the oldest of those that are announced."""

    seq: int
    before: int
    dirty: bool
    announced: int = 0
    first_announced: int = 0


@dataclass
class Lookup:
    """One batch of ids, by position. Shapes: (n,)."""

    batch: Batch
    place: Tensor  # int64, through the group; of a position that misses: the host place, or -1
    slot: Tensor  # int64, within the table: what the TBE looks up; of a position that misses nothing yet
    missing: Tensor  # bool
    missing_count: int
    hits: list[int]  # by table: distinct rows
    lookups: list[int]  # by feature


@dataclass
class Attempt:
    """One batch of ids on its way to slots, and what became of it, once the host has looked (``DeviceDirectory.outcome``)."""

    batch: Batch
    seq: int
    place: Tensor  # as in Lookup; if it fits, of every position the slot
    slot: Tensor
    summary: Any  # numpy (n,) int64: bad ids, whether all fits, by table hits, misses and misses below, where features begin, and ``seq``
    done: Any = None  # an event behind the exchange of its records; None: there is nothing to wait for
    give_back: Callable[[], None] | None = None  # place and slot, once nothing that is queued uses them


Exchange = Callable[[Moves], None]


@dataclass
class Misses:
    """The distinct rows that a batch misses, in the order of their first positions, so by table. Shapes: (``most``,).

    How many there are only the device knows; what comes behind them has table ``tables`` and takes part in nothing.
    """

    most: int
    at: Tensor  # the positions that miss, repeated rows included
    row_at: Tensor  # their rows, through the group
    feature_at: Tensor
    row: Tensor
    was: Tensor  # the host place, or -1
    table: Tensor
    below: Tensor  # whether it is in no place
    count: Tensor  # (tables,)
    below_count: Tensor


@dataclass
class Choice:
    """Places for the misses of each table, table by table; of too few, what is there."""

    places: Tensor  # (most,), padded
    available: Tensor  # (tables,): how many candidates there were


@dataclass
class _Queue:
    place: Tensor
    stamp: Tensor
    window: Tensor
    table: Tensor
    bounds: Tensor  # (tables + 1,)


class DeviceDirectory(GroupIds):
    """The directory of a group: ``rows``, ``slots`` and ``host_places`` by table, ``table_of_feature`` by feature, in order of tables."""

    BYTES_PER_ROW, BYTES_PER_PLACE = 4, 20

    def __init__(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        slots: Sequence[int],
        host_places: Sequence[int],
        table_of_feature: Sequence[int],
        device: torch.device,
    ) -> None:
        super().__init__(names, rows, slots, table_of_feature, device)
        self.sizes = (list(slots), list(host_places))
        self.slots, self.places = sum(slots), sum(slots) + sum(host_places)
        self.first_place = (self.first_slot, [self.slots + first for first in starts(host_places)])
        if self.places >= 1 << 31:
            raise errors.ConfigurationError(
                f"a group of tiered tables has at most 2^31 - 1 places in its pools and host caches, got {self.places}; use smaller ones, "
                "or spread the tables over more ranks"
            )
        self._sink_place = self.places
        self.place_of_row = self._filled(self._sink_row + 1, -1, _INT32)
        self.row_of_place = self._filled(self.places + 1, -1, _INT32)
        # Side by side: who needs a place's one needs its other, and memory is read in pieces of 32 bytes.
        self.stamp, self.window = self._filled(2 * (self.places + 1), -1, _INT64).view(-1, 2).unbind(1)
        self.window.zero_()
        self._first_row, self._first_place = self._tensor(self.first_row), [self._tensor(f) for f in self.first_place]
        self._table_numbers = torch.arange(self.tables + 1, device=device)
        self._queues = [self._empty_queue() for _ in range(3)]
        self.evictions, self.write_backs = (torch.zeros(self.tables, dtype=_INT64, device=device) for _ in range(2))  # rows that left slots

    def _filled(self, count: int, value: int, dtype: torch.dtype) -> Tensor:
        try:
            return torch.full((count,), value, dtype=dtype, device=self.device)
        except torch.OutOfMemoryError as e:
            raise errors.ConfigurationError(
                f"the directory of these tiered tables needs {self.BYTES_PER_ROW} bytes of device memory for each of their "
                f"{self._sink_row} rows and {self.BYTES_PER_PLACE} for each of {self.places} slots and host places; "
                f"{count * dtype.itemsize} bytes of it are not free on {self.device}. Use "
                "smaller pools, or spread the tables over more ranks"
            ) from e

    def _empty_queue(self) -> _Queue:
        none = self._tensor([])
        return _Queue(none, none, none, none, torch.zeros(self.tables + 1, dtype=_INT64, device=self.device))

    # -- one batch

    def lookup(self, batch: Batch, seq: int, dirty: bool, announced: int = 0) -> Lookup:
        """Where the rows of a batch are; those in slots are stamped. ``announced``: the number under which the batch was, or 0.

        Raises: IdOutOfRangeError, ConfigurationError for offsets that do not fit; some slots may have been stamped.
        """
        feature, bad, row = self._rows_of(batch)
        place = torch.where(bad, -1, self.place_of_row.index_select(0, row)).long()
        slot = place - self._feature_slot.index_select(0, feature)
        hit = (place >= 0) & (place < self.slots)
        missing = ~hit & ~bad
        self.stamp_places(torch.where(hit, place, self._sink_place), seq, dirty)
        if announced:
            self._set_windows(place, announced, False)
        hit_rows = set_before(self.stamp[: self.slots] >= 2 * seq).index_select(0, self._first_place[SLOT]).diff()
        numbers = torch.cat([torch.stack([bad.sum(), missing.sum()]), hit_rows, self._begins(batch).long()])
        bad_count, missing_count, *rest = numbers.tolist()
        hits, begins = rest[: self.tables], rest[self.tables :]
        return Lookup(batch, place, slot, missing, missing_count, hits, self._lookups(batch.ids, begins, bad_count))

    def attempt(self, batch: Batch, turn: Turn, exchange: Exchange, streams: Streams, coming: tuple[Batch, int] | None = None) -> Attempt:
        """All that a batch needs, if its rows are in places and enough slots may be taken. Raises nothing: ``outcome`` does.

        ``coming`` is announced before, with its number.
        """
        with streams.on_directory():
            if coming is not None:
                self.announce(*coming, True)
            seq, before, dirty, announced, first_announced = turn
            summary = torch.zeros(2 + 3 * self.tables + self.features + 2, dtype=_INT64)
            summary[2 + 3 * self.tables : -1] = self._begins(batch)
            summary[-1] = seq
            try:
                found = self.lookup(batch, seq, dirty, announced)
            except errors.MTrainsError:
                summary[0] = 1
                nothing = batch.ids.new_full((batch.ids.numel(),), -1, dtype=_INT64)
                return Attempt(batch, seq, nothing, nothing, summary.numpy())
            fits = True
            if found.missing_count:
                misses = self.claim(found, seq, stamps=False)
                slots = self.choose(ATTEMPTS, misses.count, misses.most)
                if (slots.available < misses.count).any():
                    self.refill(ATTEMPTS, misses.count.tolist(), seq, before, first_announced=first_announced)
                    slots = self.choose(ATTEMPTS, misses.count, misses.most)
                fits = bool((slots.available >= misses.count).all()) and not misses.below_count.any()
                summary[2 + self.tables : 2 + 3 * self.tables] = torch.cat([misses.count, misses.below_count])
                if fits:
                    total = int(misses.count.sum())
                    places, hosts, table = slots.places[:total], misses.was[:total], misses.table[:total]
                    self.commit(misses, places, hosts, seq, dirty)
                    self.settle(found, misses)
                    with streams.on_mover():
                        exchange(Moves(places, hosts, table, self._tensor([total, batch.ids.numel()])))
                else:
                    self.unclaim(misses)
            summary[1] = fits
            summary[2 : 2 + self.tables] = torch.tensor(found.hits)
            return Attempt(batch, seq, found.place, found.slot, summary.numpy())

    def outcome(self, attempt: Attempt) -> bool:
        """Whether an attempt's batch fits; the host waits until that is known, not for the exchange. Once for each, in their order.

        Raises: IdOutOfRangeError, ConfigurationError: nothing was changed.
        """
        summary = told(attempt.summary, attempt.seq, self.device)
        if summary[1]:
            return True
        self._lookups(attempt.batch.ids, summary[2 + 3 * self.tables : -1].tolist(), int(summary[0]))
        return False

    def announce(self, batch: Batch, number: int, comes: bool) -> None:
        """A batch with this number will use these rows; or, without ``comes``, will not after all."""
        _feature, bad, row = self._rows_of(batch)
        self._set_windows(torch.where(bad, -1, self.place_of_row.index_select(0, row)).long(), number, comes)

    def _set_windows(self, places: Tensor, number: int, comes: bool) -> None:
        """Of those that are places; of equal ones any number may be given."""
        places = torch.where(places < 0, self._sink_place, places)
        bit, windows = 1 << number % WINDOW, self.window.index_select(0, places)
        self.window[places] = windows | bit if comes else windows & ~bit

    def stamp_places(self, places: Tensor, seq: int, dirty: bool) -> None:
        """Marks places as last used by a batch; they stay dirty where they are. Of equal places any number may be given."""
        if dirty:
            self.stamp.index_fill_(0, places, 2 * seq + 1)
        else:
            self.stamp[places] = (self.stamp.index_select(0, places) & 1) + 2 * seq

    def mark_dirty(self, slots: Tensor) -> None:
        """The rows in these slots will be changed; their stamps stay."""
        self.stamp[slots] = self.stamp.index_select(0, slots) | 1

    def claim(self, found: Lookup, seq: int, stamps: bool = True) -> Misses:
        """The distinct rows that a batch misses. Those in host places are stamped, so that they are no candidates."""
        most = found.missing_count
        at = torch.nonzero_static(found.missing, size=most).squeeze(1)
        feature_at = self._features_at(found.batch, at)
        row_at = row = self._feature_row.index_select(0, feature_at) + found.batch.ids.index_select(0, at)
        claims = (self._count_up(most) - (most + 1)).int()  # -(most + 1) … -2: the first position has the smallest
        self.place_of_row.scatter_reduce_(0, row, claims, "amin")
        wins = self.place_of_row.index_select(0, row) == claims
        winner = torch.nonzero_static(wins, size=most, fill_value=0).squeeze(1)
        there = self._count_up(most) < wins.sum()
        row = torch.where(there, row.index_select(0, winner), self._sink_row)
        was = found.place.index_select(0, at.index_select(0, winner))
        table = torch.where(there, self._feature_table.index_select(0, feature_at.index_select(0, winner)), self.tables)
        below = there & (was < 0)
        if stamps:
            self.stamp_places(torch.where(there & ~below, was, self._sink_place), seq, False)
        bounds = torch.searchsorted(table, self._table_numbers)
        return Misses(most, at, row_at, feature_at, row, was, table, below, bounds.diff(), set_before(below).index_select(0, bounds).diff())

    def unclaim(self, misses: Misses) -> None:
        """Takes ``claim`` back: the rows are where they were."""
        self.place_of_row.index_copy_(0, misses.row, torch.where(misses.table < self.tables, misses.was, -1).int())

    def choose(self, queue_of: int, wanted: Tensor, most: int) -> Choice:
        """So many candidates of each table, in their queues' order. Shapes: wanted (tables,)."""
        queue = self._queues[queue_of]
        fresh = (self.stamp.index_select(0, queue.place) == queue.stamp) & (self.window.index_select(0, queue.place) == queue.window)
        before = set_before(fresh)
        at_bounds = before.index_select(0, queue.bounds)
        rank = before[:-1] - at_bounds.index_select(0, queue.table)
        chosen = torch.nonzero_static(fresh & (rank < wanted.index_select(0, queue.table)), size=most, fill_value=0).squeeze(1)
        places = queue.place.index_select(0, chosen) if queue.place.numel() else chosen
        return Choice(places, at_bounds.diff())

    def refill(
        self, queue_of: int, wanted: Sequence[int], seq: int, before: int, pinned: Tensor | None = None, first_announced: int = 0
    ) -> None:
        """Makes a queue anew, as of batch ``seq``: free places, then those that may leave and go first.

        These were last used before batch ``before``; or, with ``pinned``, are not in it. ``first_announced``: the oldest batch of those
        that have not begun. Shapes: wanted, the least that each table needs; pinned (slots,) bool.
        """
        kind = HOST if queue_of == HOST else SLOT
        goal = [max(w, min(size, size // QUEUE_SHARE + 1)) for w, size in zip(wanted, self.sizes[kind], strict=True)]
        place = self._first_to_go(kind, self._tensor(goal), seq, before, pinned, first_announced)
        table = torch.searchsorted(self._first_place[kind][1:], place, right=True)
        bounds = torch.searchsorted(place, self._first_place[kind])
        self._queues[queue_of] = _Queue(place, self.stamp.index_select(0, place), self.window.index_select(0, place), table, bounds)

    def _first_to_go(self, kind: int, goal: Tensor, seq: int, before: int, pinned: Tensor | None, first_announced: int) -> Tensor:
        """So many places of each table, or all that may leave, in the order of places."""
        first, sizes = self.first_place[kind][0], self.sizes[kind]
        stamp = self.stamp[first : first + sum(sizes)]
        table = torch.repeat_interleave(self._table_numbers[:-1], self._tensor(sizes), output_size=sum(sizes))
        age = seq - (stamp >> 1)
        far = BUCKETS // 2  # older ones are told apart by FAR_BATCHES
        age = torch.where(age < far, age, (far + (age - far) // FAR_BATCHES).clamp_max(BUCKETS - 1))
        # Bucket 0 is for free places, 1 … BUCKETS for ages, the oldest first, then the awaited, and the last for what may not leave.
        window = self.window[first : first + sum(sizes)]
        bucket = torch.where(window == 0, BUCKETS - age, BUCKETS + WINDOW - _next_use(window, first_announced))
        bucket = torch.where(stamp < 2 * before if pinned is None else ~pinned, bucket, STAYS)
        bucket = torch.where(stamp < 0, 0, bucket)
        bins = torch.zeros(self.tables * (STAYS + 1), dtype=_INT64, device=self.device)
        bins.index_add_(0, table * (STAYS + 1) + bucket, torch.ones_like(bucket))
        up_to = bins.view(self.tables, STAYS + 1).cumsum(1)
        whole = (up_to <= goal[:, None]).sum(1)  # buckets that are taken whole
        rest = goal - torch.where(up_to <= goal[:, None], up_to, 0).amax(1)
        partly = bucket == whole.index_select(0, table)
        rank = set_before(partly)
        rank = rank[:-1] - rank.index_select(0, self._first_place[kind][:-1] - first).index_select(0, table)
        taken = (bucket < whole.index_select(0, table)) | (partly & (rank < rest.index_select(0, table)))
        return (taken & (bucket < STAYS)).nonzero().squeeze(1) + first

    def commit(self, misses: Misses, slots: Tensor, hosts: Tensor, seq: int, dirty: bool) -> None:
        """Exchanges places: each missed row comes into its slot, and the row that was there into the missed row's host place.

        A host place that gets no row is free afterwards. Shapes: slots, hosts (count,), by miss.
        """
        count = slots.numel()
        row, table = misses.row[:count], misses.table[:count]
        leaves, left_stamp = self.row_of_place.index_select(0, slots), self.stamp.index_select(0, slots)
        held = leaves >= 0
        left = torch.where(held, self._first_row.index_select(0, table) + leaves, self._sink_row)
        self.place_of_row.index_copy_(0, row, slots.int())
        # Of those that go to the sink the last one stays there: nobody reads it.
        self.place_of_row[left] = hosts.int()
        self.row_of_place.index_copy_(0, slots, (row - self._first_row.index_select(0, table)).int())
        self.row_of_place.index_copy_(0, hosts, leaves)
        # A row that was below has a free host place, so stamp -1.
        was_dirty = self.stamp.index_select(0, hosts).clamp_min_(0) & 1
        self.stamp.index_copy_(0, slots, (torch.ones_like(was_dirty) if dirty else was_dirty) + 2 * seq)
        self.stamp.index_copy_(0, hosts, torch.where(held, (left_stamp & 1) + 2 * seq, -1))
        of_slots, of_hosts = self.window.index_select(0, slots), self.window.index_select(0, hosts)
        self.window.index_copy_(0, slots, of_hosts)
        self.window.index_copy_(0, hosts, of_slots)
        self.evictions.index_add_(0, table, held.long())
        self.write_backs.index_add_(0, table, (held & (left_stamp & 1).bool()).long())

    def settle(self, found: Lookup, misses: Misses) -> None:
        """After commit: every position that missed gets its row's slot."""
        place = self.place_of_row.index_select(0, misses.row_at).long()
        found.place.index_copy_(0, misses.at, place)
        found.slot.index_copy_(0, misses.at, place - self._feature_slot.index_select(0, misses.feature_at))

    def give_up(self, places: Tensor, table: Tensor) -> None:
        """The rows in these places, each once, are below from now on, and the places free. Shapes: (n,), free places among them."""
        rows = self.row_of_place.index_select(0, places)
        self.place_of_row[torch.where(rows >= 0, self._first_row.index_select(0, table) + rows, self._sink_row)] = -1
        self.row_of_place.index_fill_(0, places, -1)
        self.stamp.index_fill_(0, places, -1)
        self.window.index_fill_(0, places, 0)

    def arrive(self, misses: Misses, which: Tensor, hosts: Tensor, seq: int, dirty: bool) -> None:
        """After claim: these missed rows from below are in these free host places, and ``unclaim`` leaves them there. Shapes: (n,)."""
        table = misses.table.index_select(0, which)
        misses.was.index_copy_(0, which, hosts)
        self.row_of_place.index_copy_(0, hosts, (misses.row.index_select(0, which) - self._first_row.index_select(0, table)).int())
        self.stamp.index_fill_(0, hosts, 2 * seq + dirty)

    def give_back(self, slots: Tensor, hosts: Tensor, table: Tensor) -> None:
        """Takes ``commit`` back where the missed rows did not come: they are below, and what was in their slots is there again."""
        returning, stamp, window = (x.index_select(0, hosts) for x in (self.row_of_place, self.stamp, self.window))
        self.give_up(slots, table)
        self.place_of_row[torch.where(returning >= 0, self._first_row.index_select(0, table) + returning, self._sink_row)] = slots.int()
        self.row_of_place.index_copy_(0, slots, returning)
        self.stamp.index_copy_(0, slots, stamp)
        self.window.index_copy_(0, slots, window)
        self.row_of_place.index_fill_(0, hosts, -1)
        self.stamp.index_fill_(0, hosts, -1)
        self.window.index_fill_(0, hosts, 0)

    def forget(self) -> None:
        """Every row is below, unwritten."""
        self.place_of_row.fill_(-1)
        self.row_of_place.fill_(-1)
        self.stamp.fill_(-1)
        self.window.fill_(0)

    def fill(self, table: int) -> None:
        """All rows of a table without any are in its host places, unused and clean; there are as many of those."""
        mine = self.segment(HOST, table)
        self.place_of_row[self.first_row[table] : self.first_row[table + 1]] = torch.arange(
            mine.start, mine.stop, dtype=_INT32, device=self.device
        )
        self.row_of_place[mine] = torch.arange(self.rows[table], dtype=_INT32, device=self.device)
        self.stamp[mine] = 0

    # -- looking in

    def places_of(self, table: int, first_row: int, row_count: int) -> Tensor:
        """Where consecutive rows are; -1: below. Shapes: (row_count,) int32."""
        start = self.first_row[table] + first_row
        return self.place_of_row[start : start + row_count]

    def segment(self, kind: int, table: int) -> slice:
        """The places of one kind of a table."""
        first = self.first_place[kind]
        return slice(first[table], first[table + 1])

    def resident(self, kind: int, table: int) -> int:
        """How many places of one kind hold a row."""
        return int((self.row_of_place[self.segment(kind, table)] >= 0).sum())

    def rows_by_age(self, table: int) -> Tensor:
        """The rows in the table's pool, the longest unused first. Shapes: (n,) int64."""
        mine = self.segment(SLOT, table)
        order = self.stamp[mine].argsort(stable=True)
        rows = self.row_of_place[mine].index_select(0, order)
        return rows[rows >= 0].long()

    def check(self) -> None:
        """Tests: raises at a broken invariant."""
        place_of_row, row_of_place, stamp = self.place_of_row.cpu()[:-1], self.row_of_place.cpu()[:-1], self.stamp.cpu()[:-1]
        if (place_of_row < -1).any() or (place_of_row >= self.places).any():
            raise AssertionError("device directory: a claim is left, or a place is none")
        if not torch.equal(row_of_place < 0, stamp < 0):
            raise AssertionError("device directory: a free place has a stamp, or one that is not free has none")
        if ((stamp < 0) & (self.window.cpu()[:-1] != 0)).any():
            raise AssertionError("device directory: a free place awaits a batch")
        seen = 0
        for kind in (SLOT, HOST):
            for table in range(self.tables):
                mine, first = self.segment(kind, table), self.first_row[table]
                rows = row_of_place[mine]
                where = torch.arange(mine.start, mine.stop)[rows >= 0]
                rows = rows[rows >= 0].long()
                seen += rows.numel()
                if (rows >= self.rows[table]).any() or not torch.equal(place_of_row[first + rows].long(), where):
                    raise AssertionError(f"device directory: places and rows of table {self.names[table]!r} are not inverse to each other")
        if seen != int((place_of_row >= 0).sum()):
            raise AssertionError("device directory: a row has a place that does not have it")


def _next_use(window: Tensor, first: int) -> Tensor:
    """How many announced batches, from ``first`` on, come before the first one in a window that is not empty. Shapes: (n,) int64."""
    shift = first % WINDOW
    turned = (window >> shift) | ((window << (WINDOW - shift)) & ((1 << WINDOW) - 1))
    lowest = turned & -turned
    return torch.frexp(lowest.double()).exponent.long() - 1
