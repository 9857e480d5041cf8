"""``trace``: every hop between tiers and everything that a step does, as a file that Perfetto and chrome://tracing open.

Lanes are threads (the training thread, the one that looks up coming batches, the cleaners of volumes) and the places of I/O queues: a
read or write is in its place as long as it is in flight. What overlaps is above each other.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .errors import ConfigurationError
from .kernels import spans


@contextmanager
def trace(path: str | os.PathLike[str], *, most_events: int = 1_000_000) -> Iterator[None]:
    """Records what this process does until the end of the block, and writes it as JSON (Chrome's trace event format).

    With several ranks each calls it with its own path. Native events beyond ``most_events`` (48 bytes each) are counted, not kept.

    Raises: ConfigurationError where a trace is being recorded already; OSError.
    """
    file = Path(path)
    file.touch()  # a path that cannot be written fails now
    if not spans.start(most_events):
        raise ConfigurationError(f"trace {file}: this process is recording a trace already; end that one first")
    try:
        yield
    finally:
        events, dropped = spans.stop()
        file.write_text(json.dumps(chrome_trace(events, dropped)))


def chrome_trace(events: list[spans.Event], dropped: int = 0) -> dict[str, Any]:
    """The events as Chrome's trace event format. Lanes begin at the first event; times are in microseconds."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    first_ns = min((e.begin_ns for e in events), default=0)
    lanes: dict[tuple[int, int], int] = {}
    shown = []
    for e in sorted(events, key=lambda e: (e.begin_ns, -e.end_ns)):
        lane = lanes.setdefault((e.queue, e.lane), len(lanes))
        shown.append(
            {
                "name": e.what,
                "cat": "io" if e.queue else "thread",
                "ph": "X",
                "pid": rank,
                "tid": lane,
                "ts": (e.begin_ns - first_ns) / 1e3,
                "dur": (e.end_ns - e.begin_ns) / 1e3,
                "args": {"bytes" if e.queue else "rows": e.amount} if e.amount else {},
            }
        )
    names: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}]
    for (queue, number), lane in lanes.items():
        main = threading.main_thread().native_id
        name = f"I/O queue {queue}, place {number}" if queue else "training thread" if number == main else f"thread {number}"
        names.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": lane, "args": {"name": name}})
        order = 1000 * queue + number if queue else 0 if number == main else 1
        names.append({"ph": "M", "name": "thread_sort_index", "pid": rank, "tid": lane, "args": {"sort_index": order}})
    return {"traceEvents": [*names, *shown], "displayTimeUnit": "ms", "otherData": {"events_left_out": dropped}}
