"""What this process does and when: a range of torch's profiler, and, while a trace is recorded, an event of it."""

from __future__ import annotations

import threading
import time
from typing import Any, NamedTuple

from torch.autograd import _profiler_enabled
from torch.profiler import record_function

from . import _core


class Event(NamedTuple):
    """One thing that a lane did: a thread of that kernel id, where ``queue`` is 0, or a place in that I/O queue.

    ``amount``: rows, or bytes of I/O.
    """

    what: str
    begin_ns: int
    end_ns: int
    amount: int
    queue: int
    lane: int


_events: list[Event] | None = None  # while a trace is recorded


class span:
    """``with span("forward 7"):``. Times are of ``time.perf_counter_ns``, as the native side's. While nobody profiles it costs next to
    nothing (a range of torch's that nobody records takes 4 µs)."""

    __slots__ = ("_begin_ns", "_profiled", "_what")

    def __init__(self, what: str) -> None:
        self._what, self._begin_ns = what, 0
        self._profiled: record_function | None = None

    def __enter__(self) -> None:
        if _profiler_enabled():
            self._profiled = record_function(f"## {self._what} ##")
            self._profiled.__enter__()
        if _events is not None:
            self._begin_ns = time.perf_counter_ns()

    def __exit__(self, *failure: Any) -> None:
        events = _events
        if events is not None and self._begin_ns:
            events.append(Event(self._what, self._begin_ns, time.perf_counter_ns(), 0, 0, threading.get_native_id()))
        if self._profiled is not None:
            self._profiled.__exit__(*failure)


def start(most_events: int) -> bool:
    """Begins to record, on the native side at most so many events. False: somebody else does."""
    global _events
    if not _core.trace_start(most_events):
        return False
    _events = []
    return True


def stop() -> tuple[list[Event], int]:
    """Ends it: the events, and how many native ones there was no room for."""
    global _events
    mine, _events = _events or [], None
    native, dropped = _core.trace_stop()
    return [*mine, *(Event(*e) for e in native)], dropped
