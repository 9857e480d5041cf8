"""What native code calls of a device's runtime: the functions themselves are Python's here, in the C calling convention."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest
from torchrec_mtrains.kernels import _core

from torchrec_mtrains.errors import ConfigurationError, DeviceError

D = _core.DeviceCalls
NOT_READY = 600


class Runtime:
    """Five functions that say what they were called with, and return ``status``."""

    def __init__(self) -> None:
        self.called: list[tuple[Any, ...]] = []
        self.status = 0
        pointer, names = ctypes.c_void_p, {"record": 2, "wait": 3, "query": 1, "launch": 2, "last_error": 0}
        self.functions = [ctypes.CFUNCTYPE(ctypes.c_int, *[pointer] * n)(self._made(name)) for name, n in names.items()]
        self.calls = D(*(ctypes.cast(f, pointer).value for f in self.functions))

    def _made(self, name: str) -> Any:
        def function(*arguments: int | None) -> int:
            self.called.append((name, *(a or 0 for a in arguments)))
            return self.status

        return function


def test_a_list_is_called_in_its_order_with_the_callers_stream_where_it_says_so() -> None:
    runtime = Runtime()
    listed = _core.DeviceCallList([(D.RECORD, 7, D.CALLER), (D.WAIT, 7, 20), (D.LAUNCH, 9, 20), (D.RECORD, 8, 20), (D.WAIT, 8, D.CALLER)])
    for caller in (0, 30):
        runtime.called.clear()
        runtime.calls.run(listed, caller)
        assert runtime.called == [("record", 7, caller), ("wait", 20, 7, 0), ("launch", 9, 20), ("record", 8, 20), ("wait", caller, 8, 0)]


def test_the_first_call_that_fails_ends_the_list_and_is_named() -> None:
    runtime = Runtime()
    runtime.status = 719
    with pytest.raises(DeviceError, match="cudaGraphLaunch failed with CUDA error 719"):
        runtime.calls.run(_core.DeviceCallList([(D.LAUNCH, 9, 20), (D.RECORD, 8, 20)]), 0)
    assert runtime.called == [("launch", 9, 20)]
    for call, name in ((runtime.calls.record, "cudaEventRecord"), (runtime.calls.wait, "cudaStreamWaitEvent")):
        with pytest.raises(DeviceError, match=f"{name} failed"):
            call(1, 2)


def test_an_event_that_has_not_happened_is_no_error_and_leaves_none_behind() -> None:
    runtime = Runtime()
    assert runtime.calls.done(5)
    runtime.status = NOT_READY
    assert not runtime.calls.done(5)
    assert runtime.called == [("query", 5), ("query", 5), ("last_error",)]
    runtime.status = 700
    with pytest.raises(DeviceError, match="cudaEventQuery failed with CUDA error 700"):
        runtime.calls.done(5)


def test_a_runtime_without_a_function_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="address 0"):
        D(1, 2, 0, 4, 5)


def test_a_number_is_waited_for_until_it_is_there_or_time_is_over() -> None:
    memory = np.zeros(2, dtype=np.int64)
    address = memory.ctypes.data + 8
    assert not _core.wait_for_number(address, 3, 5_000)
    assert not _core.wait_for_number(address, 3, 0)
    timer = threading.Timer(0.02, lambda: memory.__setitem__(1, 3))  # which runs while the other thread waits without the GIL
    timer.start()
    assert _core.wait_for_number(address, 3, 60_000_000)
    timer.join()
    assert _core.wait_for_number(address, 3, 0)
