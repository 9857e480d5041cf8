"""``RowAccess``: rows of a group's tables by their numbers, as users see them: wherever they are, weights and states apart.

A row is one record: the part of every shard (range of columns) of its table, the weights of all of them first, then their states. Users
name a shard; the parts of the other shards in the record stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor

from .. import errors
from . import _core


class RowAccess:
    """Of a group that has pools, their arrays by shard, and records made of those."""

    table_of_shard: list[int]
    tables: list[Any]
    pool_rows: list[int]
    state_names: list[str]
    _parts: list[list[Tensor]]
    _pool: Any
    _optimizer: EmbOptimType

    def _record(self, table: int) -> list[tuple[int, int]]:
        """What a record of the table consists of, as (shard, part): the weights of every shard, then their states."""
        shards = [s for s, t in enumerate(self.table_of_shard) if t == table]
        return [(s, p) for p in range(1 + len(self.state_names)) for s in shards]

    def _part_bytes(self, table: int) -> list[int]:
        """Of the parts of a record, in its order."""
        return [self._parts[s][p].nbytes // self.pool_rows[table] for s, p in self._record(table)]

    def read_rows(self, shard: int, first_row: int, row_count: int) -> list[Tensor]:
        """The current values of a shard's rows, wherever they are: [weights (n, dim), then each state (n,) or (n, dim)]."""
        table, mine = self.table_of_shard[shard], self._parts[shard]
        rows = [torch.empty((row_count, *p.shape[1:]), dtype=p.dtype) for p in mine]
        part_bytes = self._part_bytes(table)
        scratch = torch.empty(max(part_bytes), dtype=torch.uint8)
        parts = []
        # The other shards' parts of each record go to one place, to be forgotten.
        for (s, i), row_bytes in zip(self._record(table), part_bytes, strict=True):
            parts.append(
                _core.Part(rows[i].data_ptr(), row_bytes, row_bytes) if s == shard else _core.Part(scratch.data_ptr(), 0, row_bytes)
            )
        self._pool.read(table, first_row, row_count, parts)
        return rows

    def write_rows(self, shard: int, first_row: int, parts: Sequence[Tensor | None]) -> None:
        """Replaces the values of consecutive rows of a shard; None keeps that part. Shapes as ``read_rows`` returns."""
        given = [p for p in parts if p is not None]
        if not given:
            return
        table, count = self.table_of_shard[shard], given[0].shape[0]
        fixed: list[Tensor | None] = []
        for part, pool in zip(parts, self._parts[shard], strict=True):
            if part is not None and part.shape != (count, *pool.shape[1:]):
                raise errors.ConfigurationError(
                    f"table {self.tables[table].name!r}: rows of shape {(count, *pool.shape[1:])} expected, got {tuple(part.shape)}"
                )
            fixed.append(None if part is None else part.detach().to("cpu", pool.dtype).contiguous())
        self._write_record(table, first_row, count, [fixed[i] if s == shard else None for s, i in self._record(table)])

    def _write_record(self, table: int, first_row: int, count: int, record: list[Tensor | None]) -> None:
        """Replaces parts of consecutive records; None keeps that part."""
        addresses = [
            _core.Part(0 if part is None else part.data_ptr(), row_bytes, row_bytes)
            for part, row_bytes in zip(record, self._part_bytes(table), strict=True)
        ]
        self._pool.write(table, first_row, count, addresses)

    def read_some_rows(self, shard: int, rows: Tensor) -> list[Tensor]:
        """As ``read_rows``, of any rows. Shapes: rows (n,) int64."""
        if not rows.numel():
            return self.read_rows(shard, 0, 0)
        order, runs = _runs(rows)
        parts = zip(*(self.read_rows(shard, first, count) for first, count in runs), strict=True)
        return [torch.empty_like(whole := torch.cat(part)).index_copy_(0, order, whole) for part in parts]

    def write_some_rows(self, shard: int, rows: Tensor, parts: Sequence[Tensor | None]) -> None:
        """As ``write_rows``, of any rows, each once. Shapes: rows (n,) int64."""
        order, runs = _runs(rows)
        start = 0
        for first, count in runs:
            mine = order[start : start + count]
            self.write_rows(shard, first, [None if part is None else part[mine] for part in parts])
            start += count

    def reset_embedding_weight_momentum(
        self, pruned_indices: Tensor, pruned_indices_offsets: Tensor, logical_table_ids: Tensor, buffer_ids: Tensor
    ) -> None:
        """Zeros in rows that a managed-collision collection evicts, and in their optimizer states.

        ``logical_table_ids`` are shards, as those collections give them. As in the stock TBE, EXACT_ROWWISE_ADAGRAD alone is reset.
        Shapes: rows ``pruned_indices[pruned_indices_offsets[b]:pruned_indices_offsets[b + 1]]`` for each b of ``buffer_ids``.
        """
        if self._optimizer is not EmbOptimType.EXACT_ROWWISE_ADAGRAD:
            return
        for shard, buffer in zip(logical_table_ids.tolist(), buffer_ids.tolist(), strict=True):
            rows = pruned_indices[pruned_indices_offsets[buffer] : pruned_indices_offsets[buffer + 1]]
            self.write_some_rows(shard, rows, [torch.zeros((rows.numel(), *p.shape[1:]), dtype=p.dtype) for p in self._parts[shard]])


def _runs(rows: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """The order that sorts rows, and the runs of consecutive ones as (first row, count)."""
    in_order, order = rows.cpu().sort()
    breaks = (in_order.diff() != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist(), rows.numel()] if rows.numel() else [0]
    return order, [(int(in_order[a]), b - a) for a, b in itertools.pairwise(starts)]
