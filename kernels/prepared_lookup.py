"""``PreparedLookup``: the stock TBE's forward of ordinary batches, with arguments that are put together once.

The stock forward is one call of an operator with some twenty arguments, which its Python gathers anew for every batch: 0.1 to 0.2 ms, of a
step that takes a GPU 0.5. But for ids and offsets they are the same for every batch, and for optimizers that count steps the number of the
step. So the calls of two batches are *recorded*, as the stock forward makes them, whatever release of FBGEMM it is of; from then on the
operator is called with what they have in common. What keeps it equal to the stock forward:

- Of two recorded calls nothing differs but ids, offsets and, where steps are counted, one number that is the step's.
- The learning rate, which is changed from step to step, is a tensor among the arguments; all other hyperparameters are in
  ``optimizer_args``, with whose identity the recording ends.
- Only the operators of ``OPERATORS``, without global weight decay, whose arguments change with time in ways that two calls do not show.
- Nobody watches the stock forward: no hooks on the module, no reports.

Otherwise, and for weights of samples, features without gradient and variable batches, the stock forward runs.

On a GPU, batches that have as many ids and bags as the ones before are trained by CUDA graphs (``GraphedLookup``), others by the operator.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import errors
from .graphed_lookup import GraphedLookup, Positions

OPERATORS = frozenset(
    f"fbgemm::split_embedding_codegen_lookup_{optimizer}_function_pt2"
    for optimizer in ("sgd", "adagrad", "rowwise_adagrad", "adam", "partial_rowwise_adam", "lamb")
)
PATIENCE = 3
"""Batches of one shape in a row after which graphs are made for it; twice as many whenever graphs have been made, so that shapes that come
and go do not cost more than they save."""

_WATCHERS = ("stats_reporter", "_report_input_params", "tbe_input_multiplexer")
_Shape = tuple[int, int, bool]
"""How many ids and offsets, and whether algorithms are to be deterministic: what a backward launches depends on that."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class PreparedLookup:
    """The forward of ``tbe``, a stock TBE that checks no bounds and caches nothing."""

    def __init__(self, tbe: Any) -> None:
        self._tbe = tbe
        self._forget()

    def _forget(self) -> None:
        self._recorded: _Call | None = None
        self._operator: Any = None
        self._arguments: list[Any] = []
        self._counters: tuple[Tensor, Tensor] | None = None  # of steps, where they are counted
        self._at = Positions(0, 0, 0, 0, None)
        self._optimizer_args = self._tbe.optimizer_args
        self._hopeless = False
        self._graphed: GraphedLookup | None = None
        self._graphed_shape: _Shape | None = None
        self._shape: _Shape | None = None
        self._in_a_row, self._patience = 0, PATIENCE

    @property
    def prepared(self) -> bool:
        """Whether the next batch goes past the stock forward."""
        return self._operator is not None and self._tbe.optimizer_args is self._optimizer_args

    @property
    def graphed(self) -> bool:
        """Whether the next batch, if it is like the last one, is trained by graphs."""
        return self.prepared and self._graphed is not None and self._graphed_shape == self._shape

    def __call__(self, indices: Tensor, offsets: Tensor) -> Tensor:
        """Shapes: as the stock forward's, both int64."""
        tbe = self._tbe
        if tbe.optimizer_args is not self._optimizer_args:
            self._forget()
        if self._operator is None:
            return tbe(indices, offsets) if self._hopeless else self._record(indices, offsets)
        arguments = self._arguments.copy()
        if self._counters is not None:
            on_host, on_device = self._counters
            if not (step := int(on_host)):
                return tbe(indices, offsets)  # which takes over what a checkpoint has counted
            on_host.add_(1)
            on_device.add_(1)
            if self._at.step is not None:
                argument, element = self._at.step
                arguments[argument] = arguments[argument].copy()
                arguments[argument][element] = step + 1
        at = self._at
        arguments[at.indices], arguments[at.offsets] = indices, offsets
        if indices.is_cuda and torch.is_grad_enabled() and (graphed := self._graphed_for(indices, offsets, arguments)) is not None:
            return graphed(arguments)
        return self._operator(*arguments)

    def _graphed_for(self, indices: Tensor, offsets: Tensor, arguments: list[Any]) -> GraphedLookup | None:
        shape = indices.numel(), offsets.numel(), torch.are_deterministic_algorithms_enabled()
        self._in_a_row = self._in_a_row + 1 if shape == self._shape else 1
        self._shape = shape
        if shape != self._graphed_shape:
            if self._in_a_row < self._patience or not indices.numel():
                return None
            self._patience *= 2
            self._graphed, self._graphed_shape = None, shape  # the memory of the old ones is given back first
            try:
                self._graphed = GraphedLookup(self._operator, arguments, self._at)
            except (AttributeError, OSError, RuntimeError, errors.ConfigurationError) as e:
                warnings.warn(f"batches of {shape[0]} ids train without CUDA graphs, with more work for the host: {e}", stacklevel=2)
        return self._graphed

    def _record(self, indices: Tensor, offsets: Tensor) -> Tensor:
        """The stock forward; after the second one in a row that fits the one before, what they have in common."""
        tbe, recorder, before = self._tbe, _Recorder(), self._recorded
        steps = int(tbe.iter_cpu)
        with recorder:
            output = tbe(indices, offsets)
        call = self._recorded = recorder.call
        watched = any(getattr(tbe, name, None) is not None for name in _WATCHERS) or any(getattr(tbe, name, None) for name in _HOOKS)
        timed = getattr(tbe, "_used_rowwise_adagrad_with_global_weight_decay", False)
        if call is None or watched or timed or not call.has(indices, offsets, tbe.learning_rate_tensor):
            self._hopeless = True
            return output
        call.step = int(tbe.iter_cpu)
        call.counted = call.step - steps
        counting = before is not None and call.counted == before.counted == 1 and call.step != before.step
        if counting or (before is not None and call.counted == before.counted == 0):
            assert before is not None
            changed = call.differences(before)
            told = len(changed) == 1 and counting and call.tells_step_at(changed[0]) and before.tells_step_at(changed[0])
            if told or not changed:
                self._take(call, changed[0] if told else None)
        return output

    def _take(self, call: _Call, step_at: tuple[int, int] | None) -> None:
        tbe, names = self._tbe, call.names
        self._counters = (tbe.iter_cpu, tbe.iter) if call.counted else None
        changing = ("placeholder_autograd_tensor", "indices", "offsets", "learning_rate_tensor")
        # A CPU's operator has no placeholder, and its batches no graphs.
        placeholder, indices, offsets, rate = (names.index(name) if name in names else -1 for name in changing)
        self._at = Positions(placeholder, indices, offsets, rate, step_at)
        self._arguments = [None if name in ("indices", "offsets") else a for name, a in zip(names, call.arguments, strict=True)]
        self._operator, self._recorded = call.operator, None


class _Call:
    """A call of the operator: its arguments in the schema's order."""

    step = counted = 0  # of the optimizer, after it; and how many it has counted

    def __init__(self, operator: Any, given: tuple[Any, ...], by_name: dict[str, Any]) -> None:
        self.operator = getattr(operator, "default", operator)
        schema = self.operator._schema.arguments
        self.names = [argument.name for argument in schema]
        self.arguments = [
            given[i] if i < len(given) else by_name.get(argument.name, argument.default_value) for i, argument in enumerate(schema)
        ]

    def has(self, indices: Tensor, offsets: Tensor, learning_rate: Tensor) -> bool:
        """Whether these are among the arguments, as they are."""
        of = dict(zip(self.names, self.arguments, strict=True))
        same = (_same(of.get("indices"), indices), _same(of.get("offsets"), offsets), of.get("learning_rate_tensor") is learning_rate)
        return all(same)

    def differences(self, other: _Call) -> list[tuple[int, int]]:
        """Where else it differs from another call: (argument, element of it, or -1)."""
        if self.operator is not other.operator:
            return [(-1, -1)]
        found = []
        for at, (name, mine, theirs) in enumerate(zip(self.names, self.arguments, other.arguments, strict=True)):
            if name in ("indices", "offsets"):
                continue
            if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
                found += [(at, i) for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if not _equal(a, b)]
            elif not _equal(mine, theirs):
                found.append((at, -1))
        return found

    def tells_step_at(self, where: tuple[int, int]) -> bool:
        """Whether that element is the number of the step."""
        at, element = where
        return at >= 0 and element >= 0 and type(self.arguments[at][element]) is int and self.arguments[at][element] == self.step


class _Recorder(TorchFunctionMode):
    """Keeps the call of one of the ``OPERATORS``; None, where there was none, or several."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[_Call] = []

    @property
    def call(self) -> _Call | None:
        return self._calls[0] if len(self._calls) == 1 else None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = getattr(func, "_qualified_op_name", None) or getattr(getattr(func, "_schema", None), "name", "")
        if name in OPERATORS:
            self._calls.append(_Call(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _same(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.dtype is b.dtype and a.data_ptr() == b.data_ptr() and a.shape == b.shape


def _equal(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and type(a) is type(b) and bool(a == b))
