"""``Stamps``: what a group remembers of its slots where every row has one of its own: row r of a table is in its slot r.

    stamp   int64 (slots + 1)   batch · 2 + dirty: the last batch that used the row, 0 of those that none did. The last element is a sink.

So ids are slots, and nothing is looked up, missed or evicted. A batch is *used*: its ids are checked, its rows stamped and counted, before
those of the next. The host looks at the outcome later.

``FusedStamps`` does it in Triton kernels (``device_kernels``), in a sequence that a CUDA device replays as one graph: what the host passes
and reads is in memory that both see, of which there are ``SEQUENCES``; one is used again when the host has looked at what it told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .device_fused import GIVEN, SEQUENCES, kernels
from .device_ids import Batch, GroupIds, set_before, told

_INT64 = torch.int64
_UNUSED = (0,) * 7


@dataclass
class Use:
    """A batch of ids on its way, and what became of it, once the host has looked (``Stamps.outcome``)."""

    batch: Batch
    seq: int
    summary: Any  # numpy (n,) int64: bad ids, whether all is sound, distinct rows by table, where features begin, and ``seq``


class Stamps(GroupIds):
    """Of tables with ``rows`` rows and as many slots or more; features in the order of their tables."""

    BYTES_PER_SLOT = 8

    def __init__(
        self, names: Sequence[str], rows: Sequence[int], slots: Sequence[int], table_of_feature: Sequence[int], device: torch.device
    ) -> None:
        super().__init__(names, rows, slots, table_of_feature, device)
        self.slots = sum(slots)
        self.stamp = torch.zeros(self.slots + 1, dtype=_INT64, device=device)
        self._slot_bounds = self._tensor(self.first_slot)

    def of_table(self, table: int) -> Tensor:
        """The stamps of a table's rows. Shapes: (rows,)."""
        first = self.first_slot[table]
        return self.stamp[first : first + self.rows[table]]

    def use(self, batch: Batch, seq: int, dirty: bool) -> Use:
        """Checks and stamps. Raises nothing: ``outcome`` does."""
        feature, bad, _ = self._rows_of(batch)
        slot = torch.where(bad, self.slots, self._feature_slot.index_select(0, feature) + batch.ids)
        self.stamp[slot] = (self.stamp.index_select(0, slot) & 1) + 2 * seq if not dirty else 2 * seq + 1
        distinct = set_before(self.stamp[:-1] >= 2 * seq).index_select(0, self._slot_bounds).diff()
        begins = self._begins(batch).long()
        sound = not bad.any() and begins[0] == 0 and begins[-1] == batch.ids.numel() and not (begins.diff() < 0).any()
        summary = torch.cat([self._tensor([int(bad.sum()), int(sound)]), distinct, begins, self._tensor([seq])])
        return Use(batch, seq, summary.numpy())

    def outcome(self, use: Use) -> Any:
        """Distinct rows by table, then where features begin; the host waits until that is known.

        Raises: IdOutOfRangeError, ConfigurationError: nothing was changed.
        """
        summary = told(use.summary, use.seq, self.device)
        if not summary[1]:
            self._lookups(use.batch.ids, summary[2 + self.tables : -1].tolist(), int(summary[0]))
        return summary[2:-1]

    def mark_dirty(self, batch: Batch) -> None:
        """The rows of this sound batch will be changed; their stamps stay."""
        feature, _, _ = self._rows_of(batch)
        slot = self._feature_slot.index_select(0, feature) + batch.ids
        self.stamp[slot] = self.stamp.index_select(0, slot) | 1


@dataclass
class _Sequence:
    """One sequence of launches for batches of up to ``capacity`` ids, and what the host gives it and reads from it."""

    capacity: int
    ids32: bool
    offsets32: bool
    given: Tensor
    summary: Tensor
    batch: Tensor  # as given, on the device
    counters: Tensor  # bad ids, distinct rows by table
    graph: Any = None
    runs: int = 0

    def __post_init__(self) -> None:
        self.as_given, self.as_summary = self.given.numpy().data.cast("B"), self.summary.numpy()


class FusedStamps(Stamps):
    """The same, for CUDA devices."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._sequences: dict[tuple[int, bool, bool], deque[_Sequence]] = {}  # by kind
        self._last_stream: Any = None
        self._last_raw_stream = -1  # of it; a number is quicker to look up

    def use(self, batch: Batch, seq: int, dirty: bool) -> Use:
        ids, offsets, stride = batch
        count = ids.numel()
        sequence = self._next(count, ids.dtype is torch.int32, offsets.dtype is torch.int32)
        GIVEN.pack_into(sequence.as_given, 0, ids.data_ptr(), offsets.data_ptr(), 0, count, stride, seq, 0, dirty, *_UNUSED)
        sequence.runs += 1
        if self.device.type != "cuda" or sequence.runs == 1:  # in the first run kernels are compiled
            self._launch(sequence)
        else:
            if torch._C._cuda_getCurrentRawStream(self.device.index) != self._last_raw_stream:
                self._change_stream()
            if sequence.graph is None:
                sequence.graph = self._captured(sequence)
            sequence.graph.replay()
        return Use(batch, seq, sequence.as_summary)

    def _change_stream(self) -> None:
        """The current stream waits for the one that used the batch before: stamps are in the order of batches."""
        stream = torch.cuda.current_stream(self.device)
        if self._last_stream is not None:
            stream.wait_stream(self._last_stream)
        self._last_stream, self._last_raw_stream = stream, stream.cuda_stream

    def _next(self, count: int, ids32: bool, offsets32: bool) -> _Sequence:
        """The one whose last run was longest ago: whoever uses batches has looked at that one."""
        capacity = max(kernels().BLOCK, 1 << max(0, count - 1).bit_length())
        ring = self._sequences.setdefault((capacity, ids32, offsets32), deque())
        if len(ring) < SEQUENCES:
            on_gpu = self.device.type == "cuda"
            sizes = (kernels().BATCH, 2 + self.tables + self.features + 2)
            given, summary = (torch.zeros(n, dtype=_INT64, pin_memory=on_gpu) for n in sizes)
            batch, counters = (torch.zeros(n, dtype=_INT64, device=self.device) for n in (kernels().BATCH, 1 + self.tables))
            ring.append(_Sequence(capacity, ids32, offsets32, given, summary, batch, counters))
        else:
            ring.rotate(-1)
        return ring[-1]

    def _captured(self, sequence: _Sequence) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream(self.device)):
            graph.capture_begin(capture_error_mode="thread_local")
            self._launch(sequence)
            graph.capture_end()
        return graph

    def _launch(self, sequence: _Sequence) -> None:
        kernels().use(
            sequence.given, sequence.batch, sequence.counters, sequence.summary, self.stamp, self._feature_rows, self._feature_slot,
            self._feature_table, self.tables, sequence.capacity, sequence.ids32, sequence.offsets32,
        )  # fmt: skip


def stamps_type(device: torch.device) -> type[Stamps]:
    """Of those of a device the fastest."""
    return FusedStamps if device.type == "cuda" else Stamps
