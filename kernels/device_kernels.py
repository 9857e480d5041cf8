"""Kernels for a CUDA device: each fuses the tensor operations of a method of ``DeviceDirectory`` or ``Planes``.

Those run on a CPU and are the reference; the same tests hold for both (tests/test_device_kernels.py). They are fused for the host's sake
as much as the device's: a step of an all-HBM table takes less than a millisecond, of which a launch takes 5 to 20 µs. Triton comes with
PyTorch's CUDA wheels.

A batch's ids are looked up feature by feature: feature f's begin at ``offsets[f * stride]``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512
EXCHANGE_ELEMENTS, EXCHANGE_PROGRAMS = 1024, 128
"""Of a tile, and how many are under way: enough for the bus, and few, so that what trains beside it keeps its multiprocessors."""


@triton.jit
def _feature_at(offsets, stride, at, FEATURES: tl.constexpr, SEARCH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first feature that ends behind a position; the last one, of positions behind all."""
    low = tl.zeros_like(at)
    high = low + (FEATURES - 1)
    for _ in tl.static_range(SEARCH):
        middle = (low + high) // 2
        ends_before = tl.load(offsets + (middle + 1) * stride).to(tl.int64) <= at
        low = tl.where(ends_before & (low < high), middle + 1, low)
        high = tl.maximum(low, tl.where(ends_before, high, middle))
    return low


@triton.jit
def _add_by_table(counts, table, amount, here):
    """Adds to the counter of each table. Tables are sorted, so a block nearly always has one."""
    last = tl.max(tl.where(here, table, 0))
    first = tl.min(tl.where(here, table, last))
    if first == last:
        tl.atomic_add(counts + first, tl.sum(tl.where(here, amount, 0)))
    else:
        tl.atomic_add(counts + table, amount, mask=here & (amount != 0))


@triton.jit(do_not_specialize=["count", "slots", "sink", "seq", "stride", "tables"])
def _lookup(  # type: ignore[no-untyped-def]
    ids, offsets, stride, feature_row, feature_rows, feature_slot, feature_table, place_of_row, stamp,
    place_out, slot_out, missing_out, summary, count, slots, sink, seq, tables,
    FEATURES: tl.constexpr, FEATURES_POW2: tl.constexpr, SEARCH: tl.constexpr, DIRTY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    now = seq.to(tl.int64)
    feature = _feature_at(offsets, stride, at, FEATURES, SEARCH)
    id = tl.load(ids + at, mask=here, other=0).to(tl.int64)
    good = here & (id >= 0) & (id < tl.load(feature_rows + feature))
    place = tl.load(place_of_row + tl.load(feature_row + feature) + id, mask=good, other=-1).to(tl.int64)
    hit = good & (place >= 0) & (place < slots)
    tl.store(place_out + at, place, mask=here)
    tl.store(slot_out + at, place - tl.load(feature_slot + feature), mask=here)
    tl.store(missing_out + at, (good & ~hit).to(tl.int8), mask=here)
    # One exchange a distinct slot, nearly: whoever finds the batch's stamp there leaves it.
    slot = tl.where(hit, place, sink)
    old = tl.load(stamp + slot, mask=hit, other=0)
    first = hit & ((old >> 1) != now)
    old = tl.atomic_xchg(stamp + slot, 2 * now + (1 if DIRTY else (old & 1)), mask=first)
    first = first & ((old >> 1) != now)
    _add_by_table(summary + 2, tl.load(feature_table + feature), first.to(tl.int64), here)
    tl.atomic_add(summary, tl.sum((here & ~good).to(tl.int64)))
    tl.atomic_add(summary + 1, tl.sum((good & ~hit).to(tl.int64)))
    if tl.program_id(0) == 0:
        f = tl.arange(0, FEATURES_POW2)
        begins = tl.load(offsets + f * stride, mask=f <= FEATURES, other=0).to(tl.int64)
        tl.store(summary + 2 + tables + f, begins, mask=f <= FEATURES)


def lookup(
    ids: Tensor, offsets: Tensor, stride: int, of_feature: tuple[Tensor, ...], place_of_row: Tensor, stamp: Tensor, slots: int,
    seq: int, dirty: bool, place: Tensor, slot: Tensor, missing: Tensor, summary: Tensor,
) -> None:  # fmt: skip
    """``DeviceDirectory._search``."""
    features = of_feature[0].numel()
    _lookup[(max(1, triton.cdiv(ids.numel(), _BLOCK)),)](
        ids, offsets, stride, *of_feature, place_of_row, stamp, place, slot, missing.view(torch.int8), summary,
        ids.numel(), slots, stamp.numel() - 1, seq, summary.numel() - features - 3,
        FEATURES=features, FEATURES_POW2=triton.next_power_of_2(features + 1), SEARCH=max(1, features.bit_length()), DIRTY=dirty,
        BLOCK=_BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["stride", "most"])
def _claim(  # type: ignore[no-untyped-def]
    at_in, ids, offsets, stride, feature_row, place_of_row, row_out, feature_out, most,
    FEATURES: tl.constexpr, SEARCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < most
    at = tl.load(at_in + i, mask=here, other=0)
    feature = _feature_at(offsets, stride, at, FEATURES, SEARCH)
    row = tl.load(feature_row + feature) + tl.load(ids + at, mask=here, other=0).to(tl.int64)
    tl.atomic_min(place_of_row + row, i - (most + 1), mask=here)
    tl.store(row_out + i, row, mask=here)
    tl.store(feature_out + i, feature, mask=here)


@triton.jit(do_not_specialize=["most"])
def _win(row_in, place_of_row, wins_out, most, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < most
    row = tl.load(row_in + i, mask=here, other=0)
    tl.store(wins_out + i, (tl.load(place_of_row + row, mask=here, other=0) == i - (most + 1)).to(tl.int8), mask=here)


@triton.jit(do_not_specialize=["most", "seq", "tables", "sink_row"])
def _miss(  # type: ignore[no-untyped-def]
    winner_in, at_in, row_in, feature_in, place_in, feature_table, stamp, row_out, was_out, table_out, below_out, counts, below_counts,
    most, seq, tables, sink_row, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    winner = tl.load(winner_in + i, mask=i < most, other=-1)
    here = winner >= 0
    winner = tl.maximum(winner, 0)
    was = tl.load(place_in + tl.load(at_in + winner, mask=here, other=0), mask=here, other=-1)
    table = tl.where(here, tl.load(feature_table + tl.load(feature_in + winner, mask=here, other=0)), tables.to(tl.int64))
    below = here & (was < 0)
    held = here & (was >= 0)
    host = tl.maximum(was, 0)
    stamped = 2 * seq.to(tl.int64) + (tl.load(stamp + host, mask=held, other=0) & 1)
    tl.store(stamp + host, stamped, mask=held)
    tl.store(row_out + i, tl.where(here, tl.load(row_in + winner, mask=here, other=0), sink_row), mask=i < most)
    tl.store(was_out + i, was, mask=i < most)
    tl.store(table_out + i, table, mask=i < most)
    tl.store(below_out + i, below.to(tl.int8), mask=i < most)
    _add_by_table(counts, table, here.to(tl.int64), here)
    _add_by_table(below_counts, table, below.to(tl.int64), here)


def claim(
    at: Tensor, ids: Tensor, offsets: Tensor, stride: int, of_feature: tuple[Tensor, ...], place_of_row: Tensor, stamp: Tensor,
    place: Tensor, seq: int, tables: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``DeviceDirectory.claim``: row_at, feature_at, row, was, table, below, counts, below counts."""
    most, features = at.numel(), of_feature[0].numel()
    row_at, feature_at, row, was, table = torch.empty(5, most, dtype=torch.int64, device=at.device).unbind(0)
    wins, below = torch.empty(2, most, dtype=torch.bool, device=at.device).unbind(0)
    # One counter more: blocks without a miss may add nothing to the table behind the last.
    counts, below_counts = torch.zeros(2, tables + 1, dtype=torch.int64, device=at.device).unbind(0)
    grid: Any = (triton.cdiv(most, _BLOCK),)
    _claim[grid](
        at, ids, offsets, stride, of_feature[0], place_of_row, row_at, feature_at, most,
        FEATURES=features, SEARCH=max(1, features.bit_length()), BLOCK=_BLOCK,
    )  # fmt: skip
    _win[grid](row_at, place_of_row, wins.view(torch.int8), most, BLOCK=_BLOCK)
    winner = torch.nonzero_static(wins, size=most, fill_value=-1)
    _miss[grid](
        winner, at, row_at, feature_at, place, of_feature[3], stamp, row, was, table, below.view(torch.int8), counts, below_counts,
        most, seq, tables, place_of_row.numel() - 1, BLOCK=_BLOCK,
    )  # fmt: skip
    return row_at, feature_at, row, was, table, below, counts[:-1], below_counts[:-1]


@triton.jit(do_not_specialize=["count"])
def _fresh(place, queued, stamp, fresh_out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < count
    now = tl.load(stamp + tl.load(place + i, mask=here, other=0), mask=here, other=0)
    tl.store(fresh_out + i, (now == tl.load(queued + i, mask=here, other=0)).to(tl.int8), mask=here)


@triton.jit(do_not_specialize=["count", "tables"])
def _take(  # type: ignore[no-untyped-def]
    fresh_in, up_to, table_in, bounds, wanted, taken_out, available, count, tables, TABLES_POW2: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < count
    fresh = tl.load(fresh_in + i, mask=here, other=0).to(tl.int64)
    table = tl.load(table_in + i, mask=here, other=0)
    first = tl.load(bounds + table)
    before_table = tl.load(up_to + first - 1, mask=first > 0, other=0)
    rank = tl.load(up_to + i, mask=here, other=0) - fresh - before_table
    taken = (fresh != 0) & (rank < tl.load(wanted + table))
    tl.store(taken_out + i, taken.to(tl.int8), mask=here)
    if tl.program_id(0) == 0:
        t = tl.arange(0, TABLES_POW2)
        real = t < tables
        begin, end = tl.load(bounds + t, mask=real, other=0), tl.load(bounds + t + 1, mask=real, other=0)
        have = tl.load(up_to + end - 1, mask=real & (end > 0), other=0) - tl.load(up_to + begin - 1, mask=real & (begin > 0), other=0)
        tl.store(available + t, have, mask=real)


def choose(place: Tensor, queued: Tensor, table: Tensor, bounds: Tensor, stamp: Tensor, wanted: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """``DeviceDirectory.choose``: places and how many candidates there were."""
    count, tables = place.numel(), bounds.numel() - 1
    fresh, taken = torch.empty(2, count, dtype=torch.bool, device=place.device).unbind(0)
    available = torch.empty(tables, dtype=torch.int64, device=place.device)
    grid: Any = (triton.cdiv(count, _BLOCK),)
    _fresh[grid](place, queued, stamp, fresh.view(torch.int8), count, BLOCK=_BLOCK)
    _take[grid](
        fresh.view(torch.int8), fresh.cumsum(0), table, bounds, wanted, taken.view(torch.int8), available, count, tables,
        TABLES_POW2=triton.next_power_of_2(tables), BLOCK=_BLOCK,
    )  # fmt: skip
    return place.index_select(0, torch.nonzero_static(taken, size=most, fill_value=0).squeeze(1)), available


@triton.jit(do_not_specialize=["seq", "before"])
def _age_bins(  # type: ignore[no-untyped-def]
    stamp, first_place, pinned, bucket_out, bins, seq, before,
    BUCKETS: tl.constexpr, FAR_BATCHES: tl.constexpr, PINNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    table = tl.program_id(0)
    first, start, end = tl.load(first_place), tl.load(first_place + table), tl.load(first_place + table + 1)
    place = start + tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = place < end
    used = tl.load(stamp + place, mask=here, other=0)
    age = seq.to(tl.int64) - (used >> 1)
    far: tl.constexpr = BUCKETS // 2
    age = tl.where(age < far, age, tl.minimum(far + (age - far) // FAR_BATCHES, BUCKETS - 1))
    if PINNED:  # noqa: SIM108 (a branch of the compiler's)
        may_leave = tl.load(pinned + place - first, mask=here, other=1) == 0
    else:
        may_leave = used < 2 * before.to(tl.int64)
    bucket = tl.where(may_leave, BUCKETS - age, BUCKETS + 1)
    bucket = tl.where(used < 0, 0, bucket)
    bucket = tl.where(here, bucket, BUCKETS + 1).to(tl.int32)
    tl.store(bucket_out + place - first, bucket, mask=here)
    counts = tl.histogram(bucket, 2 * BUCKETS)
    b = tl.arange(0, 2 * BUCKETS)
    tl.atomic_add(bins + table.to(tl.int64) * (2 * BUCKETS) + b, counts.to(tl.int64), mask=(counts > 0) & (b <= BUCKETS))


@triton.jit
def _threshold(bins, goal, whole_out, rest_out, BUCKETS: tl.constexpr):  # type: ignore[no-untyped-def]
    table = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, 2 * BUCKETS)
    wanted = tl.load(goal + table)
    up_to = tl.cumsum(tl.load(bins + table * (2 * BUCKETS) + b), 0)
    fits = (up_to <= wanted) & (b <= BUCKETS)
    tl.store(whole_out + table, tl.sum(fits.to(tl.int32)))
    tl.store(rest_out + table, wanted - tl.max(tl.where(fits, up_to, 0)))


@triton.jit
def _mark(first_place, bucket_in, whole, partly_out, BUCKETS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    table = tl.program_id(0)
    first, start, end = tl.load(first_place), tl.load(first_place + table), tl.load(first_place + table + 1)
    i = start - first + tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < end - first
    bucket = tl.load(bucket_in + i, mask=here, other=BUCKETS + 1)
    tl.store(partly_out + i, ((bucket == tl.load(whole + table)) & (bucket <= BUCKETS)).to(tl.int8), mask=here)


@triton.jit
def _pick(  # type: ignore[no-untyped-def]
    first_place, bucket_in, whole, rest, partly_in, up_to, taken_out, BUCKETS: tl.constexpr, BLOCK: tl.constexpr
):
    table = tl.program_id(0)
    first, start, end = tl.load(first_place), tl.load(first_place + table), tl.load(first_place + table + 1)
    i = start - first + tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < end - first
    before_table = tl.load(up_to + start - first - 1, mask=start > first, other=0)
    partly = tl.load(partly_in + i, mask=here, other=0).to(tl.int64)
    rank = tl.load(up_to + i, mask=here, other=0) - partly - before_table
    bucket = tl.load(bucket_in + i, mask=here, other=BUCKETS + 1)
    taken = ((bucket < tl.load(whole + table)) & (bucket <= BUCKETS)) | ((partly != 0) & (rank < tl.load(rest + table)))
    tl.store(taken_out + i, taken.to(tl.int8), mask=here)


def oldest(
    stamp: Tensor, first_place: Tensor, most_places: int, places: int, goal: Tensor, seq: int, before: int, pinned: Tensor | None,
    buckets: int, far_batches: int,
) -> Tensor:  # fmt: skip
    """``DeviceDirectory._oldest``: which places, as flags."""
    tables = goal.numel()
    bucket = torch.empty(places, dtype=torch.int32, device=stamp.device)
    partly, taken = torch.empty(2, places, dtype=torch.bool, device=stamp.device).unbind(0)
    bins = torch.zeros(tables, 2 * buckets, dtype=torch.int64, device=stamp.device)
    whole = torch.empty(tables, dtype=torch.int32, device=stamp.device)
    rest = torch.empty(tables, dtype=torch.int64, device=stamp.device)
    grid: Any = (tables, triton.cdiv(most_places, 4 * _BLOCK))
    pins = stamp if pinned is None else pinned.view(torch.int8)
    _age_bins[grid](
        stamp, first_place, pins, bucket, bins, seq, before,
        BUCKETS=buckets, FAR_BATCHES=far_batches, PINNED=pinned is not None, BLOCK=4 * _BLOCK,
    )  # fmt: skip
    _threshold[(tables,)](bins, goal, whole, rest, BUCKETS=buckets)
    _mark[grid](first_place, bucket, whole, partly.view(torch.int8), BUCKETS=buckets, BLOCK=4 * _BLOCK)
    _pick[grid](
        first_place, bucket, whole, rest, partly.view(torch.int8), partly.cumsum(0), taken.view(torch.int8),
        BUCKETS=buckets, BLOCK=4 * _BLOCK,
    )  # fmt: skip
    return taken


@triton.jit(do_not_specialize=["count", "seq"])
def _commit(  # type: ignore[no-untyped-def]
    row_in, table_in, slots, hosts, first_row, place_of_row, row_of_place, stamp, evictions, write_backs, count, seq,
    DIRTY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < count
    now = 2 * seq.to(tl.int64)
    row, table = tl.load(row_in + i, mask=here, other=0), tl.load(table_in + i, mask=here, other=0)
    slot, host = tl.load(slots + i, mask=here, other=0), tl.load(hosts + i, mask=here, other=0)
    first = tl.load(first_row + table)
    leaves, left = tl.load(row_of_place + slot, mask=here, other=-1), tl.load(stamp + slot, mask=here, other=0)
    held = here & (leaves >= 0)
    # A row that was below has a free host place, so stamp -1.
    was_dirty = tl.maximum(tl.load(stamp + host, mask=here, other=0), 0) & 1
    tl.store(place_of_row + row, slot.to(tl.int32), mask=here)
    tl.store(place_of_row + first + leaves, host.to(tl.int32), mask=held)
    tl.store(row_of_place + slot, (row - first).to(tl.int32), mask=here)
    tl.store(row_of_place + host, leaves, mask=here)
    tl.store(stamp + slot, now + (1 if DIRTY else was_dirty), mask=here)
    tl.store(stamp + host, tl.where(held, now + (left & 1), -1), mask=here)
    _add_by_table(evictions, table, held.to(tl.int64), here)
    _add_by_table(write_backs, table, tl.where(held, left & 1, 0), here)


def commit(
    row: Tensor, table: Tensor, slots: Tensor, hosts: Tensor, first_row: Tensor, place_of_row: Tensor, row_of_place: Tensor,
    stamp: Tensor, evictions: Tensor, write_backs: Tensor, seq: int, dirty: bool,
) -> None:  # fmt: skip
    """``DeviceDirectory.commit``."""
    _commit[(triton.cdiv(slots.numel(), _BLOCK),)](
        row, table, slots, hosts, first_row, place_of_row, row_of_place, stamp, evictions, write_backs, slots.numel(), seq,
        DIRTY=dirty, BLOCK=_BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["most"])
def _settle(  # type: ignore[no-untyped-def]
    at_in, row_in, feature_in, place_of_row, feature_slot, place_out, slot_out, most, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < most
    at = tl.load(at_in + i, mask=here, other=0)
    place = tl.load(place_of_row + tl.load(row_in + i, mask=here, other=0), mask=here, other=0).to(tl.int64)
    tl.store(place_out + at, place, mask=here)
    tl.store(slot_out + at, place - tl.load(feature_slot + tl.load(feature_in + i, mask=here, other=0)), mask=here)


def settle(at: Tensor, row_at: Tensor, feature_at: Tensor, place_of_row: Tensor, feature_slot: Tensor, place: Tensor, slot: Tensor) -> None:
    """``DeviceDirectory.settle``."""
    grid: Any = (triton.cdiv(at.numel(), _BLOCK),)
    _settle[grid](at, row_at, feature_at, place_of_row, feature_slot, place, slot, at.numel(), BLOCK=_BLOCK)


@triton.jit(do_not_specialize=["count"])
def _exchange(  # type: ignore[no-untyped-def]
    upper, lower, slots, hosts, tables, first_slot, first_host, upper_start, lower_start, widths, count,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(0) * ROWS
    while first < count:
        at = first + tl.arange(0, ROWS)
        here = at < count
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
        first += tl.num_programs(0) * ROWS


def exchange(
    upper: Tensor, lower: Tensor, slots: Tensor, hosts: Tensor, tables: Tensor, firsts: tuple[Tensor, Tensor],
    upper_start: Tensor, lower_start: Tensor, widths: Tensor, widest: int, align: int,
) -> None:  # fmt: skip
    """Rows of one plane's layer change places. Starts and widths are in elements, by table; places through the group."""
    columns = min(triton.next_power_of_2(widest), EXCHANGE_ELEMENTS)
    rows = max(1, min(64, EXCHANGE_ELEMENTS // columns))
    grid: Any = (min(EXCHANGE_PROGRAMS, triton.cdiv(slots.numel(), rows)), triton.cdiv(widest, columns))
    _exchange[grid](
        upper, lower, slots, hosts, tables, *firsts, upper_start, lower_start, widths, slots.numel(),
        ALIGN=align, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
