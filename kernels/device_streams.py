"""The streams of a pool on a device, and what waits for what on them; docs/architecture.md has the table."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class Streams:
    """The streams of a device that has some, and what they wait for; nothing on a CPU, where everything happens at once.

    Events are used again: making one takes longer than recording it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._index = device, device.index  # an index is quicker to look up
        self.directory: Any = None
        self.mover: Any = None
        self._caller: Any = None
        self._free: list[Any] = []
        self._kept: deque[tuple[Any, Any]] = deque()
        if device.type == "cuda":
            self.directory, self.mover = torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device)
            self._called = torch.cuda.Event()

    def now(self) -> Any:
        """An event after all that the current stream has queued."""
        return None if self.mover is None else self._recorded(torch.cuda.current_stream(self._index))

    def moves_now(self) -> Any:
        """An event after every exchange queued so far."""
        return None if self.mover is None else self._recorded(self.mover)

    def _recorded(self, stream: Any) -> Any:
        try:
            event = self._free.pop()
        except IndexError:
            event = torch.cuda.Event()
        event.record(stream)
        return event

    def wait(self, *events: Any) -> None:
        """The current stream waits."""
        if self.mover is not None:
            stream = torch.cuda.current_stream(self._index)
            for event in events:
                if event is not None:
                    stream.wait_event(event)

    def current(self) -> Any:
        """The current stream."""
        return None if self.mover is None else torch.cuda.current_stream(self._index)

    def wait_for_stream(self, other: Any) -> None:
        """The directory's stream, which is current, waits for another one; it has waited for the one that was current before."""
        if other is not None and other != self._caller:
            self.directory.wait_stream(other)

    def on_directory(self) -> AbstractContextManager[Any]:
        """The directory's stream, after the current one."""
        return nullcontext() if self.directory is None else _On(self, self.directory)

    def on_mover(self) -> AbstractContextManager[Any]:
        """The mover's stream, after the current one."""
        return nullcontext() if self.mover is None else _On(self, self.mover)

    def keep(self, event: Any, *what: Any) -> None:
        """Keeps memory from being used anew before the event; cheaper than ``Tensor.record_stream``. The event is then used again."""
        if event is not None:
            self._kept.append((event, what))

    def let_go(self) -> None:
        """Of what is kept no longer."""
        while self._kept and self._kept[0][0].query():
            event, _what = self._kept.popleft()
            self._free.append(event)

    def moves_wait(self, event: Any) -> None:
        """Exchanges queued from now on come after the event."""
        if self.mover is not None:
            self.mover.wait_event(event)

    def finish_moves(self) -> None:
        """The host waits for every exchange queued so far."""
        if self.mover is not None:
            self.mover.synchronize()

    def finish_all(self) -> None:
        """The host waits for everything queued on the device."""
        if self.mover is not None:
            torch.cuda.synchronize(self.device)


class _On:
    """``with``: another stream is current, after what the one before has queued. A class, since that is quicker than a generator."""

    __slots__ = ("_before", "_stream", "_streams")

    def __init__(self, streams: Streams, stream: Any) -> None:
        self._streams, self._stream = streams, stream
        self._before: Any = None

    def __enter__(self) -> None:
        streams, stream = self._streams, self._stream
        before = torch.cuda.current_stream(streams._index)
        if before == stream:
            return
        streams._called.record(before)
        stream.wait_event(streams._called)
        if stream is streams.directory:
            streams._caller = before
        torch.cuda.set_stream(stream)
        self._before = before

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            torch.cuda.set_stream(self._before)
