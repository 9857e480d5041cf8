"""The streams of a pool on a device, and what waits for what on them; docs/architecture.md has the table.

What happens for every batch is called by native code (``_core.DeviceCalls``), with handles instead of PyTorch's objects: a call takes
1 µs there, and 5 to 15 from Python, once a step has pushed everything else out of the host's caches.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from .. import errors
from . import _core

FUNCTIONS = ("cudaEventRecord", "cudaStreamWaitEvent", "cudaEventQuery", "cudaGraphLaunch", "cudaGetLastError")


@cache
def device_calls() -> Any:
    """The native side's way to the CUDA runtime that PyTorch has loaded. Raises: ConfigurationError, where there is none."""
    if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph_exec"):
        raise errors.ConfigurationError(f"tiered tables on a GPU need PyTorch 2.11 or later, got {torch.__version__}; install a later one")
    for path in _loaded_libraries():
        library = ctypes.CDLL(path)
        try:
            return _core.DeviceCalls(*(ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in FUNCTIONS))
        except AttributeError:  # a library of another name with it inside
            continue
    raise errors.ConfigurationError(
        f"tiered tables on a GPU call the CUDA runtime that PyTorch has loaded, as libcudart; PyTorch {torch.__version__} has loaded none. "
        "Install a CUDA wheel of PyTorch"
    )


def _loaded_libraries() -> Iterator[str]:
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "libcudart" in line}
    yield from sorted(paths)


def new_event() -> Any:
    """An event that has been recorded once: it has a handle from then on."""
    event = torch.cuda.Event()
    event.record()
    return event


class Streams:
    """The streams of a device that has some, and what they wait for; nothing on a CPU, where everything happens at once.

    Events are used again: making one takes longer than recording it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._index = device, device.index  # an index is quicker to look up
        self.directory: Any = None
        self.mover: Any = None
        self._caller = -1  # the raw stream that the directory's has waited for last
        self._free: list[Any] = []
        self._kept: deque[tuple[Any, Any, Callable[[], None] | None]] = deque()
        if device.type == "cuda":
            self.directory, self.mover = torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device)
            self._calls, self._raw_directory, self._raw_mover = device_calls(), self.directory.cuda_stream, self.mover.cuda_stream
            self._called, self._chosen = new_event(), new_event()

    def current(self) -> int:
        """The raw current stream."""
        return -1 if self.mover is None else torch._C._cuda_getCurrentRawStream(self._index)

    def now(self) -> Any:
        """An event after all that the current stream has queued."""
        return None if self.mover is None else self._recorded(self.current())

    def moves_now(self) -> Any:
        """An event after every exchange queued so far."""
        return None if self.mover is None else self._recorded(self._raw_mover)

    def _recorded(self, stream: int) -> Any:
        try:
            event = self._free.pop()
        except IndexError:
            event = new_event()
        self._calls.record(event.cuda_event, stream)
        return event

    def record(self, event: Any) -> None:
        """Records it after all that the current stream has queued."""
        if event is not None:
            self._calls.record(event.cuda_event, self.current())

    def wait(self, *events: Any) -> None:
        """The current stream waits."""
        if self.mover is not None:
            stream = self.current()
            for event in events:
                if event is not None:
                    self._calls.wait(event.cuda_event, stream)

    def wait_for_stream(self, other: int) -> None:
        """The directory's stream waits for another one, unless it waits for that anyhow, with ``run`` or ``on_directory``."""
        if self.mover is not None and other != self.current() and other != self._caller:
            self._calls.record(self._called.cuda_event, other)
            self._calls.wait(self._called.cuda_event, self._raw_directory)

    def prepared(self, on_directory: Any, on_mover: Any, done: Any) -> Any:
        """For ``run``: a graph on the directory's stream, behind the current one and ``done``; then one on the mover's, and ``done``."""
        record, wait, launch, caller = _core.DeviceCalls.RECORD, _core.DeviceCalls.WAIT, _core.DeviceCalls.LAUNCH, _core.DeviceCalls.CALLER
        called, chosen, directory, mover = self._called.cuda_event, self._chosen.cuda_event, self._raw_directory, self._raw_mover
        return _core.DeviceCallList(
            [
                (record, called, caller),
                (wait, called, directory),
                (wait, done.cuda_event, directory),
                (launch, on_directory.raw_cuda_graph_exec(), directory),
                (record, chosen, directory),
                (wait, chosen, mover),
                (launch, on_mover.raw_cuda_graph_exec(), mover),
                (record, done.cuda_event, mover),
            ]
        )

    def run(self, prepared: Any) -> None:
        """Queues what was prepared."""
        self._calls.run(prepared, self.current())

    def on_directory(self) -> AbstractContextManager[Any]:
        """The directory's stream, after the current one."""
        return nullcontext() if self.directory is None else _On(self, self.directory)

    def on_mover(self) -> AbstractContextManager[Any]:
        """The mover's stream, after the current one."""
        return nullcontext() if self.mover is None else _On(self, self.mover)

    def keep(self, event: Any, what: Any = None, then: Callable[[], None] | None = None) -> None:
        """Keeps memory from being used anew before the event; cheaper than ``Tensor.record_stream``. The event is then used again, and
        ``then`` called."""
        if event is not None:
            self._kept.append((event, what, then))

    def let_go(self) -> None:
        """Of what is kept no longer."""
        while self._kept and self._calls.done(self._kept[0][0].cuda_event):
            event, _what, then = self._kept.popleft()
            self._free.append(event)
            if then is not None:
                then()

    def moves_wait(self, event: Any) -> None:
        """Exchanges queued from now on come after the event."""
        if event is not None:
            self._calls.wait(event.cuda_event, self._raw_mover)

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
        event = streams._called.cuda_event
        streams._calls.record(event, before.cuda_stream)
        streams._calls.wait(event, stream.cuda_stream)
        if stream is streams.directory:
            streams._caller = before.cuda_stream
        torch.cuda.set_stream(stream)
        self._before = before

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            torch.cuda.set_stream(self._before)
            if self._stream is self._streams.directory:
                self._streams._caller = -1
