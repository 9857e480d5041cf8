"""``GraphedLookup``: the forward and the backward, with its fused update, of a stock TBE as CUDA graphs, for batches of one shape.

A backward launches some 16 kernels, and a forward calls through layers of dispatch: together 0.5 ms of the host, of a step that takes a GPU
as long. What they launch depends on the shape of a batch alone, which is how many ids and bags it has. So both are captured, by
running the operator itself, and replayed over buffers of their own: ids, offsets and the gradient are copied in, the output is copied out.

Two things do change: the learning rate, and for optimizers that count steps the number of the step. Both are parameters of kernels. Where they
are is found by capturing twice, with different ones, into the same memory (``_core.GraphNumbers``); a capture that differs in
anything else is refused, and the operator called as ever.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import _core
from .device_sequences import captured
from .device_streams import device_calls

DRIVER_FUNCTIONS = (
    "cuGraphGetNodes", "cuGraphNodeGetType", "cuGraphKernelNodeGetParams_v2", "cuGraphExecKernelNodeSetParams_v2", "cuFuncGetParamInfo",
)  # fmt: skip

_TRIALS = ((0.25, 1_000_003), (0.75, 2_000_003))
"""Learning rates and steps of the two captures, which are replaced before the first launch."""


@dataclass
class Positions:
    """Where among the operator's arguments those are that differ from call to call."""

    placeholder: int
    indices: int
    offsets: int
    learning_rate: int
    step: tuple[int, int] | None  # the argument, and the element of it


@cache
def driver_functions() -> list[int]:
    """The addresses of ``DRIVER_FUNCTIONS``. Raises: AttributeError, of a driver before CUDA 12.4."""
    driver = ctypes.CDLL("libcuda.so.1")
    return [ctypes.cast(getattr(driver, name), ctypes.c_void_p).value or 0 for name in DRIVER_FUNCTIONS]


class GraphedLookup:
    """Of ``operator``, for batches of the shape that is among ``arguments``, on the current device.

    Raises: ConfigurationError, where it cannot be replayed with other numbers. What capturing raises.
    """

    def __init__(self, operator: Any, arguments: list[Any], at: Positions) -> None:
        self._operator, self._at, self._calls = operator, at, device_calls()
        self._arguments = arguments.copy()
        self.indices, self.offsets = arguments[at.indices].clone(), arguments[at.offsets].clone()
        self._arguments[at.indices], self._arguments[at.offsets] = self.indices, self.offsets
        self._device = self.indices.device
        self._stream = torch.cuda.Stream(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._output: Any = None
        with torch.cuda.stream(self._stream), torch.enable_grad():
            self._arguments[at.placeholder] = arguments[at.placeholder].detach().requires_grad_()
            self._gradient = torch.empty_like(operator(*self._arguments))
            pool = torch.cuda.graph_pool_handle()
            # The first one makes the memory, which the others then share out alike.
            _, (_, other), graphs = [self._captured(pool, *trial) for trial in (_TRIALS[1], _TRIALS[1], _TRIALS[0])]
        self._forward, self._backward = graphs
        numbers = [self._as_bytes(*trial) for trial in _TRIALS]
        self._numbers = _core.GraphNumbers(driver_functions(), self._backward.raw_cuda_graph(), other.raw_cuda_graph(), *numbers)
        for graph in graphs:
            graph.instantiate()
        self._executables = self._forward.raw_cuda_graph_exec(), self._backward.raw_cuda_graph_exec()
        self._last_raw_stream = self._stream.cuda_stream
        self._turn = 0

    def _captured(self, pool: Any, learning_rate: float, step: int) -> tuple[Any, Any]:
        """The forward and the backward; ``_output`` is theirs."""
        self._output = None
        arguments, outputs = self._with_numbers(learning_rate, step), []
        forward = captured(lambda: outputs.append(self._operator(*arguments)), pool, keep=True)
        leaf = arguments[self._at.placeholder]  # ``backward`` would visit it on the stream where it was made
        backward = captured(lambda: torch.autograd.grad(outputs, leaf, self._gradient, allow_unused=True), pool, keep=True)
        self._output = outputs[0].detach()
        return forward, backward

    def _with_numbers(self, learning_rate: float, step: int) -> list[Any]:
        arguments = self._arguments.copy()
        at = self._at.learning_rate
        arguments[at] = torch.full_like(arguments[at], learning_rate)
        if self._at.step is not None:
            at, element = self._at.step
            arguments[at] = arguments[at].copy()
            arguments[at][element] = step
        return arguments

    def _as_bytes(self, learning_rate: float, step: int) -> list[bytes]:
        """As kernels take them."""
        rate = struct.pack("f", learning_rate)
        return [rate] if self._at.step is None else [rate, struct.pack("q", step)]

    def __call__(self, arguments: list[Any]) -> Tensor:
        """The operator's output of a batch of this shape."""
        return _Lookup.apply(arguments[self._at.placeholder], self, arguments)  # type: ignore[no-any-return]

    def forward(self, indices: Tensor, offsets: Tensor) -> tuple[Tensor, int]:
        """The output, and by what ``backward`` knows whether the batch is still there."""
        stream = self._current_stream()
        self._fill(indices, offsets, stream)
        self._calls.launch(self._executables[0], stream)
        output = torch.empty_like(self._output)
        self._calls.copy(output.data_ptr(), self._output.data_ptr(), self._output.nbytes, stream)
        return output, self._turn

    def _fill(self, indices: Tensor, offsets: Tensor, stream: int) -> None:
        self._turn += 1
        for mine, given in ((self.indices, indices), (self.offsets, offsets)):
            self._calls.copy(mine.data_ptr(), given.data_ptr(), mine.nbytes, stream)

    def backward(self, turn: int, arguments: list[Any], gradient: Tensor) -> None:
        """Changes weights and states as the operator's backward does."""
        stream, at = self._current_stream(), self._at
        if turn != self._turn:
            self._fill(arguments[at.indices], arguments[at.offsets], stream)
        gradient = gradient.contiguous()
        self._calls.copy(self._gradient.data_ptr(), gradient.data_ptr(), self._gradient.nbytes, stream)
        step = 0 if at.step is None else arguments[at.step[0]][at.step[1]]
        self._numbers.set(self._executables[1], self._as_bytes(arguments[at.learning_rate].item(), step))
        self._calls.launch(self._executables[1], stream)

    def _current_stream(self) -> int:
        """The raw one, which waits for the one before: buffers are one batch's at a time."""
        raw: int = torch._C._cuda_getCurrentRawStream(self._device.index)
        if raw != self._last_raw_stream:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(self._stream)
            self._stream, self._last_raw_stream = stream, raw
        return raw


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _placeholder: Tensor, graphed: GraphedLookup, arguments: list[Any]) -> Tensor:
        at = graphed._at
        output, ctx.turn = graphed.forward(arguments[at.indices], arguments[at.offsets])
        ctx.graphed, ctx.arguments = graphed, arguments
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        ctx.graphed.backward(ctx.turn, ctx.arguments, gradient)
        return None, None, None
