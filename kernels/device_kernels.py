"""Kernels for what every batch does on a CUDA device, each the fusion of tensor operations that stand beside its caller.

``lookup`` is ``DeviceDirectory._search``; ``exchange`` is ``Planes._exchange``. The tensor operations run on a CPU and are the
reference: the same tests hold for both. Triton comes with PyTorch's CUDA wheels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOOKUP_BLOCK = 1024
_EXCHANGE_ELEMENTS = 1024
"""Of a tile, so that 16-byte accesses keep 256 bytes of a warp's lanes in flight on the bus. Guesses, as the block above."""


@triton.jit(do_not_specialize=["count", "slots", "sink", "seq"])
def _lookup(  # type: ignore[no-untyped-def]
    ids, starts, feature_row, feature_rows, feature_slot, feature_table, place_of_row, stamp,
    place_out, slot_out, missing_out, summary, count, slots, sink, seq,
    FEATURES: tl.constexpr, SEARCH: tl.constexpr, DIRTY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    stamp_now = seq.to(tl.int64) * 2
    low = tl.zeros([BLOCK], tl.int32)
    high = tl.full([BLOCK], FEATURES - 1, tl.int32)
    for _ in tl.static_range(SEARCH):  # the first feature that ends behind this position
        middle = (low + high) // 2
        ends_before = tl.load(starts + 1 + middle) <= at
        low = tl.where(ends_before & (low < high), middle + 1, low)
        high = tl.where(ends_before, high, middle)
        high = tl.maximum(low, high)
    feature = low
    id = tl.load(ids + at, mask=here, other=0).to(tl.int64)
    good = here & (id >= 0) & (id < tl.load(feature_rows + feature))
    place = tl.load(place_of_row + tl.load(feature_row + feature) + id, mask=good, other=-1).to(tl.int64)
    hit = good & (place >= 0) & (place < slots)
    tl.store(place_out + at, place, mask=here)
    tl.store(slot_out + at, place - tl.load(feature_slot + feature), mask=here)
    tl.store(missing_out + at, (good & ~hit).to(tl.int8), mask=here)
    # One store a distinct slot, nearly: whoever finds the batch's stamp there leaves it.
    slot = tl.where(hit, place, sink)
    old = tl.load(stamp + slot, mask=hit, other=0)
    first = hit & ((old >> 1) != seq)
    new = stamp_now + (1 if DIRTY else (old & 1))
    old = tl.atomic_xchg(stamp + slot, new, mask=first)
    first = first & ((old >> 1) != seq)
    table = tl.load(feature_table + feature)
    last_table = tl.max(tl.where(here, table, 0))
    first_table = tl.min(tl.where(here, table, last_table))
    if first_table == last_table:
        tl.atomic_add(summary + 2 + first_table, tl.sum(first.to(tl.int64)))
    else:
        tl.atomic_add(summary + 2 + table, first.to(tl.int64), mask=first)
    tl.atomic_add(summary, tl.sum((here & ~good).to(tl.int64)))
    tl.atomic_add(summary + 1, tl.sum((good & ~hit).to(tl.int64)))


def lookup(
    ids: Tensor, starts: Tensor, of_feature: tuple[Tensor, ...], place_of_row: Tensor, stamp: Tensor, slots: int, seq: int, dirty: bool,
    place: Tensor, slot: Tensor, missing: Tensor, summary: Tensor,
) -> None:  # fmt: skip
    """Finds and stamps a batch: fills ``place``, ``slot`` and ``missing`` by position, and adds to ``summary``."""
    features = starts.numel() - 1
    _lookup[(max(1, triton.cdiv(ids.numel(), _LOOKUP_BLOCK)),)](
        ids, starts, *of_feature, place_of_row, stamp, place, slot, missing.view(torch.int8), summary,
        ids.numel(), slots, stamp.numel() - 1, seq,
        FEATURES=features, SEARCH=max(1, features.bit_length()), DIRTY=dirty, BLOCK=_LOOKUP_BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _exchange(  # type: ignore[no-untyped-def]
    upper, lower, slots, hosts, tables, first_slot, first_host, upper_start, lower_start, widths, count,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = at < count
    table = tl.load(tables + at, mask=here, other=0)
    width = tl.load(widths + table)
    up = tl.load(upper_start + table) + (tl.load(slots + at, mask=here, other=0) - tl.load(first_slot + table)) * width
    down = tl.load(lower_start + table) + (tl.load(hosts + at, mask=here, other=0) - tl.load(first_host + table)) * width
    up, down = tl.multiple_of(up, ALIGN), tl.multiple_of(down, ALIGN)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = here[:, None] & (column[None, :] < width[:, None])
    up_at, down_at = upper + up[:, None] + column[None, :], lower + down[:, None] + column[None, :]
    comes = tl.load(down_at, mask=mask)
    goes = tl.load(up_at, mask=mask)
    tl.store(down_at, goes, mask=mask)
    tl.store(up_at, comes, mask=mask)


def exchange(
    upper: Tensor, lower: Tensor, slots: Tensor, hosts: Tensor, tables: Tensor, firsts: tuple[Tensor, Tensor],
    upper_start: Tensor, lower_start: Tensor, widths: Tensor, widest: int, align: int,
) -> None:  # fmt: skip
    """Rows of one plane's layer change places. Starts and widths are in elements, by table; places through the group."""
    columns = min(triton.next_power_of_2(widest), _EXCHANGE_ELEMENTS)
    rows = max(1, _EXCHANGE_ELEMENTS // columns)
    grid: Any = (triton.cdiv(slots.numel(), rows), triton.cdiv(widest, columns))
    _exchange[grid](
        upper, lower, slots, hosts, tables, *firsts, upper_start, lower_start, widths, slots.numel(),
        ALIGN=align, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
