"""``FusedDirectory``: ``DeviceDirectory`` with the kernels of ``device_kernels`` in place of its tensor operations."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .device_directory import BUCKETS, FAR_BATCHES, Choice, DeviceDirectory, Lookup, Misses


def _kernels() -> ModuleType:
    from . import device_kernels  # needs Triton, which a CPU's PyTorch may lack

    return device_kernels


class FusedDirectory(DeviceDirectory):
    """The same directory, for CUDA devices."""

    @property
    def _of_feature(self) -> tuple[Tensor, ...]:
        return self._feature_row, self._feature_rows, self._feature_slot, self._feature_table

    def _search(
        self,
        ids: Tensor,
        offsets: Tensor,
        stride: int,
        seq: int,
        dirty: bool,
        place: Tensor,
        slot: Tensor,
        missing: Tensor,
        summary: Tensor,
    ) -> None:
        _kernels().lookup(
            ids, offsets, stride, self._of_feature, self.place_of_row, self.stamp, self.slots, seq, dirty, place, slot, missing, summary
        )  # fmt: skip

    def claim(self, found: Lookup, seq: int) -> Misses:
        most = found.missing_count
        at = torch.nonzero_static(found.missing, size=most).squeeze(1)
        parts = _kernels().claim(
            at, found.ids, found.offsets, found.stride, self._of_feature, self.place_of_row, self.stamp, found.place, seq, self.tables
        )  # fmt: skip
        return Misses(most, at, *parts)

    def choose(self, kind: int, wanted: Tensor, most: int) -> Choice:
        queue = self._queues[kind]
        if not queue.place.numel():
            return super().choose(kind, wanted, most)
        return Choice(*_kernels().choose(queue.place, queue.stamp, queue.table, queue.bounds, self.stamp, wanted, most))

    def _oldest(self, kind: int, goal: Tensor, seq: int, before: int, pinned: Tensor | None) -> Tensor:
        taken = _kernels().oldest(
            self.stamp, self._first_place[kind], max(self.sizes[kind]), sum(self.sizes[kind]), goal, seq, before, pinned, BUCKETS,
            FAR_BATCHES,
        )  # fmt: skip
        return taken.nonzero().squeeze(1) + self.first_place[kind][0]

    def commit(self, misses: Misses, slots: Tensor, hosts: Tensor, seq: int, dirty: bool) -> None:
        _kernels().commit(
            misses.row, misses.table, slots, hosts, self._first_row, self.place_of_row, self.row_of_place, self.stamp, self.evictions,
            self.write_backs, seq, dirty,
        )  # fmt: skip

    def settle(self, found: Lookup, misses: Misses) -> None:
        _kernels().settle(misses.at, misses.row_at, misses.feature_at, self.place_of_row, self._feature_slot, found.place, found.slot)
