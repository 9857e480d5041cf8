"""``FusedDirectory``: ``DeviceDirectory`` with kernels where every batch passes: an attempt, and announcements.

An attempt is a fixed sequence of launches (``device_kernels``) over scratch for the largest batch yet. On a CUDA device it is captured as
two graphs, which are replayed from then on: all up to the exchange, one launch instead of thirteen, and the exchange, which runs beside
the next attempt. Sequences are of a kind for each power of two that batches have ids up to, and there are several of a kind. They share
the scratch, since they run one after the other; each has rooms of its own for what the host passes and reads, in memory that both see,
and for what is to be exchanged.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .device_directory import BUCKETS, FAR_BATCHES, QUEUE_SHARE, SLOT, STAYS, WINDOW, Attempt, DeviceDirectory, Exchange, Turn
from .device_ids import Batch

SEQUENCES = 4
"""Of one kind, so attempts that the host need not have looked at; a guess: batches are rarely prefetched further ahead."""

BINS = 2 * BUCKETS
"""Of a table's histogram; those from ``STAYS`` on are not used."""

_INT8, _INT32, _INT64 = torch.int8, torch.int32, torch.int64


GIVEN = struct.Struct("15q")
"""What the host gives a sequence: ``batch`` in ``device_kernels``."""


@cache
def kernels() -> ModuleType:
    """``device_kernels``, which needs Triton, which a CPU's PyTorch may lack."""
    from . import device_kernels

    return device_kernels


class _Scratch:
    """What the launches of an attempt pass on: by position, by candidate, by slot, by block or by table."""

    def __init__(self, directory: DeviceDirectory, capacity: int) -> None:
        k, tables, sizes = kernels(), directory.tables, directory.sizes[SLOT]

        def empty(count: int, dtype: torch.dtype = _INT32) -> Tensor:
            return torch.empty(max(1, count), dtype=dtype, device=directory.device)

        self.capacity, blocks = capacity, capacity // k.BLOCK
        self.queue_blocks = -(-max(queue_room(s) for s in sizes) // k.BLOCK)
        self.slot_blocks = -(-max(sizes) // k.SLOT_BLOCK)
        self.row, self.feature = empty(capacity, _INT64), empty(capacity)
        self.missing, self.wins = empty(capacity, _INT8), empty(capacity, _INT8)
        self.block_wins, self.win_starts = empty(blocks), empty(blocks)
        self.fresh = empty(tables * self.queue_blocks * k.BLOCK, _INT8)
        self.block_fresh, self.fresh_starts = empty(tables * self.queue_blocks), empty(tables * self.queue_blocks)
        self.bucket = empty(directory.slots)
        self.whole, self.rest = empty(tables), empty(tables, _INT64)
        self.whole_counts, self.part_counts, self.taken_starts, self.part_starts = (empty(tables * self.slot_blocks) for _ in range(4))
        self.decided = empty(2 + 2 * tables, _INT64)
        self.chosen = empty(min(capacity, directory.slots))
        self.batch = empty(k.BATCH, _INT64)
        self.counters = empty(2 + 4 * tables + tables * BINS, _INT64)
        parts = self.counters.split([1, 1, *[tables] * 4, tables * BINS])
        self.bad, self.missing_count, self.hits, self.misses, self.below, self.available, self.bins = parts


@dataclass
class _Sequence:
    """One sequence of launches for batches of up to ``capacity`` ids, and what the host gives it and reads from it."""

    capacity: int
    ids32: bool
    offsets32: bool
    given: Tensor
    summary: Tensor
    slots: Tensor  # what is to be exchanged, and how much of it
    hosts: Tensor
    tables: Tensor
    count: Tensor
    done: Any  # an event
    graphs: tuple[Any, Any] | None = None  # up to the exchange, and the exchange
    runs: int = 0

    def __post_init__(self) -> None:
        self.as_given, self.as_summary = self.given.numpy().data.cast("B"), self.summary.numpy()


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
        self._sequences: dict[tuple[int, bool, bool], deque[_Sequence]] = {}  # by kind

    @property
    def _of_feature(self) -> tuple[Tensor, ...]:
        return self._feature_row, self._feature_rows, self._feature_slot, self._feature_table

    def announce(self, batch: Batch, number: int, comes: bool) -> None:
        kernels().announce(*batch, self._of_feature, self.place_of_row, self.window, number % WINDOW, comes)

    def attempt(self, batch: Batch, turn: Turn, exchange: Exchange, coming: tuple[Batch, int] | None = None) -> Attempt:
        ids, offsets, stride = batch
        count = ids.numel()
        capacity = max(kernels().BLOCK, _pow2(count))
        if self._scratch is None or capacity > self._scratch.capacity:
            self._grow(capacity)
        sequence = self._next(capacity, ids.dtype is _INT32, offsets.dtype is _INT32)
        out = torch.empty((2, count), dtype=_INT64, device=self.device)
        place, slot = out.unbind(0)
        awaited: tuple[int, ...] = (0, 0, 0, 0, 0)
        if coming is not None:
            later, number = coming
            if later.ids.numel() <= capacity and later.ids.dtype is ids.dtype and later.offsets.dtype is offsets.dtype:
                awaited = (later.ids.data_ptr(), later.offsets.data_ptr(), later.ids.numel(), later.stride, number % WINDOW)
            else:
                self.announce(later, number, True)
        GIVEN.pack_into(sequence.as_given, 0, ids.data_ptr(), offsets.data_ptr(), out.data_ptr(), count, stride, *turn, *awaited)
        sequence.runs += 1
        if self.device.type != "cuda" or sequence.runs == 1:  # in the first run kernels are compiled
            self._launch(sequence)
            move = partial(exchange, sequence.slots, sequence.hosts, sequence.tables, sequence.count)
        else:
            if sequence.graphs is None:
                sequence.graphs = self._captured(sequence, exchange)
            sequence.graphs[0].replay()
            move = sequence.graphs[1].replay
        return Attempt(batch, turn.seq, place, slot, sequence.as_summary, move, sequence.done)

    def _grow(self, capacity: int) -> None:
        """Scratch for so many ids. The graphs with the old one are given up; whoever has looked at none of their attempts still can."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._sequences.clear()
        self._scratch = None  # before there is another
        self._scratch = _Scratch(self, capacity)

    def _next(self, capacity: int, ids32: bool, offsets32: bool) -> _Sequence:
        """The one whose last run was longest ago: whoever makes attempts has looked at that one, and its records are where they belong."""
        ring = self._sequences.setdefault((capacity, ids32, offsets32), deque())
        on_gpu = self.device.type == "cuda"
        if len(ring) < SEQUENCES:
            sizes = (kernels().BATCH, 2 + 3 * self.tables + self.features + 2)
            given, summary = (torch.zeros(n, dtype=_INT64, pin_memory=on_gpu) for n in sizes)
            slots, hosts, tables = torch.empty(3, min(capacity, self.slots), dtype=_INT32, device=self.device).unbind(0)
            count = torch.zeros(1, dtype=_INT64, device=self.device)
            done = torch.cuda.Event() if on_gpu else None
            ring.append(_Sequence(capacity, ids32, offsets32, given, summary, slots, hosts, tables, count, done))
        else:
            ring.rotate(-1)
            if on_gpu and not ring[-1].done.query():
                torch.cuda.current_stream(self.device).wait_event(ring[-1].done)
        return ring[-1]

    def _captured(self, sequence: _Sequence, exchange: Exchange) -> tuple[Any, Any]:
        graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        graphs[0].capture_begin(capture_error_mode="thread_local")
        self._launch(sequence)
        graphs[0].capture_end()
        graphs[1].capture_begin(capture_error_mode="thread_local")
        exchange(sequence.slots, sequence.hosts, sequence.tables, sequence.count)
        graphs[1].capture_end()
        return graphs

    def _launch(self, sequence: _Sequence) -> None:
        k, s, tables = kernels(), self._scratch, self.tables
        assert s is not None
        features = self.features
        feature_sizes = {"FEATURES": features, "SEARCH": max(1, features.bit_length())}
        pow2 = {"FEATURES_POW2": _pow2(features + 1), "TABLES_POW2": _pow2(tables)}
        ids32, offsets32 = {"IDS32": sequence.ids32}, {"OFFSETS32": sequence.offsets32}
        blocks = sequence.capacity // k.BLOCK
        by_position, by_candidate, by_slot = (blocks,), (tables * s.queue_blocks,), (tables, s.slot_blocks)
        by_block, first_slot = {"BLOCK": k.BLOCK}, self._first_place[SLOT]
        k._start[(-(-s.counters.numel() // 2048),)](sequence.given, s.batch, s.counters, s.counters.numel(), BLOCK=2048)
        k._look[(2 * blocks,)](
            s.batch, *self._of_feature, self.place_of_row, self.stamp, self.window, s.row, s.feature, s.missing, s.bad, s.missing_count,
            s.hits, self.slots, self._sink_place, blocks, WINDOW=WINDOW, **feature_sizes, **ids32, **offsets32, **by_block,
        )  # fmt: skip
        k._claim[by_position](s.missing, s.row, self.place_of_row, s.missing_count, **by_block)
        k._win[(blocks + tables * s.queue_blocks,)](
            s.batch, s.missing, s.row, s.feature, self._feature_table, self.place_of_row, s.missing_count, s.wins, s.block_wins, s.misses,
            s.below, self._queue_place, self._queue_stamp, self._queue_window, self._queue_start, self._queue_fill, self.stamp, self.window,
            s.fresh, s.block_fresh, s.available, blocks, s.queue_blocks, **by_block,
        )  # fmt: skip
        k._scan[(1,)](
            s.batch, s.bad, s.missing_count, s.block_wins, s.win_starts, s.block_fresh, s.fresh_starts, s.misses, s.available, s.decided,
            blocks, tables * s.queue_blocks, tables, FEATURES=features, CHUNK=k.CHUNK, **pow2, **ids32, **offsets32,
        )  # fmt: skip
        k._age[by_slot](
            s.batch, s.decided, first_slot, self.stamp, self.window, s.bucket, s.bins, BUCKETS=BUCKETS, FAR_BATCHES=FAR_BATCHES,
            WINDOW=WINDOW, BLOCK=k.SLOT_BLOCK,
        )  # fmt: skip
        k._threshold[(tables,)](
            s.decided, s.bins, s.misses, first_slot, self._queue_start, s.whole, s.rest, QUEUE_SHARE=QUEUE_SHARE, STAYS=STAYS, BINS=BINS
        )  # fmt: skip
        k._count_old[by_slot](s.decided, first_slot, s.bucket, s.whole, s.whole_counts, s.part_counts, STAYS=STAYS, BLOCK=k.SLOT_BLOCK)
        k._scan_old[(tables,)](
            s.decided, s.whole_counts, s.part_counts, s.rest, s.taken_starts, s.part_starts, self._queue_fill, s.available, s.slot_blocks,
            CHUNK=k.CHUNK,
        )  # fmt: skip
        k._queue[by_slot](
            s.decided, first_slot, s.bucket, s.whole, s.rest, s.taken_starts, s.part_starts, self._queue_start, self.stamp, self.window,
            self._queue_place, self._queue_stamp, self._queue_window, STAYS=STAYS, BLOCK=k.SLOT_BLOCK,
        )  # fmt: skip
        k._choose[by_candidate](
            s.batch, s.bad, s.missing_count, s.hits, s.decided, s.misses, s.below, s.available, s.fresh, s.fresh_starts, self._queue_place,
            self._queue_start, self._queue_fill, s.chosen, sequence.summary, s.queue_blocks, tables, FEATURES=features, **pow2, **offsets32,
            **by_block,
        )  # fmt: skip
        k._commit[by_position](
            s.batch, s.bad, s.missing_count, s.decided, s.misses, s.below, s.available, s.wins, s.win_starts, s.row, s.feature,
            self._feature_table, s.chosen, self._first_row, self.place_of_row, self.row_of_place, self.stamp, self.window, self.evictions,
            self.write_backs, sequence.slots, sequence.hosts, sequence.tables, sequence.count, sequence.summary[-1:], tables,
            TABLES_POW2=pow2["TABLES_POW2"], **by_block,
        )  # fmt: skip
        k._settle[by_position](s.batch, sequence.count, s.missing, s.row, s.feature, self._feature_slot, self.place_of_row, **by_block)


def _pow2(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
