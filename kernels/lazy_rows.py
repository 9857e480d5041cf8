"""Tensors that stand for rows of a tiered table without holding them.

A ``LazyRows`` looks like an ordinary ``(rows, columns)`` or ``(rows,)`` tensor on its pool's device and owns no values. ``detach``,
``narrow``, and ``view`` in the same shape stay lazy; ``cpu``, ``clone``, copies out of it and indexing with row numbers read rows,
wherever they are at that moment; ``copy_`` into it and assignment to row numbers write them. Whatever only reads works on rows of at most
``READ_BYTES``, such as the local shards of a state dict. Anything else raises: it would have to bring a whole table into memory unasked,
or change rows that are not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import errors
from .initial_values import rows_per_block
from .tiered_tbe import TieredTBE

_aten = torch.ops.aten

# They make tensors like the rows without reading them: whoever asks means to copy a table into memory.
_MAKES_NEW = (
    *(_aten.new_empty.default, _aten.new_empty_strided.default, _aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default),
    *(_aten.empty_like.default, _aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default),
)

READ_BYTES = 50_000_000
"""What may come into memory unasked. Not shard by shard: whoever reads one of them may read, and keep, all."""


class RowSource:
    """One part of shards of one table of a group, side by side: their weights (part 0), or their k-th optimizer state (part k).

    A state of one value a row has one shard. Two sources are equal when they stand for the same rows.
    """

    def __init__(self, tbe: TieredTBE, shards: tuple[int, ...], part: int) -> None:
        self.tbe, self.shards, self.part = tbe, shards, part
        self.name = tbe.tables[tbe.table_of_shard[shards[0]]].name
        pools = [tbe._parts[s][part] for s in shards]
        self.device = tbe.device
        self.dtype, self._widths = pools[0].dtype, [p.shape[1] for p in pools if p.dim() > 1]
        assert len(shards) == 1 or len(self._widths) == len(shards)
        self.row_shape = torch.Size([sum(self._widths)] if self._widths else [])
        self.nbytes = tbe.tables[tbe.table_of_shard[shards[0]]].rows * self.row_shape.numel() * self.dtype.itemsize

    def _identity(self) -> tuple[object, ...]:
        return self.tbe, self.shards, self.part

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowSource) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def read(self, first_row: int, row_count: int) -> Tensor:
        """Current values. Shapes: (row_count, *row_shape)."""
        parts = [self.tbe.read_rows(shard, first_row, row_count)[self.part] for shard in self.shards]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def read_some(self, rows: Tensor) -> Tensor:
        """Current values of any rows. Shapes: rows (n,) int64 → (n, *row_shape)."""
        parts = [self.tbe.read_some_rows(shard, rows)[self.part] for shard in self.shards]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def write(self, first_row: int, rows: Tensor) -> None:
        """Replaces values. Shapes: (n, *row_shape)."""
        for shard, parts in self._parts_of(rows):
            self.tbe.write_rows(shard, first_row, parts)

    def write_some(self, rows: Tensor, values: Tensor) -> None:
        """Replaces values of any rows, each once. Shapes: rows (n,) int64, values (n, *row_shape)."""
        for shard, parts in self._parts_of(values):
            self.tbe.write_some_rows(shard, rows, parts)

    def _parts_of(self, values: Tensor) -> Iterator[tuple[int, list[Tensor | None]]]:
        for shard, mine in zip(self.shards, values.split(self._widths, dim=1) if self._widths else [values], strict=True):
            parts: list[Tensor | None] = [None] * len(self.tbe._parts[shard])
            parts[self.part] = mine
            yield shard, parts


class LazyRows(torch.Tensor):
    """Rows [first_row, first_row + row_count) of a ``RowSource``; of ``columns`` alone where they are given.

    Raises: UnsupportedError for an operation that would materialise rows of a table larger than ``READ_BYTES``, or would change
    them in another way than ``copy_``.
    """

    source: RowSource
    first_row: int
    columns: range | None  # not all

    @staticmethod
    def __new__(cls, source: RowSource, first_row: int, row_count: int, columns: range | None = None) -> LazyRows:
        if columns is not None and torch.Size([len(columns)]) == source.row_shape:
            columns = None
        shape = (row_count, *source.row_shape) if columns is None else (row_count, len(columns))
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=source.dtype, device=source.device)
        made.source, made.first_row, made.columns = source, first_row, columns
        return made

    def read(self, first: int, count: int) -> Tensor:
        """Values now of rows [first, first + count) of these. Shapes: (count, columns) or (count,)."""
        rows = self.source.read(self.first_row + first, count)
        return rows if self.columns is None else rows[:, self.columns.start : self.columns.stop]

    def write(self, first: int, rows: Tensor) -> None:
        """Replaces values from row ``first`` of these on. Shapes: (n, columns) or (n,)."""
        if self.columns is not None:
            whole = self.source.read(self.first_row + first, rows.shape[0])
            whole[:, self.columns.start : self.columns.stop] = rows
            rows = whole
        self.source.write(self.first_row + first, rows)

    def part(self, rows: range | None = None, columns: range | None = None) -> LazyRows:
        """A range of these rows, or of these columns."""
        first, count = (0, self.shape[0]) if rows is None else (rows.start, len(rows))
        start = self.columns.start if self.columns is not None else 0
        chosen = self.columns if columns is None else range(start + columns.start, start + columns.stop)
        return LazyRows(self.source, self.first_row + first, count, chosen)

    def materialize(self) -> Tensor:
        """The rows' values now, as an ordinary tensor of the same shape, on the CPU."""
        values = torch.empty(self.shape, dtype=self.dtype)
        _copy_out(values, self)
        return values

    def _materialize_here(self) -> Tensor:
        return self.materialize().to(self.device)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Tensor.cpu does not dispatch for what says it is on the CPU already.
        if function is torch.Tensor.cpu:
            return args[0].materialize()
        if function in (torch.Tensor.flatten, torch.flatten, torch.Tensor.reshape, torch.reshape) and _may_be_read(args):
            args = tree_map_only(LazyRows, LazyRows._materialize_here, args)  # a copy, as PyTorch allows; below dispatch it were a view
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if function in (_aten.detach.default, _aten.alias.default):
            return args[0].part()
        if function in (_aten.view.default, _aten._unsafe_view.default) and _same_shape(args[0], args[1]):
            return args[0].part()
        if function is _aten.slice.Tensor and (part := _slice(*args, **kwargs)) is not None:
            return part
        if function is _aten.is_pinned.default:
            return False
        if function is _aten.copy_.default:
            to, source = args[:2]
            _copy_in(to, source) if isinstance(to, LazyRows) else _copy_out(to, source)
            return to
        if function is _aten.index.Tensor and (some := _some_rows(*args)) is not None:
            return args[0].source.read_some(some).to(args[0].device)
        if function is _aten.index_put_.default and (some := _some_rows(*args[:2])) is not None and not any(args[3:]):
            args[0].source.write_some(some, args[2].expand(some.numel(), *args[0].shape[1:]))
            return args[0]
        if function in (_aten.clone.default, _aten._to_copy.default) or (_only_reads(function) and _may_be_read((args, kwargs))):
            args, kwargs = tree_map_only(LazyRows, LazyRows._materialize_here, (args, kwargs))
            return function(*args, **kwargs)
        lazy = next(a for a in tree_leaves((args, kwargs)) if isinstance(a, LazyRows))
        raise errors.UnsupportedError(
            f"{function} on rows of table {lazy.source.name!r} would materialise or change them. Take a range with narrow(0, first, "
            "count) and read it with cpu(), write rows with copy_(), or save and load through torch.distributed.checkpoint (async_save "
            "with async_stager=mtrains.TieredStager(folder))"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        last = self.first_row + (self.shape[0] if self.dim() else 0)
        columns = "" if self.columns is None else f" columns {self.columns.start}:{self.columns.stop},"
        return f"LazyRows({self.source.name!r}, rows {self.first_row}:{last},{columns} shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: Any) -> LazyRows:
        raise errors.UnsupportedError(f"table {self.source.name!r}: a tiered table cannot be copied; its rows live in storage")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise errors.UnsupportedError(
            f"table {self.source.name!r}: rows of a tiered table are not pickled; save with torch.distributed.checkpoint"
        )


def _only_reads(function: Any) -> bool:
    """Whether it reads its arguments, changes none of them and returns no view of one."""
    return function not in _MAKES_NEW and not any(a.alias_info for a in [*function._schema.arguments, *function._schema.returns])


def _may_be_read(tree: Any) -> bool:
    return all(lazy.source.nbytes <= READ_BYTES for lazy in tree_leaves(tree) if isinstance(lazy, LazyRows))


def _same_shape(lazy: LazyRows, shape: Any) -> bool:
    known = [n for n in shape if n != -1]
    return (
        len(shape) == lazy.dim()
        and all(n in (-1, have) for n, have in zip(shape, lazy.shape, strict=True))
        and len(known) >= len(shape) - 1
    )


def _slice(lazy: LazyRows, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> LazyRows | None:
    """A range of rows or of columns; None for a stride."""
    first, last, stride = slice(start, end, step).indices(lazy.shape[dim])
    if stride != 1:
        return None
    chosen = range(first, max(first, last))
    return lazy.part(rows=chosen) if dim % lazy.dim() == 0 else lazy.part(columns=chosen)


def _some_rows(lazy: LazyRows, indices: Sequence[Tensor | None]) -> Tensor | None:
    """The rows of the source that an index names; None when it is not one list of row numbers, or of columns alone."""
    if lazy.columns is not None or len(indices) != 1 or indices[0] is None:
        return None
    if indices[0].dim() != 1 or indices[0].dtype not in (torch.int32, torch.int64):
        return None
    rows = indices[0].long()
    bad = rows[(rows < -lazy.shape[0]) | (rows >= lazy.shape[0])]
    if bad.numel():
        raise errors.IdOutOfRangeError(f"table {lazy.source.name!r}: row {int(bad[0])} is not one of the {lazy.shape[0]} rows here")
    return torch.where(rows < 0, rows + lazy.shape[0], rows) + lazy.first_row


def _blocks(lazy: LazyRows) -> Iterator[tuple[int, int]]:
    rows = lazy.shape[0]
    block = rows_per_block(max(1, lazy.dtype.itemsize * lazy.source.row_shape.numel()))
    for first in range(0, rows, block):
        yield first, min(block, rows - first)


def _check_shapes(to: Tensor, source: Tensor) -> None:
    if to.shape != source.shape:
        lazy = next(t for t in (to, source) if isinstance(t, LazyRows))
        raise errors.ConfigurationError(
            f"table {lazy.source.name!r}: rows of shape {tuple(source.shape)} do not fit rows of shape {tuple(to.shape)}; "
            "tables must have the sizes that the values were saved with"
        )


def _copy_in(to: LazyRows, source: Tensor) -> None:
    _check_shapes(to, source)
    if isinstance(source, LazyRows) and (source.source, source.first_row, source.columns) == (to.source, to.first_row, to.columns):
        return  # the same rows
    for first, count in _blocks(to):
        to.write(first, source.read(first, count) if isinstance(source, LazyRows) else source.narrow(0, first, count))


def _copy_out(to: Tensor, source: LazyRows) -> None:
    _check_shapes(to, source)
    for first, count in _blocks(source):
        to.narrow(0, first, count).copy_(source.read(first, count))
