"""``Stamps``: what a group remembers of its slots where every row has one of its own: row r of a table is in its slot r.

    stamp   int64 (slots + 1)   batch · 2 + dirty: the last batch that used the row, 0 of those that none did. The last element is a sink.

So ids are slots, and nothing is looked up, missed or evicted. A batch is *used*: its ids are checked, its rows stamped and counted, before
those of the next. The host looks at the outcome later.

``FusedStamps`` does it in Triton kernels, in a sequence (``device_sequences``) that a CUDA device replays as one graph.
"""

from __future__ import annotations

from collections.abc import Sequence as Values
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .device_ids import Batch, GroupIds, set_before, told
from .device_sequences import BATCH, GIVEN, Sequence, Sequences, capacity_for, captured
from .device_streams import device_calls

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
        self, names: Values[str], rows: Values[int], slots: Values[int], table_of_feature: Values[int], device: torch.device
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
class _Room:
    """What the launches of a batch pass on."""

    batch: Tensor  # as given, on the device
    counters: Tensor  # bad ids, distinct rows by table


class FusedStamps(Stamps):
    """The same, for CUDA devices."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._sequences = Sequences(2 + self.tables + self.features + 2, self._make_room, self.device)
        self._calls = device_calls() if self.device.type == "cuda" else None
        self._last_stream: Any = None
        self._last_raw_stream = -1  # of it; a number is quicker to look up

    def use(self, batch: Batch, seq: int, dirty: bool) -> Use:
        ids, offsets, stride = batch
        count = ids.numel()
        sequence = self._sequences.next(capacity_for(count), ids, offsets)
        GIVEN.pack_into(sequence.as_given, 0, ids.data_ptr(), offsets.data_ptr(), 0, count, stride, seq, 0, dirty, *_UNUSED)
        if self._calls is None:
            self._launch(sequence)
            return Use(batch, seq, sequence.as_summary)
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        if stream != self._last_raw_stream:
            self._change_stream()
        if sequence.replay is not None:
            self._calls.launch(sequence.replay, stream)
        elif not sequence.has_run:  # kernels are compiled
            self._launch(sequence)
            sequence.has_run = True
        else:
            with torch.cuda.stream(torch.cuda.Stream(self.device)):
                sequence.graphs = (captured(partial(self._launch, sequence)),)
            sequence.replay = sequence.graphs[0].raw_cuda_graph_exec()
            self._calls.launch(sequence.replay, stream)
        return Use(batch, seq, sequence.as_summary)

    def _change_stream(self) -> None:
        """The current stream waits for the one that used the batch before: stamps are in the order of batches."""
        stream = torch.cuda.current_stream(self.device)
        if self._last_stream is not None:
            stream.wait_stream(self._last_stream)
        self._last_stream, self._last_raw_stream = stream, stream.cuda_stream

    def _make_room(self, _capacity: int) -> _Room:
        return _Room(*(torch.zeros(n, dtype=_INT64, device=self.device) for n in (BATCH, 1 + self.tables)))

    def _launch(self, sequence: Sequence[_Room]) -> None:
        from .device_kernels_stamps import use  # needs Triton, which a CPU's PyTorch may lack

        use(
            sequence.given, sequence.room.batch, sequence.room.counters, sequence.summary, self.stamp, self._feature_rows,
            self._feature_slot, self._feature_table, self.tables, sequence.capacity, sequence.ids32, sequence.offsets32,
        )  # fmt: skip


def stamps_type(device: torch.device) -> type[Stamps]:
    """Of those of a device the fastest."""
    return FusedStamps if device.type == "cuda" else Stamps
