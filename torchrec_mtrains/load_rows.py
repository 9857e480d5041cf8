"""Loading this rank's rows of a tiered table from whatever a state dict has for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor

from .errors import ConfigurationError, UnsupportedError

Box = tuple[tuple[int, int], tuple[int, int]]
"""Rows and columns, each from and to."""


def load_rows(table: str, to: ShardedTensor | DTensor, source: Any) -> None:
    """Writes the local shards of ``to``, one at a time. ``source`` has local shards that cover them, or is the whole table.

    Raises: ConfigurationError for another size, or for rows that are not there; UnsupportedError for another kind of state.
    """
    pieces = _pieces(table, source)
    if tuple(source.size()) != tuple(to.size()):
        raise ConfigurationError(f"table {table!r} has size {tuple(to.size())}, the state dict has {tuple(source.size())}")
    for wanted, rows in _pieces(table, to):
        same = next((tensor for box, tensor in pieces if box == wanted), None)
        rows.copy_(_put_together(table, rows, wanted, pieces) if same is None else same)


def _pieces(table: str, source: Any) -> list[tuple[Box, Tensor]]:
    if isinstance(source, ShardedTensor):
        return [(_box(s.metadata.shard_offsets, s.metadata.shard_sizes), s.tensor) for s in source.local_shards()]
    if isinstance(source, DTensor):
        local: Any = source.to_local()
        return [(_box(o, t.shape), t) for o, t in zip(local.local_offsets(), local.local_shards(), strict=True)]
    if isinstance(source, Tensor):
        return [(_box((0, 0), source.shape), source)]
    raise UnsupportedError(
        f"table {table!r}: state of type {type(source).__name__} cannot be loaded; give a ShardedTensor, a DTensor or a Tensor"
    )


def _put_together(table: str, like: Tensor, wanted: Box, pieces: list[tuple[Box, Tensor]]) -> Tensor:
    result, found = torch.empty(like.shape, dtype=like.dtype), 0
    for box, tensor in pieces:
        rows, columns = (_overlap(w, b) for w, b in zip(wanted, box, strict=True))
        if rows and columns:
            part = tensor.narrow(0, rows[0] - box[0][0], len(rows)).cpu()
            part = part.narrow(1, columns[0] - box[1][0], len(columns))
            result[rows[0] - wanted[0][0] :, columns[0] - wanted[1][0] :][: len(rows), : len(columns)] = part
            found += part.numel()
    if found != result.numel():
        raise ConfigurationError(
            f"table {table!r}: rows {wanted[0][0]} to {wanted[0][1]} of this rank are not all in the local shards of the state dict; load a"
            " checkpoint of another sharding with torch.distributed.checkpoint"
        )
    return result


def _box(offsets: Any, sizes: Any) -> Box:
    (first_row, first_column), (rows, columns) = offsets, sizes
    return (first_row, first_row + rows), (first_column, first_column + columns)


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> range:
    return range(max(a[0], b[0]), min(a[1], b[1]))
