"""What a group's records consist of on a device: tensors of the stock TBE, and their twins in host memory below.

A *plane* is one tensor of the TBE (all weights, or all of one optimizer state) with its twin, which holds the same part of the
records in host places. Both are cut into *units*, the largest piece that every row is a whole number of: with one dimension in the
group a unit is a row. So the rows of all tables move in one operation a plane, whatever their tables.

The twins are host memory that the device has mapped: its kernels read and write them over the bus, without a copy between, and native
code fills and empties them. On a CPU they are ordinary tensors.

A table with several ranges of columns has a shard for each in the TBE; the k-th shards of all tables are a *layer*, moved as one.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import errors
from . import _core

_MAPPED = 2
"""CUDA's cudaHostRegisterMapped."""


@dataclass
class Moves:
    """Records that change places: those in these slots and in these host places, both counted through the group.

    Shapes: (n,); of these only the device knows how many there are.
    """

    slots: Tensor
    hosts: Tensor
    tables: Tensor
    count: Tensor  # (2,): how many, and for a batch of how many ids
    order: Tensor | None = None  # int32, by pages of host places; None: nobody has ordered them


@dataclass
class _Layer:
    """Where the rows of a plane's layer are, in units. Shapes: (tables,); tables without this layer have width 0."""

    upper_start: Tensor
    lower_start: Tensor
    width: Tensor
    widths: list[int]
    elements: tuple[Tensor, Tensor, Tensor]  # the three of them in elements
    widest: int  # in elements
    align: int  # elements that every row of the plane begins at a multiple of


@dataclass
class _Plane:
    upper: Tensor  # (units, elements of a unit)
    lower: Tensor
    layers: list[_Layer]


class Planes:
    """The planes of a group, from its ``parts``: by shard, [weights, then each state], views of the TBE's tensors."""

    def __init__(self, parts: Sequence[Sequence[Tensor]], table_of_shard: Sequence[int], host_places: Sequence[int]) -> None:
        self._table_of_shard, self._host_places = list(table_of_shard), list(host_places)
        self.lower_parts: list[list[Tensor]] = [[] for _ in parts]
        self._planes = [self._plane([of_shard[p] for of_shard in parts]) for p in range(len(parts[0]))]

    def _plane(self, views: Sequence[Tensor]) -> _Plane:
        row_elements = [math.prod(v.shape[1:]) for v in views]
        unit = math.gcd(*row_elements)
        tables = len(self._host_places)
        rows = [self._host_places[t] for t in self._table_of_shard]
        lower = _mapped(sum(n * e for n, e in zip(rows, row_elements, strict=True)), views[0])
        starts = [0]
        for shard, (n, e, view) in enumerate(zip(rows, row_elements, views, strict=True)):
            self.lower_parts[shard].append(lower[starts[-1] : starts[-1] + n * e].view(n, *view.shape[1:]))
            starts.append(starts[-1] + n * e)
        whole = views[0].as_strided((sum(v.numel() for v in views),), (1,), 0)
        assert all(v.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() and v.storage_offset() % unit == 0 for v in views)
        shards_of_table = [[s for s, t in enumerate(self._table_of_shard) if t == table] for table in range(tables)]
        layers = []
        for k in range(max(len(s) for s in shards_of_table)):
            mine = [s[k] if k < len(s) else None for s in shards_of_table]
            columns = (
                [0 if s is None else views[s].storage_offset() // unit for s in mine],
                [0 if s is None else starts[s] // unit for s in mine],
                [0 if s is None else row_elements[s] // unit for s in mine],
            )
            upper, lower_start, width = (torch.tensor(c, device=whole.device) for c in columns)
            elements = (upper * unit, lower_start * unit, width * unit)
            align = 4 if unit % 4 == 0 else 1
            layers.append(_Layer(upper, lower_start, width, columns[-1], elements, max(columns[-1]) * unit, align))
        return _Plane(whole.view(-1, unit), lower.view(-1, unit), layers)

    def exchange(self, moves: Moves, firsts: tuple[Tensor, Tensor]) -> None:
        """Records change places. ``firsts``: where each table's slots begin, and its host places."""
        if moves.slots.device.type == "cuda":
            self.exchange_by_kernel(moves, firsts)
            return
        slots, hosts, table = (x[: int(moves.count[0])].long() for x in (moves.slots, moves.hosts, moves.tables))
        counts = torch.bincount(table, minlength=len(self._host_places)).tolist()
        slots, hosts = (places - first.index_select(0, table) for places, first in zip((slots, hosts), firsts, strict=True))
        for plane in self._planes:
            for layer in plane.layers:
                up, down = _units(layer, layer.upper_start, slots, table, counts), _units(layer, layer.lower_start, hosts, table, counts)
                comes, goes = plane.lower.index_select(0, down), plane.upper.index_select(0, up)
                plane.upper.index_copy_(0, up, comes)
                plane.lower.index_copy_(0, down, goes)

    def exchange_by_kernel(self, moves: Moves, firsts: tuple[Tensor, Tensor]) -> None:
        """The same, fused: what comes and what goes are on the bus at once."""
        from . import device_kernels_exchange as kernels  # needs Triton, which a CPU's PyTorch may lack

        if moves.order is None:
            order = moves.hosts.new_empty(moves.hosts.numel(), dtype=torch.int32)
            room = kernels.PageOrder.of(sum(self._host_places), moves.hosts.numel(), moves.hosts.device)
            kernels.by_page(moves.hosts, moves.count, firsts[1], order, room)
            moves = replace(moves, order=order)
        for plane in self._planes:
            for layer in plane.layers:
                kernels.exchange(plane.upper, plane.lower, moves, firsts, *layer.elements, layer.widest, layer.align)

    @property
    def host_bytes(self) -> int:
        """Host memory of the twins."""
        return sum(p.lower.nbytes for p in self._planes)


def native_part(rows: Tensor) -> Any:
    """An array of rows, one a slot."""
    row_bytes = math.prod(rows.shape[1:]) * rows.dtype.itemsize
    return _core.Part(rows.data_ptr(), row_bytes, row_bytes)


def _units(layer: _Layer, start: Tensor, places: Tensor, table: Tensor, counts: Sequence[int]) -> Tensor:
    """The units of rows, row by row."""
    width = layer.widths[0]
    if all(w == width for w in layer.widths):
        first = start.index_select(0, table) + (places if width == 1 else places * width)
        return first if width == 1 else (first[:, None] + torch.arange(width, device=places.device)).flatten()
    widths = layer.width.index_select(0, table)
    total = sum(n * w for n, w in zip(counts, layer.widths, strict=True))
    row = torch.repeat_interleave(widths, output_size=total)
    ends = widths.cumsum(0)
    within = torch.arange(total, device=places.device) - (ends - widths).index_select(0, row)
    return (start.index_select(0, table) + places * widths).index_select(0, row) + within


def _mapped(elements: int, like: Tensor) -> Tensor:
    """Host memory that ``like``'s device can address; a tensor of the CPU, without content.

    In huge pages where the system has them: rows at random places then come and go at 80 GB/s instead of 65 (docs/gpu.md).
    """
    if like.device.type == "cpu":
        return torch.empty(elements, dtype=like.dtype)
    size, runtime = max(1, elements) * like.dtype.itemsize, torch.cuda.cudart()
    try:
        room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without huge pages
            room.madvise(mmap.MADV_HUGEPAGE)
        tensor = torch.frombuffer(room, dtype=like.dtype, count=max(1, elements))
        failed = runtime.cudaHostRegister(tensor.data_ptr(), size, _MAPPED)
        why: object = None if failed == runtime.cudaError.success else failed
    except (OSError, ValueError) as e:
        why = e
    if why is not None:
        raise errors.ConfigurationError(
            f"{size} bytes of host memory for the DDR caches of tiered tables could not be mapped for {like.device}: {why}. Use smaller "
            "DdrCaches or pools, or raise the limit on locked memory"
        )
    weakref.finalize(room, runtime.cudaHostUnregister, tensor.data_ptr())
    return tensor[:elements]
