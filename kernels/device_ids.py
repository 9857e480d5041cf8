"""Batches of ids of a group of tables, in tensor operations on the device of their pools: whose they are, and whether they are in range.

Rows are numbered through the group, table by table; behind them comes a sink, which stands for ids out of range.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import errors
from . import _core

WAIT_US = 50_000
"""Of a wait for what the device has not told yet, before it is asked whether it failed."""

_INT64 = torch.int64


class Batch(NamedTuple):
    """Ids of one batch: feature f's begin at ``offsets[f * stride]``. Shapes: ids (n,), int32 or int64, and so offsets."""

    ids: Tensor
    offsets: Tensor
    stride: int


class GroupIds:
    """The ids of a group: ``rows`` and ``slots`` by table, ``table_of_feature`` by feature, in order of tables."""

    def __init__(
        self, names: Sequence[str], rows: Sequence[int], slots: Sequence[int], table_of_feature: Sequence[int], device: torch.device
    ) -> None:
        assert list(table_of_feature) == sorted(table_of_feature), "features are grouped by table"
        self.names, self.rows, self.tables, self.device = list(names), list(rows), len(rows), device
        self.first_row, self.first_slot = starts(rows), starts(slots)
        self.features, self._sink_row = len(table_of_feature), self.first_row[-1]
        of_feature = [(self.first_row[t], rows[t], self.first_slot[t], t) for t in table_of_feature]
        self._feature_row, self._feature_rows, self._feature_slot, self._feature_table = (
            self._tensor(column) for column in zip(*of_feature, strict=True)
        )
        self._numbers = torch.arange(0, device=device)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=_INT64, device=self.device)

    def _count_up(self, count: int) -> Tensor:
        """0, 1, … Shapes: (count,)."""
        if self._numbers.numel() < count:
            self._numbers = torch.arange(count, device=self.device)
        return self._numbers[:count]

    def _rows_of(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """By position: the feature, whether the id is out of range, and the row, through the group."""
        feature = self._features_at(batch, self._count_up(batch.ids.numel()))
        bad = (batch.ids < 0) | (batch.ids >= self._feature_rows.index_select(0, feature))
        return feature, bad, torch.where(bad, self._sink_row, self._feature_row.index_select(0, feature) + batch.ids)

    def _begins(self, batch: Batch) -> Tensor:
        _ids, offsets, stride = batch
        return offsets[::stride][: self.features + 1] if stride else offsets.expand(self.features + 1)

    def _features_at(self, batch: Batch, positions: Tensor) -> Tensor:
        ends = self._begins(batch)[1:].long().contiguous()
        return torch.searchsorted(ends, positions, right=True).clamp_max_(ends.numel() - 1)

    def _lookups(self, ids: Tensor, begins: list[int], bad_count: int) -> list[int]:
        """Ids by feature. Raises: IdOutOfRangeError, ConfigurationError."""
        lookups = [b - a for a, b in pairwise(begins)]
        if begins[0] != 0 or begins[-1] != ids.numel() or min(lookups) < 0:
            raise errors.ConfigurationError(
                f"offsets must not decrease, begin at 0 and end at the number of ids, {ids.numel()}; features begin at {begins}"
            )
        if bad_count:
            self._refuse_id(ids, begins)
        return lookups

    def _refuse_id(self, ids: Tensor, begins: list[int]) -> None:
        feature = self._features_at(Batch(ids, self._tensor(begins), 1), self._count_up(ids.numel()))
        position = int(((ids < 0) | (ids >= self._feature_rows.index_select(0, feature))).nonzero()[0])
        f = int(feature[position])
        table = int(self._feature_table[f])
        raise errors.IdOutOfRangeError(
            f"id {int(ids[position])} of table {self.names[table]!r} (feature {f} of the group, position {position - begins[f]}) is "
            f"outside [0, {self.rows[table]}). Nothing was changed. Fix the input, hash ids into range, or set bounds_check_mode to "
            "WARNING to have them read row 0"
        )


def told(summary: Any, seq: int, device: torch.device) -> Any:
    """Waits until a kernel has written a batch's number behind a summary in host memory. Raises: what failed on the device."""
    while summary[-1] != seq and not _core.wait_for_number(summary.ctypes.data + summary.nbytes - summary.itemsize, seq, WAIT_US):
        torch.cuda.current_stream(device).query()
    return summary


def starts(sizes: Sequence[int]) -> list[int]:
    """Where each begins, and the last one ends."""
    result = [0]
    for size in sizes:
        result.append(result[-1] + size)
    return result


def set_before(flags: Tensor) -> Tensor:
    """How many flags are set before each position, and in all. Shapes: (n,) → (n + 1,) int64."""
    return torch.cat([torch.zeros(1, dtype=_INT64, device=flags.device), flags.cumsum(0)])
