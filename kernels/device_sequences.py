"""``Sequences``: fixed sequences of launches, for batches of up to so many ids, that a CUDA device replays as graphs.

Sequences are of a kind for each power of two that batches have ids up to, and for each width of ids and offsets. There are ``SEQUENCES`` of
a kind, which take turns. Each has rooms of its own:

    given     what the host passes (``device_kernels``: ``batch``), in memory that the host and the device see
    summary   what the device tells, in such memory, too; its last element is the number of the batch, written behind the rest
    room      what its launches leave for later ones, on the device; of the owner's kind

One is used again when the host has looked at what it told: then the device has read what it was given.
"""

from __future__ import annotations

import gc
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

SEQUENCES = 4
"""Of one kind, so batches that the host need not have looked at; a guess: they are rarely prefetched further ahead."""

BLOCK = 512
"""Ids that a program of a kernel looks at."""

PROGRAMS, LOOK_PROGRAMS = 132, 264
"""Of a launch at most, each of which takes block after block; of a look-up, which has the most to read. Few leave the multiprocessors to
what trains beside them, and need not be fast: all launches of a batch together have a step's time (docs/gpu.md)."""

BATCH = 16
"""Numbers in ``given``."""

GIVEN = struct.Struct("15q")
"""What the host gives a sequence: ``batch`` in ``device_kernels``."""

Room = TypeVar("Room")


class Sequence(Generic[Room]):
    """One of them; its owner makes ``replay`` out of what it captured in the second run (in the first one kernels are compiled)."""

    def __init__(self, capacity: int, ids32: bool, offsets32: bool, summary_size: int, room: Room, on_gpu: bool) -> None:
        self.capacity, self.ids32, self.offsets32, self.room = capacity, ids32, offsets32, room
        self.given, self.summary = (torch.zeros(n, dtype=torch.int64, pin_memory=on_gpu) for n in (BATCH, summary_size))
        self.as_given, self.as_summary = self.given.numpy().data.cast("B"), self.summary.numpy()
        self.has_run = False
        self.graphs: tuple[Any, ...] = ()
        self.replay: Any = None


class Sequences(Generic[Room]):
    """Those of a group of tables, whose summaries have ``summary_size`` elements; ``make_room`` is given a capacity."""

    def __init__(self, summary_size: int, make_room: Callable[[int], Room], device: torch.device) -> None:
        self._summary_size, self._make_room, self._on_gpu = summary_size, make_room, device.type == "cuda"
        self._rings: dict[tuple[int, bool, bool], deque[Sequence[Room]]] = {}

    def next(self, capacity: int, ids: torch.Tensor, offsets: torch.Tensor) -> Sequence[Room]:
        """For such a batch: the one whose last run was longest ago."""
        kind = capacity, ids.dtype is torch.int32, offsets.dtype is torch.int32
        ring = self._rings.setdefault(kind, deque())
        if len(ring) < SEQUENCES:
            ring.append(Sequence(*kind, self._summary_size, self._make_room(capacity), self._on_gpu))
        else:
            ring.rotate(-1)
        return ring[-1]

    def forget(self) -> None:
        """Graphs are given up; whoever has looked at none of what they told still can."""
        self._rings.clear()


def capacity_for(ids: int) -> int:
    """The ids that a sequence for so many may have."""
    return max(BLOCK, 1 << max(0, ids - 1).bit_length())


def captured(launch: Callable[[], object], pool: Any = None, keep: bool = False) -> Any:
    """What ``launch`` queues on the current stream, which must not be the default one, as a graph; to ``keep``: one that can be looked into
    and is not instantiated yet. Its memory is from ``pool``, or its own.

    Garbage is not collected meanwhile: it may hold graphs and registered memory, and the runtime ends a capture in which such are freed.
    """
    graph = torch.cuda.CUDAGraph(keep_graph=keep)
    collects = gc.isenabled()
    gc.disable()
    try:
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            launch()
        finally:
            graph.capture_end()
    finally:
        if collects:
            gc.enable()
    return graph
