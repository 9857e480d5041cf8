"""``GraphedLookup``: the forward and the backward, with its fused update, of a stock TBE as CUDA graphs, for batches of one shape.

A backward launches some 25 kernels, and a forward calls through layers of dispatch: together 0.4 to 0.8 ms of the host, of a step that
takes a GPU 0.5. What they launch depends on the shape of a batch alone, which is how many ids and bags it has. So both are captured, by
running the operator itself, and replayed.

What changes from batch to batch are parameters of the captured kernels: where ids, offsets, output and gradient are; the learning rate; for
optimizers that count steps the number of the step. They are found by capturing twice, with other ones, and set before each launch
(``_core.GraphNumbers``). Two captures that differ in anything else are refused, and the operator is called as ever.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .. import errors
from . import _core
from .device_sequences import captured
from .device_streams import device_calls

DRIVER_FUNCTIONS = (
    "cuGraphGetNodes", "cuGraphNodeGetType", "cuGraphKernelNodeGetParams_v2", "cuGraphExecKernelNodeSetParams_v2", "cuFuncGetParamInfo",
)  # fmt: skip

GRADIENT_ALIGNMENT = 16
"""Bytes. The operator copies a gradient that does not begin at a multiple of it, which no capture shows."""

_TRIALS = ((0.25, 1_000_003), (0.75, 2_000_003))
"""Learning rates and steps of the two captures, which are replaced before the first launch."""

TRIES = 4
"""Pairs of captures that are compared at most. FBGEMM's SGD gives its kernel the state of random numbers that rounding takes, without a
value where nothing is rounded: in one to four of a hundred pairs it happens to differ."""

_APART = 512
"""Elements between the addresses of the two captures: as well aligned."""


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


@dataclass
class _Trial:
    """A capture, and the numbers that it was made with."""

    forward: Any
    backward: Any
    of_forward: list[bytes]
    of_backward: list[bytes]


class GraphedLookup:
    """Of ``operator``, for batches of the shape that is among ``arguments``, on the current device.

    Raises: ConfigurationError, where it cannot be replayed with other numbers. What capturing raises.
    """

    def __init__(self, operator: Any, arguments: list[Any], at: Positions) -> None:
        self._operator, self._at, self._calls = operator, at, device_calls()
        self._device = arguments[at.indices].device
        with torch.no_grad():
            self._like = torch.empty_like(operator(*arguments), device="meta")
        rooms = [_Room(like, self._device) for like in (arguments[at.indices], arguments[at.offsets], self._like)]
        self._stream = torch.cuda.Stream(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream), torch.enable_grad():
            pool = torch.cuda.graph_pool_handle()
            # It makes the pool's memory, which the trials then share out alike; the pool ends with the last of its graphs.
            first = self._captured(arguments, rooms, pool, 1)
            for tries_left in reversed(range(TRIES)):
                other, mine = (self._captured(arguments, rooms, pool, which) for which in (1, 0))
                try:
                    self._in_forward = _numbers_in(mine.forward, other.forward, mine.of_forward, other.of_forward)
                    self._in_backward = _numbers_in(mine.backward, other.backward, mine.of_backward, other.of_backward)
                    break
                except errors.ConfigurationError:
                    if not tries_left:
                        raise
            del first
        self._graphs = mine.forward, mine.backward
        for graph in self._graphs:
            graph.instantiate()
        self._forward, self._backward = (graph.raw_cuda_graph_exec() for graph in self._graphs)
        self._last_raw_stream = self._stream.cuda_stream

    def _captured(self, arguments: list[Any], rooms: list[_Room], pool: Any, which: int) -> _Trial:
        """Nothing runs, so memory without content does. Of the pool's, the output has another place in each of two trials, and all else the
        same: it is swapped with a spare one. What the backward makes may lie where the two were: nobody will read or write them there."""
        at, arguments, (learning_rate, step) = self._at, arguments.copy(), _TRIALS[which]
        arguments[at.placeholder] = leaf = (
            arguments[at.placeholder].detach().requires_grad_()
        )  # of this stream, on which it is then visited
        arguments[at.indices], arguments[at.offsets], gradient = (room.of_trial(which) for room in rooms)
        arguments[at.learning_rate] = torch.full_like(arguments[at.learning_rate], learning_rate)
        if at.step is not None:
            argument, element = at.step
            arguments[argument] = arguments[argument].copy()
            arguments[argument][element] = step
        nbytes, outputs = self._like.nbytes, list[Tensor]()
        spare: list[int] = []  # past ``torch.empty``, which fills what it makes where algorithms are to be deterministic
        calls = [lambda: outputs.append(self._operator(*arguments)), lambda: spare.append(torch.cuda.caching_allocator_alloc(nbytes))]
        forward = captured(lambda: [call() for call in (calls if which else reversed(calls))], pool, keep=True)
        of_forward, edge = self._numbers_of_forward(arguments, outputs[0]), get_gradient_edge(outputs[0])
        outputs.clear()
        torch.cuda.caching_allocator_delete(spare[0])
        backward = captured(lambda: torch.autograd.grad(edge, leaf, gradient, allow_unused=True), pool, keep=True)
        return _Trial(forward, backward, of_forward, self._numbers_of_backward(arguments, gradient))

    def _empty(self) -> Tensor:
        return torch.empty_like(self._like, device=self._device)

    def _numbers_of_forward(self, arguments: list[Any], output: Tensor) -> list[bytes]:
        return _addresses(arguments[self._at.indices], arguments[self._at.offsets], output)

    def _numbers_of_backward(self, arguments: list[Any], gradient: Tensor) -> list[bytes]:
        at = self._at
        numbers = _addresses(arguments[at.indices], arguments[at.offsets], gradient)
        numbers.append(struct.pack("f", arguments[at.learning_rate].item()))
        if at.step is not None:
            argument, element = at.step
            numbers.append(struct.pack("q", arguments[argument][element]))
        return numbers

    def __call__(self, arguments: list[Any]) -> Tensor:
        """The operator's output of a batch of this shape."""
        return _Lookup.apply(arguments[self._at.placeholder], self, arguments)

    def forward(self, arguments: list[Any]) -> Tensor:
        """On the current stream."""
        stream = self._current_stream()
        output = self._empty()
        self._in_forward.set(self._forward, self._numbers_of_forward(arguments, output))
        self._calls.launch(self._forward, stream)
        return output

    def backward(self, arguments: list[Any], gradient: Tensor) -> None:
        """Changes weights and states as the operator's backward does."""
        stream, gradient = self._current_stream(), gradient.contiguous()
        if gradient.data_ptr() % GRADIENT_ALIGNMENT:
            gradient = gradient.clone()
        self._in_backward.set(self._backward, self._numbers_of_backward(arguments, gradient))
        self._calls.launch(self._backward, stream)

    def _current_stream(self) -> int:
        """The raw one, which waits for the one before: what launches pass on is one batch's at a time."""
        raw: int = torch._C._cuda_getCurrentRawStream(self._device.index)
        if raw != self._last_raw_stream:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(self._stream)
            self._stream, self._last_raw_stream = stream, raw
        return raw


class _Room:
    """Memory for a tensor like this in both trials, at different addresses."""

    def __init__(self, like: Tensor, device: torch.device) -> None:
        self._like, self._memory = like, torch.empty(like.numel() + _APART, dtype=like.dtype, device=device)

    def of_trial(self, which: int) -> Tensor:
        """It overlaps with the other's."""
        return self._memory[which * _APART :][: self._like.numel()].view(self._like.shape)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _placeholder: Tensor, graphed: GraphedLookup, arguments: list[Any]) -> Tensor:
        ctx.graphed, ctx.arguments = graphed, arguments
        return graphed.forward(arguments)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.graphed.backward(ctx.arguments, gradient)
        return None, None, None


def _numbers_in(graph: Any, other: Any, numbers: list[bytes], others: list[bytes]) -> Any:
    return _core.GraphNumbers(driver_functions(), graph.raw_cuda_graph(), other.raw_cuda_graph(), numbers, others)


def _addresses(*tensors: Tensor) -> list[bytes]:
    return [struct.pack("Q", t.data_ptr()) for t in tensors]
