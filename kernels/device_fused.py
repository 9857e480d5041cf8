"""``FusedDirectory``: ``DeviceDirectory`` with kernels where every batch passes: an attempt, and announcements.

An attempt is a sequence of launches (``device_sequences``, ``device_kernels``) over scratch for the largest batch yet, replayed as two
graphs: all up to the exchange, and the exchange, which runs beside the next attempt. Sequences share the scratch, since they run one after
the other; each has a room of its own for what is to be exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .device_directory import BUCKETS, FAR_BATCHES, HOST, QUEUE_SHARE, SLOT, STAYS, WINDOW, Attempt, DeviceDirectory, Exchange, Turn
from .device_ids import Batch
from .device_planes import Moves
from .device_sequences import BATCH, BLOCK, GIVEN, LOOK_PROGRAMS, PROGRAMS, Sequence, Sequences, capacity_for, captured
from .device_streams import Streams, new_event

SLOT_BLOCK = 2048
"""Slots that a program looks at."""

BINS = 2 * BUCKETS
"""Of a table's histogram; those from ``STAYS`` on are not used."""

_INT8, _INT32, _INT64 = torch.int8, torch.int32, torch.int64


class _Scratch:
    """What the launches of an attempt pass on: by position, by candidate, by slot, by block or by table. They allocate nothing, since each
    graph would have that memory for itself."""

    def __init__(self, directory: DeviceDirectory, capacity: int) -> None:
        from .device_kernels_exchange import PageOrder  # needs Triton, which a CPU's PyTorch may lack

        tables, sizes = directory.tables, directory.sizes[SLOT]

        def empty(count: int, dtype: torch.dtype = _INT32) -> Tensor:
            return torch.empty(max(1, count), dtype=dtype, device=directory.device)

        self.capacity, blocks = capacity, capacity // BLOCK
        queue_blocks = -(-max(queue_room(s) for s in sizes) // BLOCK)
        self.slot_blocks = -(-max(sizes) // SLOT_BLOCK)
        self.missing, self.wins, self.winners = empty(capacity), empty(capacity, _INT8), empty(capacity)
        self.block_wins, self.win_starts = empty(blocks), empty(blocks)
        self.fresh = empty(tables * queue_blocks * BLOCK, _INT8)
        self.block_fresh, self.fresh_starts = empty(tables * queue_blocks), empty(tables * queue_blocks)
        self.bucket = empty(directory.slots)
        self.whole, self.rest = empty(tables), empty(tables, _INT64)
        self.whole_counts, self.part_counts, self.taken_starts, self.part_starts = (empty(tables * self.slot_blocks) for _ in range(4))
        self.decided = empty(3 + 2 * tables, _INT64)
        self.chosen = empty(min(capacity, directory.slots))
        self.pages = PageOrder.of(sum(directory.sizes[HOST]), min(capacity, directory.slots), directory.device)
        self.batch = empty(BATCH, _INT64)
        self.counters = empty(2 + 4 * tables + tables * BINS, _INT64)
        parts = self.counters.split([1, 1, *[tables] * 4, tables * BINS])
        self.bad, self.missing_count, self.hits, self.misses, self.below, self.available, self.bins = parts


@dataclass
class _Room:
    """What an attempt leaves for its exchange."""

    moves: Moves
    done: Any  # an event behind the exchange; None without a device


class _Out:
    """Places and slots of a batch, in memory that is used again: to make it, and views of it, takes the host 0.03 ms."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._memory, self._count = torch.empty(2 * capacity, dtype=_INT64, device=device), -1
        self.address = self._memory.data_ptr()

    def views(self, count: int) -> tuple[Tensor, Tensor]:
        """Shapes: (count,)."""
        if count != self._count:
            self._views, self._count = (self._memory[:count], self._memory[count : 2 * count]), count
        return self._views


def queue_room(slots: int) -> int:
    """Candidates that a table's queue has room for; a batch that misses more rows at once goes the host's way."""
    return min(slots, slots // 2 + 512)


class FusedDirectory(DeviceDirectory):
    """The same directory, for CUDA devices."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        rooms = [queue_room(s) for s in self.sizes[SLOT]]
        self._queue_start = self._tensor([sum(rooms[:t]) for t in range(self.tables + 1)])
        self._queue_fill = torch.zeros(self.tables, dtype=_INT64, device=self.device)
        self._queue_place = torch.empty(sum(rooms), dtype=_INT32, device=self.device)
        self._queue_stamp, self._queue_window = torch.empty(2, sum(rooms), dtype=_INT64, device=self.device).unbind(0)
        self._scratch: _Scratch | None = None
        self._outs: dict[int, list[_Out]] = {}  # that are free, by capacity
        self._sequences = Sequences(2 + 3 * self.tables + self.features + 2, self._make_room, self.device)

    @property
    def _of_feature(self) -> tuple[Tensor, ...]:
        return self._feature_row, self._feature_rows, self._feature_slot, self._feature_table

    def announce(self, batch: Batch, number: int, comes: bool) -> None:
        from .device_kernels_attempt import announce  # needs Triton, which a CPU's PyTorch may lack

        announce(*batch, self._of_feature, self.place_of_row, self.window, number % WINDOW, comes)

    def attempt(self, batch: Batch, turn: Turn, exchange: Exchange, streams: Streams, coming: tuple[Batch, int] | None = None) -> Attempt:
        ids, offsets, stride = batch
        count = ids.numel()
        capacity = capacity_for(count)
        if self._scratch is None or capacity > self._scratch.capacity:
            self._grow(capacity)
        sequence = self._sequences.next(capacity, ids, offsets)
        out = self._out(capacity, streams)
        place, slot = out.views(count)
        awaited: tuple[int, ...] = (0, 0, 0, 0, 0)
        if coming is not None:
            later, number = coming
            if later.ids.numel() <= capacity and later.ids.dtype is ids.dtype and later.offsets.dtype is offsets.dtype:
                awaited = (later.ids.data_ptr(), later.offsets.data_ptr(), later.ids.numel(), later.stride, number % WINDOW)
            else:
                with streams.on_directory():
                    self.announce(later, number, True)
        GIVEN.pack_into(sequence.as_given, 0, ids.data_ptr(), offsets.data_ptr(), out.address, count, stride, *turn, *awaited)
        if sequence.replay is None:
            self._queue_launches(sequence, exchange, streams)
        else:
            streams.run(sequence.replay)
        return Attempt(batch, turn.seq, place, slot, sequence.as_summary, sequence.room.done, partial(self._outs[capacity].append, out))

    def _out(self, capacity: int, streams: Streams) -> _Out:
        free = self._outs.setdefault(capacity, [])
        if free:
            return free.pop()
        with streams.on_directory():  # whoever drops it leaves it to what comes there
            return _Out(capacity, self.device)

    def _queue_launches(self, sequence: Sequence[_Room], exchange: Exchange, streams: Streams) -> None:
        """The first time one by one, since kernels are compiled then; the second time as the graphs that are replayed from then on."""
        room = sequence.room
        move = partial(exchange, room.moves)
        with streams.on_directory():
            if self.device.type == "cuda" and sequence.has_run:
                sequence.graphs = captured(partial(self._launch, sequence)), captured(move)
                sequence.replay = streams.prepared(*sequence.graphs, room.done)
            else:
                streams.wait(room.done)
                self._launch(sequence)
                with streams.on_mover():
                    move()
                    streams.record(room.done)
        if sequence.replay is not None:
            streams.run(sequence.replay)
        sequence.has_run = True

    def _grow(self, capacity: int) -> None:
        """Scratch for so many ids. Graphs with the old one are given up."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._sequences.forget()
        self._scratch = None  # before there is another
        self._scratch = _Scratch(self, capacity)

    def _make_room(self, capacity: int) -> _Room:
        slots, hosts, tables, order = torch.empty(4, min(capacity, self.slots), dtype=_INT32, device=self.device).unbind(0)
        count = torch.zeros(2, dtype=_INT64, device=self.device)
        return _Room(Moves(slots, hosts, tables, count, order), new_event() if self.device.type == "cuda" else None)

    def _launch(self, sequence: Sequence[_Room]) -> None:
        from . import device_kernels_attempt as k  # needs Triton
        from . import device_kernels_queue as queue
        from .device_kernels import CHUNK, start
        from .device_kernels_exchange import by_page

        s, tables, moves = self._scratch, self.tables, sequence.room.moves
        assert s is not None
        features = self.features
        pow2 = {"FEATURES_POW2": _pow2(features + 1), "TABLES_POW2": _pow2(tables)}
        ids32, offsets32 = {"IDS32": sequence.ids32}, {"OFFSETS32": sequence.offsets32}
        blocks = sequence.capacity // BLOCK
        by_position, by_slot = (min(PROGRAMS, blocks),), (tables, min(max(1, PROGRAMS // tables), s.slot_blocks))
        by_block, first_slot = {"BLOCK": BLOCK}, self._first_place[SLOT]
        reads = {"FEATURES": features, "SEARCH": max(1, features.bit_length()), **ids32, **offsets32, **by_block}
        start[(-(-s.counters.numel() // 2048),)](sequence.given, s.batch, s.counters, s.counters.numel(), BLOCK=2048)
        k._look[(2 * min(LOOK_PROGRAMS // 2, blocks),)](
            s.batch, *self._of_feature, self.place_of_row, self.stamp, self.window, s.missing, s.wins, s.block_wins, s.bad, s.missing_count,
            s.hits, self.slots, self._sink_place, WINDOW=WINDOW, **reads,
        )  # fmt: skip
        k._claim[by_position](s.batch, s.missing, s.missing_count, self._feature_row, self.place_of_row, **reads)
        k._win[by_position](
            s.batch, s.missing, s.missing_count, self._feature_row, self._feature_table, self.place_of_row, s.wins, s.block_wins, s.misses,
            s.below, self._queue_place, self._queue_stamp, self._queue_window, self._queue_start, self._queue_fill, self.stamp, self.window,
            s.fresh, s.block_fresh, s.available, tables, TABLES_POW2=pow2["TABLES_POW2"], **reads,
        )  # fmt: skip
        k._scan[(1,)](
            s.batch, s.bad, s.missing_count, s.block_wins, s.win_starts, s.block_fresh, s.fresh_starts, s.misses, s.available, s.decided,
            self._queue_fill, tables, FEATURES=features, CHUNK=CHUNK, **pow2, **ids32, **offsets32, **by_block,
        )  # fmt: skip
        queue._age[by_slot](
            s.batch, s.decided, first_slot, self.stamp, self.window, s.bucket, s.bins, BUCKETS=BUCKETS, FAR_BATCHES=FAR_BATCHES,
            WINDOW=WINDOW, BLOCK=SLOT_BLOCK,
        )  # fmt: skip
        queue._threshold[(tables,)](
            s.decided, s.bins, s.misses, first_slot, self._queue_start, s.whole, s.rest, QUEUE_SHARE=QUEUE_SHARE, STAYS=STAYS, BINS=BINS
        )  # fmt: skip
        queue._count_old[by_slot](
            s.decided, first_slot, s.bucket, s.whole, s.whole_counts, s.part_counts, s.slot_blocks, STAYS=STAYS, BLOCK=SLOT_BLOCK
        )
        queue._scan_old[(tables,)](
            s.decided, s.whole_counts, s.part_counts, s.rest, s.taken_starts, s.part_starts, self._queue_fill, s.available, s.slot_blocks,
            CHUNK=CHUNK,
        )  # fmt: skip
        queue._queue[by_slot](
            s.decided, first_slot, s.bucket, s.whole, s.rest, s.taken_starts, s.part_starts, self._queue_start, self.stamp, self.window,
            self._queue_place, self._queue_stamp, self._queue_window, s.slot_blocks, STAYS=STAYS, BLOCK=SLOT_BLOCK,
        )  # fmt: skip
        k._choose[by_position](
            s.batch, s.bad, s.missing_count, s.hits, s.decided, s.misses, s.below, s.available, s.fresh, s.fresh_starts, self._queue_place,
            self._queue_start, self._queue_fill, s.chosen, sequence.summary, s.wins, s.win_starts, s.winners, tables,
            FEATURES=features, **pow2, **offsets32, **by_block,
        )  # fmt: skip
        k._commit[by_position](
            s.batch, s.bad, s.missing_count, s.decided, s.misses, s.below, s.available, s.winners, self._feature_row,
            self._feature_table, s.chosen, self._first_row, self.place_of_row, self.row_of_place, self.stamp, self.window, self.evictions,
            self.write_backs, moves.slots, moves.hosts, moves.tables, moves.count, sequence.summary[-1:], tables,
            TABLES_POW2=pow2["TABLES_POW2"], **reads,
        )  # fmt: skip
        k._settle[by_position](
            s.batch, moves.count, s.missing, s.missing_count, self._feature_row, self._feature_slot, self.place_of_row, **reads
        )
        assert moves.order is not None
        by_page(moves.hosts, moves.count, self._first_place[HOST], moves.order, s.pages)


def _pow2(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
