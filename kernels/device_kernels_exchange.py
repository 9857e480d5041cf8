"""Kernels of an exchange of records between slots and host places, in the order of the host places' pages (``Planes``).

Its launches:

    count_pages   by record: its rank in its page
    start_pages   where each page's begin
    order_pages   the order
    exchange      records, in rounds
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_kernels import CHUNK, scan_blocks
from .device_planes import Moves
from .device_sequences import BLOCK, PROGRAMS

EXCHANGE_ELEMENTS, EXCHANGE_PROGRAMS, EXCHANGE_WARPS = 4096, 33, 2
"""Of a tile, how many are under way at most, and the warps of each. Few programs leave multiprocessors to what trains beside them, and
what is under way delays whatever else goes over the bus, such as the commands of every kernel that is launched meanwhile."""

FEWEST_PROGRAMS, WIDE_SHARE = 13, 16
"""An exchange that is short against the step may take longer, so as to disturb it less: all programs take part when one in so many of the
batch's ids misses, as many fewer as fewer miss, but so many at least. Tried in training steps (docs/gpu.md)."""

EXCHANGE_ROWS, EXCHANGE_COLUMNS = 256, 512
"""A tile has at most, so that narrow rows are shared between programs, and wide ones between tiles."""

PAGES_POW2 = 12
"""At most two to the power of this many *pages*: stretches of host places that are exchanged one after the other. With 5 GB of host
places one is 2 MB, as the pages of memory are: in any other order translations of addresses take most of the time."""


@triton.jit
def _count_pages(hosts, first_host, count_in, counts, rank_out, SHIFT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0)
    while block * BLOCK < tl.load(count_in):
        at = block * BLOCK + tl.arange(0, BLOCK)
        here = at < tl.load(count_in)
        page = (tl.load(hosts + at, mask=here, other=0) - tl.load(first_host)) >> SHIFT
        tl.store(rank_out + at, tl.atomic_add(counts + page, 1, mask=here, sem="relaxed"), mask=here)
        block += tl.num_programs(0)


@triton.jit
def _start_pages(counts, starts, pages, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    scan_blocks(counts, starts, pages, CHUNK)


@triton.jit
def _order_pages(  # type: ignore[no-untyped-def]
    hosts, first_host, count_in, starts, rank_in, order_out, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    while block * BLOCK < tl.load(count_in):
        at = block * BLOCK + tl.arange(0, BLOCK)
        here = at < tl.load(count_in)
        page = (tl.load(hosts + at, mask=here, other=0) - tl.load(first_host)) >> SHIFT
        rank = tl.load(rank_in + at, mask=here, other=0)
        tl.store(order_out + tl.load(starts + page, mask=here, other=0) + rank, at, mask=here)
        block += tl.num_programs(0)


@dataclass
class PageOrder:
    """What the launches of ``by_page`` pass on, for at most ``most`` records."""

    shift: int  # of a host place's number: its page's
    counts: Tensor  # by page
    starts: Tensor
    rank: Tensor  # by record

    @classmethod
    def of(cls, host_places: int, most: int, device: torch.device) -> PageOrder:
        shift = max(0, host_places.bit_length() - PAGES_POW2)
        pages = (host_places >> shift) + 1
        return cls(shift, *(torch.empty(n, dtype=torch.int32, device=device) for n in (pages, pages, most)))


def by_page(hosts: Tensor, count: Tensor, first_host: Tensor, order: Tensor, room: PageOrder) -> None:
    """The first ``count`` of these host places in the order of their pages; within a page in any. Shapes: (n,), ``order`` (n,) int32."""
    shift, counts, starts, rank = room.shift, room.counts, room.starts, room.rank
    programs = min(PROGRAMS, triton.cdiv(hosts.numel(), BLOCK))
    counts.zero_()
    _count_pages[(programs,)](hosts, first_host, count, counts, rank, SHIFT=shift, BLOCK=BLOCK)
    _start_pages[(1,)](counts, starts, counts.numel(), CHUNK=CHUNK)
    _order_pages[(programs,)](hosts, first_host, count, starts, rank, order, SHIFT=shift, BLOCK=BLOCK)


@triton.jit
def _exchange(  # type: ignore[no-untyped-def]
    upper, lower, order, slots, hosts, tables, first_slot, first_host, upper_start, lower_start, widths, count_in,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEWEST: tl.constexpr, WIDE_SHARE: tl.constexpr,
):  # fmt: skip
    count = tl.load(count_in).to(tl.int32)
    programs = tl.load(count_in) * WIDE_SHARE * tl.num_programs(0) // tl.maximum(tl.load(count_in + 1), 1)
    programs = tl.minimum(tl.maximum(programs, FEWEST), tl.num_programs(0)).to(tl.int32)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(0) * ROWS
    if tl.program_id(0) >= programs:
        first = count
    while first < count:
        here = first + tl.arange(0, ROWS) < count
        at = tl.load(order + first + tl.arange(0, ROWS), mask=here, other=0)
        table = tl.load(tables + at, mask=here, other=0)
        # Without the hint a masked access is 4 bytes wide, and a warp's are 16 bytes apart: 2.6 GB/s to host memory, measured.
        width = tl.multiple_of(tl.load(widths + table), ALIGN)
        up = tl.load(upper_start + table) + (tl.load(slots + at, mask=here, other=0) - tl.load(first_slot + table)) * width
        down = tl.load(lower_start + table) + (tl.load(hosts + at, mask=here, other=0) - tl.load(first_host + table)) * width
        up, down = tl.multiple_of(up, ALIGN), tl.multiple_of(down, ALIGN)
        mask = here[:, None] & (column[None, :] < width[:, None])
        up_at, down_at = upper + up[:, None] + column[None, :], lower + down[:, None] + column[None, :]
        comes = tl.load(down_at, mask=mask)
        goes = tl.load(up_at, mask=mask)
        tl.store(down_at, goes, mask=mask)
        tl.store(up_at, comes, mask=mask)
        first += programs * ROWS


def exchange(
    upper: Tensor, lower: Tensor, moves: Moves, firsts: tuple[Tensor, Tensor], upper_start: Tensor, lower_start: Tensor, widths: Tensor,
    widest: int, align: int,
) -> None:  # fmt: skip
    """One plane's layer of some records changes places. Starts and widths are in elements, by table."""
    columns = min(triton.next_power_of_2(widest), EXCHANGE_COLUMNS)
    rows = max(1, min(EXCHANGE_ROWS, EXCHANGE_ELEMENTS // columns))
    grid: Any = (min(EXCHANGE_PROGRAMS, triton.cdiv(moves.slots.numel(), rows)), triton.cdiv(widest, columns))
    _exchange[grid](
        upper, lower, moves.order, moves.slots, moves.hosts, moves.tables, *firsts, upper_start, lower_start, widths, moves.count,
        ALIGN=align, ROWS=rows, COLUMNS=columns, FEWEST=FEWEST_PROGRAMS, WIDE_SHARE=WIDE_SHARE, num_warps=EXCHANGE_WARPS,
    )  # fmt: skip
