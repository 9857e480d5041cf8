"""Where two captured graphs differ: the driver's functions are Python's here, over graphs that are Python's too."""

from __future__ import annotations

import ctypes
import gc
import struct
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torchrec_mtrains.kernels import _core
from torchrec_mtrains.kernels.device_sequences import captured

from torchrec_mtrains.errors import ConfigurationError, DeviceError

KERNEL, COPY, MEMSET = 0, 1, 2


class Launch(ctypes.Structure):
    """The driver's CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = [
        ("function", ctypes.c_void_p), ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)), ("extra", ctypes.c_void_p), ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    ]  # fmt: skip


class Driver:
    """Graphs of nodes: (kind, function, parameters)."""

    def __init__(self, *graphs: list[tuple[int, int, list[bytes]]]) -> None:
        self.graphs, self.set, self.status, self._alive = graphs, [], 0, []
        pointer, size = ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)
        types = {
            "nodes": (pointer, ctypes.POINTER(ctypes.c_uint64), size), "kind": (pointer, ctypes.POINTER(ctypes.c_int)),
            "get": (pointer, ctypes.POINTER(Launch)), "put": (pointer, pointer, ctypes.POINTER(Launch)),
            "info": (pointer, ctypes.c_size_t, size, size),
        }  # fmt: skip
        self.functions = [ctypes.CFUNCTYPE(ctypes.c_int, *t)(getattr(self, "_" + name)) for name, t in types.items()]
        self.addresses = [ctypes.cast(f, pointer).value for f in self.functions]

    def numbers(self, mine: list[bytes], others: list[bytes]) -> Any:
        return _core.GraphNumbers(self.addresses, 1, 2, mine, others)

    def _node(self, node: int) -> tuple[int, int, list[bytes]]:
        return self.graphs[node // 100 - 1][node % 100]

    def _nodes(self, graph: int, nodes: Any, count: Any) -> int:
        count[0] = len(self.graphs[graph - 1])
        for i in range(count[0] if nodes else 0):
            nodes[i] = 100 * graph + i
        return self.status

    def _kind(self, node: int, kind: Any) -> int:
        kind[0] = self._node(node)[0]
        return 0

    def _get(self, node: int, launch: Any) -> int:
        _, function, parameters = self._node(node)
        values = [ctypes.create_string_buffer(p, len(p)) for p in parameters]
        array = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        self._alive.append((values, array))
        launch[0] = Launch(function, (1, 2, 3), (4, 5, 6), 7, array)
        return 0

    def _put(self, executable: int, node: int, launch: Any) -> int:
        _, function, parameters = self._node(node)
        assert (launch[0].function, list(launch[0].grid), launch[0].shared) == (function, [1, 2, 3], 7)
        self.set.append((executable, node, [ctypes.string_at(launch[0].parameters[i], len(p)) for i, p in enumerate(parameters)]))
        return self.status

    def _info(self, function: int, at: int, offset: Any, size: Any) -> int:
        parameters = next(p for graph in self.graphs for _, f, p in graph if f == function)
        if at >= len(parameters):
            return 1
        offset[0], size[0] = 0, len(parameters[at])
        return 0


def f32(value: float) -> bytes:
    return struct.pack("f", value)


def i64(*values: int) -> bytes:
    return struct.pack(f"{len(values)}q", *values)


def graph(address: int, rate: float) -> list[tuple[int, int, list[bytes]]]:
    """A kernel that has neither number, one that has the address twice, a memset, one that has both."""
    return [
        (KERNEL, 11, [i64(5), f32(0.5)]),
        (KERNEL, 12, [i64(address, 40), i64(9, address)]),
        (MEMSET, 0, []),
        (KERNEL, 13, [f32(rate), i64(address), f32(rate) + f32(1.0)]),
    ]


def test_numbers_are_found_where_two_captures_differ_and_set_in_the_kernels_that_have_one_that_changed() -> None:
    driver = Driver(graph(0x7F0010, 0.25), graph(0x7F00A0, 0.75))
    numbers = driver.numbers([i64(0x7F0010), f32(0.25)], [i64(0x7F00A0), f32(0.75)])
    assert numbers.places == [3, 2]
    numbers.set(77, [i64(0x7F0010), f32(0.25)])
    assert driver.set == []
    numbers.set(77, [i64(0x7F0010), f32(0.125)])
    assert driver.set == [(77, 103, graph(0x7F0010, 0.125)[3][2])]
    driver.set.clear()
    numbers.set(77, [i64(0x123456789), f32(0.125)])
    assert driver.set == [(77, 101, graph(0x123456789, 0.125)[1][2]), (77, 103, graph(0x123456789, 0.125)[3][2])]


@pytest.mark.parametrize(
    ("mine", "theirs", "why"),
    [
        ([(KERNEL, 1, [i64(1)])], [(KERNEL, 1, [i64(2)]), (MEMSET, 0, [])], "1 and 2 nodes"),
        ([(KERNEL, 1, [i64(1)])], [(MEMSET, 0, [])], "kind of node 0"),
        ([(KERNEL, 1, [i64(1)])], [(KERNEL, 2, [i64(2)])], "launch node 0"),
        ([(COPY, 0, [])], [(COPY, 0, [])], "node of kind 1"),
        ([(KERNEL, 1, [i64(1), f32(3)])], [(KERNEL, 1, [i64(2), f32(4)])], "parameter 1"),
        ([(KERNEL, 1, [i64(1), i64(2)])], [(KERNEL, 1, [i64(2), i64(4)])], "parameter 1"),  # what depends on the number
        ([(KERNEL, 1, [i64(5)])], [(KERNEL, 1, [i64(5)])], "where number 0 is"),
    ],
)
def test_captures_that_differ_in_anything_else_are_refused(mine: Any, theirs: Any, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        Driver(mine, theirs).numbers([i64(1)], [i64(2)])


def test_bad_numbers_and_what_the_driver_reports_are_errors() -> None:
    driver = Driver(graph(16, 0.25), graph(32, 0.75))
    for mine, others in (([i64(16)], []), ([i64(16)], [f32(0.75)]), ([i64(16)], [i64(16)]), ([b""], [b""])):
        with pytest.raises(ConfigurationError, match="as many numbers"):
            driver.numbers(mine, others)
    numbers = driver.numbers([i64(16), f32(0.25)], [i64(32), f32(0.75)])
    for wrong in ([i64(16)], [f32(1), f32(2)]):
        with pytest.raises(ConfigurationError):
            numbers.set(77, wrong)
    driver.status = 719
    with pytest.raises(DeviceError, match="cuGraphExecKernelNodeSetParams failed with CUDA error 719"):
        numbers.set(77, [i64(48), f32(0.25)])
    with pytest.raises(DeviceError, match="cuGraphGetNodes failed"):
        driver.numbers([i64(16), f32(0.25)], [i64(32), f32(0.75)])
    with pytest.raises(ConfigurationError, match="address 0"):
        _core.GraphNumbers([1, 2, 0, 4, 5], 1, 2, [], [])


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_collected_while_launches_are_captured(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """What garbage gives back to the runtime ended a capture on a GPU now and then."""
    calls: list[str] = []

    class Graph:
        def __init__(self, keep_graph: bool) -> None: ...

        def capture_begin(self, pool: object, capture_error_mode: str) -> None:
            calls.append("begin")

        def capture_end(self) -> None:
            calls.append("end")

    def launch() -> None:
        assert not gc.isenabled()
        if fails:
            raise ValueError("a launch")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    with pytest.raises(ValueError, match="a launch") if fails else nullcontext():
        captured(launch)
    assert calls == ["begin", "end"]
    assert gc.isenabled()
