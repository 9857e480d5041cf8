"""Kernels for a CUDA device: one attempt of ``DeviceDirectory``, announcements, and the exchange of ``Planes``, in Triton.

The tensor operations there run on a CPU and are the reference; these leave the same state (tests/test_device_kernels.py). They are for the
host's sake as much as the device's: a step of an all-HBM table takes less than a millisecond, of which a launch takes 10 to 20 µs. So
nothing in an attempt depends on the host once it has begun: what varies from batch to batch is in ``batch``, counts stay on the device,
grids are as large as they may have to be, and programs without work return. The sequence of launches is the same for every batch
(``device_fused`` replays it as a graph). Triton comes with PyTorch's CUDA wheels.

An attempt's launches, each of which needs what the one before has written everywhere:

    start       batch from the host; counters to zero
    look        by position: place and slot; stamps of hits; what misses. By position of a batch that is announced: windows
    claim       by position that misses: its claim, the smaller the earlier
    win         by position that misses: whether its claim won. By candidate: whether it is fresh. Both counted by block and table
    scan        one program: where each block's winners and candidates begin; whether a table has too few candidates
    age         if so, by slot: its bucket. Then by table the threshold; by block how many are below and at it; by table where each
                block's begin; by slot: the queue anew
    choose      by candidate: the k-th of a table is for its k-th miss. The summary, for the host
    commit      by winner: rows and places; or the claim taken back. The summary's seal
    settle      by position that misses: its slot
    exchange    records, in rounds, ordered by pages of host places: counted by page; where each page's begin; the order

A batch of a group whose rows all have slots of their own has four: start, use, tell (its summary) and seal.

``decided``: whether the queue is made anew, whether offsets are sound, then by table the first winner, and the first candidate.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
SLOT_BLOCK = 2048
CHUNK = 4096
BATCH = 16
_IDS, _OFFSETS, _OUT, _COUNT, _STRIDE, _SEQ, _BEFORE, _DIRTY, _ANNOUNCED, _FIRST = (tl.constexpr(i) for i in range(10))
_LATER_IDS, _LATER_OFFSETS, _LATER_COUNT, _LATER_STRIDE, _LATER_SHIFT = (tl.constexpr(i) for i in range(10, 15))
"""Of ``batch``: addresses, then numbers; and of a batch that is announced with it."""

_BATCH = tl.constexpr(BATCH)
_LOWEST = tl.constexpr(-(1 << 31))

EXCHANGE_ELEMENTS, EXCHANGE_PROGRAMS, EXCHANGE_WARPS = 8192, 22, 8
"""Of a tile, how many are under way, and the warps of each: few programs, so that what trains beside them keeps its multiprocessors, with
much on its way over the bus each. Of 22 combinations tried in a training step the best or nearly so (docs/gpu.md)."""

EXCHANGE_ROWS, EXCHANGE_COLUMNS = 256, 512
"""A tile has at most, so that narrow rows are shared between programs, and wide ones between tiles."""

PAGES_POW2 = 12
"""At most two to the power of this many *pages*: stretches of host places that are exchanged one after the other. With 5 GB of host
places one is 2 MB, as the pages of memory are: in any other order translations of addresses take most of the time."""


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


@triton.jit
def _ids_and_offsets(batch, IDS32: tl.constexpr, OFFSETS32: tl.constexpr, AT: tl.constexpr = _IDS):  # type: ignore[no-untyped-def]
    ids, offsets = tl.load(batch + AT), tl.load(batch + AT + 1)
    if IDS32:  # noqa: SIM108
        ids_at = ids.to(tl.pointer_type(tl.int32))
    else:
        ids_at = ids.to(tl.pointer_type(tl.int64))
    if OFFSETS32:  # noqa: SIM108
        offsets_at = offsets.to(tl.pointer_type(tl.int32))
    else:
        offsets_at = offsets.to(tl.pointer_type(tl.int64))
    return ids_at, offsets_at


@triton.jit
def _start(given, batch, counters, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counters + i, tl.zeros([BLOCK], tl.int64), mask=i < count)
    if tl.program_id(0) == 0:
        k = tl.arange(0, _BATCH)
        tl.store(batch + k, tl.load(given + k))


@triton.jit
def _set_windows(  # type: ignore[no-untyped-def]
    ids, offsets, stride, feature_row, feature_rows, place_of_row, window, count, shift, at,
    COMES: tl.constexpr, FEATURES: tl.constexpr, SEARCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the rows of positions ``at``, which are in places: the bit of their batch."""
    here = at < count
    feature = _feature_at(offsets, stride, at, FEATURES, SEARCH)
    id = tl.load(ids + at, mask=here, other=0).to(tl.int64)
    good = here & (id >= 0) & (id < tl.load(feature_rows + feature))
    place = tl.load(place_of_row + tl.load(feature_row + feature) + id, mask=good, other=-1).to(tl.int64)
    bit = tl.full([BLOCK], 1, tl.int64) << shift
    there = tl.maximum(place, 0)
    has = (tl.load(window + there, mask=place >= 0, other=0) & bit) != 0
    if COMES:
        tl.atomic_or(window + there, bit, mask=(place >= 0) & ~has)
    else:
        tl.atomic_and(window + there, ~bit, mask=(place >= 0) & has)


@triton.jit
def _look(  # type: ignore[no-untyped-def]
    batch, feature_row, feature_rows, feature_slot, feature_table, place_of_row, stamp, window, row_out, feature_out, missing_out,
    bad, missing_count, hits, slots, sink, blocks, FEATURES: tl.constexpr, SEARCH: tl.constexpr, IDS32: tl.constexpr,
    OFFSETS32: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(batch + _COUNT)
    if tl.program_id(0) >= blocks:
        at -= blocks * BLOCK
        later = tl.load(batch + _LATER_COUNT)
        if (tl.program_id(0) - blocks) * BLOCK < later:
            later_ids, later_offsets = _ids_and_offsets(batch, IDS32, OFFSETS32, _LATER_IDS)
            _set_windows(
                later_ids, later_offsets, tl.load(batch + _LATER_STRIDE), feature_row, feature_rows, place_of_row, window, later,
                tl.load(batch + _LATER_SHIFT), at, True, FEATURES, SEARCH, BLOCK,
            )  # fmt: skip
    elif tl.program_id(0).to(tl.int64) * BLOCK >= count:
        tl.store(missing_out + at, tl.zeros([BLOCK], tl.int8))
    else:
        ids, offsets = _ids_and_offsets(batch, IDS32, OFFSETS32)
        out = tl.load(batch + _OUT).to(tl.pointer_type(tl.int64))
        here = at < count
        now, dirty = tl.load(batch + _SEQ), tl.load(batch + _DIRTY)
        feature = _feature_at(offsets, tl.load(batch + _STRIDE), at, FEATURES, SEARCH)
        id = tl.load(ids + at, mask=here, other=0).to(tl.int64)
        good = here & (id >= 0) & (id < tl.load(feature_rows + feature))
        row = tl.load(feature_row + feature) + id
        place = tl.load(place_of_row + row, mask=good, other=-1).to(tl.int64)
        hit = good & (place >= 0) & (place < slots)
        missing = good & ((place < 0) | (place >= slots))
        tl.store(out + at, place, mask=here)
        tl.store(out + count + at, place - tl.load(feature_slot + feature), mask=here)
        tl.store(missing_out + at, missing.to(tl.int8))
        tl.store(row_out + at, row, mask=missing)
        tl.store(feature_out + at, feature.to(tl.int32), mask=missing)
        # One exchange a distinct slot, nearly: whoever finds the batch's stamp there leaves it.
        slot = tl.where(hit, place, sink)
        old = tl.load(stamp + slot, mask=hit, other=0)
        first = hit & ((old >> 1) != now)
        old = tl.atomic_xchg(stamp + slot, 2 * now + (dirty | (old & 1)), mask=first)
        first = first & ((old >> 1) != now)
        number = tl.load(batch + _ANNOUNCED)
        if number > 0:
            bit = tl.full([BLOCK], 1, tl.int64) << (number % WINDOW)
            has = good & (place >= 0)
            awaited = has & ((tl.load(window + tl.maximum(place, 0), mask=has, other=0) & bit) != 0)
            tl.atomic_and(window + tl.maximum(place, 0), ~bit, mask=awaited)
        _add_by_table(hits, tl.load(feature_table + feature), first.to(tl.int64), here)
        bad_here, missing_here = tl.sum((here & ~good).to(tl.int64)), tl.sum(missing.to(tl.int64))
        if bad_here > 0:
            tl.atomic_add(bad, bad_here)
        if missing_here > 0:
            tl.atomic_add(missing_count, missing_here)


@triton.jit(do_not_specialize=["stride", "count", "shift"])
def _announce(  # type: ignore[no-untyped-def]
    ids, offsets, stride, feature_row, feature_rows, place_of_row, window, count, shift,
    COMES: tl.constexpr, FEATURES: tl.constexpr, SEARCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _set_windows(ids, offsets, stride, feature_row, feature_rows, place_of_row, window, count, shift, at, COMES, FEATURES, SEARCH, BLOCK)


def announce(
    ids: Tensor, offsets: Tensor, stride: int, of_feature: tuple[Tensor, ...], place_of_row: Tensor, window: Tensor, shift: int, comes: bool
) -> None:
    """``DeviceDirectory.announce``; ``shift``: the number of the bit."""
    features = of_feature[0].numel()
    _announce[(max(1, triton.cdiv(ids.numel(), BLOCK)),)](
        ids, offsets, stride, of_feature[0], of_feature[1], place_of_row, window, ids.numel(), shift,
        COMES=comes, FEATURES=features, SEARCH=max(1, features.bit_length()), BLOCK=BLOCK,
    )  # fmt: skip


@triton.jit
def _claim(missing_in, row_in, place_of_row, missing_count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    if tl.load(missing_count) > 0:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        missing = tl.load(missing_in + at) != 0
        row = tl.load(row_in + at, mask=missing, other=0)
        tl.atomic_min(place_of_row + row, at + _LOWEST, mask=missing)


@triton.jit
def _win(  # type: ignore[no-untyped-def]
    batch, missing_in, row_in, feature_in, feature_table, place_of_row, missing_count, wins_out, block_wins, misses, below,
    queue_place, queue_stamp, queue_window, queue_start, queue_fill, stamp, window, fresh_out, block_fresh, available,
    blocks, queue_blocks, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(missing_count) > 0:
        i = tl.arange(0, BLOCK)
        if tl.program_id(0) < blocks:
            at = tl.program_id(0) * BLOCK + i
            missing = tl.load(missing_in + at) != 0
            row = tl.load(row_in + at, mask=missing, other=0)
            won = missing & (tl.load(place_of_row + row, mask=missing, other=0) == at + _LOWEST)
            tl.store(wins_out + at, won.to(tl.int8))
            won_here = tl.sum(won.to(tl.int32))
            tl.store(block_wins + tl.program_id(0), won_here)
            if won_here > 0:
                out = tl.load(batch + _OUT).to(tl.pointer_type(tl.int64))
                table = tl.load(feature_table + tl.load(feature_in + at, mask=won, other=0), mask=won, other=0)
                is_below = won & (tl.load(out + at, mask=won, other=0) < 0)
                _add_by_table(misses, table, won.to(tl.int64), won)
                _add_by_table(below, table, is_below.to(tl.int64), won)
        else:
            block = tl.program_id(0) - blocks
            table = block // queue_blocks
            at = (block % queue_blocks) * BLOCK + i
            here = at < tl.load(queue_fill + table)
            q = tl.load(queue_start + table) + at
            place = tl.load(queue_place + q, mask=here, other=0)
            fresh = here & (tl.load(stamp + place, mask=here, other=0) == tl.load(queue_stamp + q, mask=here, other=0))
            fresh = fresh & (tl.load(window + place, mask=here, other=0) == tl.load(queue_window + q, mask=here, other=0))
            tl.store(fresh_out + block.to(tl.int64) * BLOCK + i, fresh.to(tl.int8))
            fresh_here = tl.sum(fresh.to(tl.int32))
            tl.store(block_fresh + block, fresh_here)
            if fresh_here > 0:
                tl.atomic_add(available + table, fresh_here.to(tl.int64))


@triton.jit
def _scan_blocks(counts, starts, size, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    carry = tl.full([], 0, tl.int32)
    first = 0
    while first < size:
        i = first + tl.arange(0, CHUNK)
        c = tl.load(counts + i, mask=i < size, other=0)
        tl.store(starts + i, carry + tl.cumsum(c, 0) - c, mask=i < size)
        carry += tl.sum(c)
        first += CHUNK


@triton.jit
def _scan(  # type: ignore[no-untyped-def]
    batch, bad, missing_count, block_wins, win_starts, block_fresh, fresh_starts, misses, available, decided, blocks, fresh_blocks,
    tables, FEATURES: tl.constexpr, FEATURES_POW2: tl.constexpr, TABLES_POW2: tl.constexpr, IDS32: tl.constexpr,
    OFFSETS32: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    _ids, offsets = _ids_and_offsets(batch, IDS32, OFFSETS32)
    f = tl.arange(0, FEATURES_POW2)
    stride = tl.load(batch + _STRIDE)
    begin = tl.load(offsets + f * stride, mask=f < FEATURES, other=0).to(tl.int64)
    end = tl.load(offsets + (f + 1) * stride, mask=f < FEATURES, other=0).to(tl.int64)
    broken = tl.sum(((f < FEATURES) & (end < begin)).to(tl.int32))
    broken += (tl.load(offsets).to(tl.int64) != 0).to(tl.int32)
    broken += (tl.load(offsets + FEATURES * stride).to(tl.int64) != tl.load(batch + _COUNT)).to(tl.int32)
    refills = tl.full([], 0, tl.int32)
    if tl.load(missing_count) > 0:
        _scan_blocks(block_wins, win_starts, blocks, CHUNK)
        _scan_blocks(block_fresh, fresh_starts, fresh_blocks, CHUNK)
        t = tl.arange(0, TABLES_POW2)
        wanted, have = tl.load(misses + t, mask=t < tables, other=0), tl.load(available + t, mask=t < tables, other=0)
        tl.store(decided + 2 + t, tl.cumsum(wanted, 0) - wanted, mask=t < tables)
        tl.store(decided + 2 + tables + t, tl.cumsum(have, 0) - have, mask=t < tables)
        if (tl.load(bad) == 0) & (broken == 0):  # a batch that is refused changes no queue
            refills = tl.max((have < wanted).to(tl.int32))
    tl.store(decided, refills.to(tl.int64))
    tl.store(decided + 1, (broken == 0).to(tl.int64))


@triton.jit
def _age(  # type: ignore[no-untyped-def]
    batch, decided, first_slot, stamp, window, bucket_out, bins,
    BUCKETS: tl.constexpr, FAR_BATCHES: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(decided) != 0:
        table = tl.program_id(0)
        start, end = tl.load(first_slot + table), tl.load(first_slot + table + 1)
        place = start + tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        here = place < end
        if start + tl.program_id(1).to(tl.int64) * BLOCK < end:
            stays: tl.constexpr = BUCKETS + WINDOW + 1
            used, awaited = tl.load(stamp + place, mask=here, other=0), tl.load(window + place, mask=here, other=0)
            age = tl.load(batch + _SEQ) - (used >> 1)
            far: tl.constexpr = BUCKETS // 2
            age = tl.where(age < far, age, tl.minimum(far + (age - far) // FAR_BATCHES, BUCKETS - 1))
            shift = tl.load(batch + _FIRST) % WINDOW
            mask: tl.constexpr = (1 << WINDOW) - 1
            turned = (awaited >> shift) | ((awaited << (WINDOW - shift)) & mask)
            lowest = (turned & (0 - turned)).to(tl.float32)  # a power of two: exact
            next_use = (lowest.to(tl.int32, bitcast=True) >> 23) - 127
            bucket = tl.where(awaited == 0, BUCKETS - age, (BUCKETS + WINDOW - next_use).to(tl.int64))
            bucket = tl.where(used < 2 * tl.load(batch + _BEFORE), bucket, stays)
            bucket = tl.where(used < 0, 0, bucket)
            bucket = tl.where(here, bucket, stays).to(tl.int32)
            tl.store(bucket_out + place, bucket, mask=here)
            counts = tl.histogram(bucket, 2 * BUCKETS)
            b = tl.arange(0, 2 * BUCKETS)
            tl.atomic_add(bins + table.to(tl.int64) * (2 * BUCKETS) + b, counts.to(tl.int64), mask=(counts > 0) & (b < stays))


@triton.jit
def _threshold(  # type: ignore[no-untyped-def]
    decided, bins, misses, first_slot, queue_start, whole_out, rest_out, QUEUE_SHARE: tl.constexpr, STAYS: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    if tl.load(decided) != 0:
        table = tl.program_id(0).to(tl.int64)
        size = tl.load(first_slot + table + 1) - tl.load(first_slot + table)
        room = tl.load(queue_start + table + 1) - tl.load(queue_start + table)
        goal = tl.minimum(tl.maximum(tl.load(misses + table), tl.minimum(size, size // QUEUE_SHARE + 1)), room)
        b = tl.arange(0, BINS)
        up_to = tl.cumsum(tl.load(bins + table * BINS + b), 0)
        fits = (up_to <= goal) & (b < STAYS)
        tl.store(whole_out + table, tl.sum(fits.to(tl.int32)))
        tl.store(rest_out + table, goal - tl.max(tl.where(fits, up_to, 0)))


@triton.jit
def _count_old(  # type: ignore[no-untyped-def]
    decided, first_slot, bucket_in, whole_in, whole_counts, part_counts, STAYS: tl.constexpr, BLOCK: tl.constexpr
):
    if tl.load(decided) != 0:
        table = tl.program_id(0)
        start, end = tl.load(first_slot + table), tl.load(first_slot + table + 1)
        place = start + tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        bucket = tl.load(bucket_in + place, mask=place < end, other=STAYS)
        whole = tl.load(whole_in + table)
        block = table * tl.num_programs(1) + tl.program_id(1)
        tl.store(whole_counts + block, tl.sum((bucket < whole).to(tl.int32)))
        tl.store(part_counts + block, tl.sum(((bucket == whole) & (bucket < STAYS)).to(tl.int32)))


@triton.jit
def _scan_old(  # type: ignore[no-untyped-def]
    decided, whole_counts, part_counts, rest_in, taken_starts, part_starts, queue_fill, available, blocks, CHUNK: tl.constexpr
):
    if tl.load(decided) != 0:
        table = tl.program_id(0)
        rest = tl.load(rest_in + table).to(tl.int32)
        taken_before, part_before = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
        first = 0
        while first < blocks:
            i = first + tl.arange(0, CHUNK)
            at = table * blocks + i
            whole, part = tl.load(whole_counts + at, mask=i < blocks, other=0), tl.load(part_counts + at, mask=i < blocks, other=0)
            part_start = part_before + tl.cumsum(part, 0) - part
            taken = whole + tl.minimum(tl.maximum(rest - part_start, 0), part)
            tl.store(part_starts + at, part_start, mask=i < blocks)
            tl.store(taken_starts + at, taken_before + tl.cumsum(taken, 0) - taken, mask=i < blocks)
            taken_before += tl.sum(taken)
            part_before += tl.sum(part)
            first += CHUNK
        tl.store(queue_fill + table, taken_before.to(tl.int64))
        tl.store(available + table, taken_before.to(tl.int64))


@triton.jit
def _queue(  # type: ignore[no-untyped-def]
    decided, first_slot, bucket_in, whole_in, rest_in, taken_starts, part_starts, queue_start, stamp, window, queue_place, queue_stamp,
    queue_window, STAYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(decided) != 0:
        table = tl.program_id(0)
        start, end = tl.load(first_slot + table), tl.load(first_slot + table + 1)
        place = start + tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        bucket = tl.load(bucket_in + place, mask=place < end, other=STAYS)
        whole = tl.load(whole_in + table)
        block = table * tl.num_programs(1) + tl.program_id(1)
        part = (bucket == whole) & (bucket < STAYS)
        rank = tl.load(part_starts + block) + tl.cumsum(part.to(tl.int32), 0) - 1
        taken = (bucket < whole) | (part & (rank < tl.load(rest_in + table)))
        q = tl.load(queue_start + table) + tl.load(taken_starts + block) + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(queue_place + q, place.to(tl.int32), mask=taken)
        tl.store(queue_stamp + q, tl.load(stamp + place, mask=taken, other=0), mask=taken)
        tl.store(queue_window + q, tl.load(window + place, mask=taken, other=0), mask=taken)


@triton.jit
def _fits(bad, decided, misses, below, available, tables, TABLES_POW2: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether every row gets a slot."""
    t = tl.arange(0, TABLES_POW2)
    wanted, have = tl.load(misses + t, mask=t < tables, other=0), tl.load(available + t, mask=t < tables, other=0)
    short = tl.sum((have < wanted).to(tl.int64)) + tl.sum(tl.load(below + t, mask=t < tables, other=0))
    return (tl.load(bad) == 0) & (tl.load(decided + 1) != 0) & (short == 0)


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    batch, bad, missing_count, hits, decided, misses, below, available, fresh_in, fresh_starts, queue_place, queue_start, queue_fill,
    chosen, summary, queue_blocks, tables, FEATURES: tl.constexpr, FEATURES_POW2: tl.constexpr, TABLES_POW2: tl.constexpr,
    OFFSETS32: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    fits = _fits(bad, decided, misses, below, available, tables, TABLES_POW2)
    if tl.program_id(0) == 0:
        t = tl.arange(0, TABLES_POW2)
        tl.store(summary, tl.load(bad))
        tl.store(summary + 1, fits.to(tl.int64))
        tl.store(summary + 2 + t, tl.load(hits + t, mask=t < tables, other=0), mask=t < tables)
        tl.store(summary + 2 + tables + t, tl.load(misses + t, mask=t < tables, other=0), mask=t < tables)
        tl.store(summary + 2 + 2 * tables + t, tl.load(below + t, mask=t < tables, other=0), mask=t < tables)
        _ids, offsets = _ids_and_offsets(batch, True, OFFSETS32)
        f = tl.arange(0, FEATURES_POW2)
        begins = tl.load(offsets + f * tl.load(batch + _STRIDE), mask=f <= FEATURES, other=0).to(tl.int64)
        tl.store(summary + 2 + 3 * tables + f, begins, mask=f <= FEATURES)
    if fits & (tl.load(missing_count) > 0):
        table = tl.program_id(0) // queue_blocks
        i = tl.arange(0, BLOCK)
        at = (tl.program_id(0) % queue_blocks) * BLOCK + i
        here = at < tl.load(queue_fill + table)
        remade = tl.load(decided) != 0
        fresh = here & (remade | (tl.load(fresh_in + tl.program_id(0).to(tl.int64) * BLOCK + i) != 0))
        before = (tl.load(fresh_starts + tl.program_id(0)) - tl.load(decided + 2 + tables + table)).to(tl.int32)
        rank = tl.where(remade, at, before + tl.cumsum(fresh.to(tl.int32), 0) - 1)
        taken = fresh & (rank < tl.load(misses + table))
        place = tl.load(queue_place + tl.load(queue_start + table) + at, mask=taken, other=0)
        tl.store(chosen + tl.load(decided + 2 + table) + rank, place, mask=taken)


@triton.jit
def _commit(  # type: ignore[no-untyped-def]
    batch, bad, missing_count, decided, misses, below, available, wins_in, win_starts, row_in, feature_in, feature_table, chosen,
    first_row, place_of_row, row_of_place, stamp, window, evictions, write_backs, slots_out, hosts_out, tables_out, count_out, seal,
    tables, TABLES_POW2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    fits = _fits(bad, decided, misses, below, available, tables, TABLES_POW2)
    missing = tl.load(missing_count)
    if tl.program_id(0) == 0:
        t = tl.arange(0, TABLES_POW2)
        total = tl.sum(tl.load(misses + t, mask=t < tables, other=0))
        tl.store(count_out, tl.where(fits & (missing > 0), total, 0))
        tl.store(seal, tl.load(batch + _SEQ))  # behind the summary, which an earlier launch has written
    if missing > 0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        won = tl.load(wins_in + at) != 0
        row = tl.load(row_in + at, mask=won, other=0)
        out = tl.load(batch + _OUT).to(tl.pointer_type(tl.int64))
        host = tl.load(out + at, mask=won, other=0)
        if fits:
            i = tl.load(win_starts + tl.program_id(0)) + tl.cumsum(won.to(tl.int32), 0) - 1
            table = tl.load(feature_table + tl.load(feature_in + at, mask=won, other=0), mask=won, other=0)
            slot = tl.load(chosen + i, mask=won, other=0).to(tl.int64)
            first = tl.load(first_row + table)
            now, dirty = 2 * tl.load(batch + _SEQ), tl.load(batch + _DIRTY)
            leaves, left = tl.load(row_of_place + slot, mask=won, other=-1), tl.load(stamp + slot, mask=won, other=0)
            held = won & (leaves >= 0)
            was_dirty = tl.load(stamp + host, mask=won, other=0) & 1
            of_slot, of_host = tl.load(window + slot, mask=won, other=0), tl.load(window + host, mask=won, other=0)
            tl.store(place_of_row + row, slot.to(tl.int32), mask=won)
            tl.store(place_of_row + first + leaves, host.to(tl.int32), mask=held)
            tl.store(row_of_place + slot, (row - first).to(tl.int32), mask=won)
            tl.store(row_of_place + host, leaves, mask=won)
            tl.store(stamp + slot, now + (dirty | was_dirty), mask=won)
            tl.store(stamp + host, tl.where(held, now + (left & 1), -1), mask=won)
            tl.store(window + slot, of_host, mask=won)
            tl.store(window + host, of_slot, mask=won)
            tl.store(slots_out + i, slot.to(tl.int32), mask=won)
            tl.store(hosts_out + i, host.to(tl.int32), mask=won)
            tl.store(tables_out + i, table.to(tl.int32), mask=won)
            _add_by_table(evictions, table, held.to(tl.int64), won)
            _add_by_table(write_backs, table, tl.where(held, left & 1, 0), won)
        else:
            tl.store(place_of_row + row, host.to(tl.int32), mask=won)


@triton.jit
def _settle(batch, count_in, missing_in, row_in, feature_in, feature_slot, place_of_row, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    if tl.load(count_in) > 0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        missing = tl.load(missing_in + at) != 0
        place = tl.load(place_of_row + tl.load(row_in + at, mask=missing, other=0), mask=missing, other=0).to(tl.int64)
        out = tl.load(batch + _OUT).to(tl.pointer_type(tl.int64))
        tl.store(out + at, place, mask=missing)
        first = tl.load(feature_slot + tl.load(feature_in + at, mask=missing, other=0), mask=missing, other=0)
        tl.store(out + tl.load(batch + _COUNT) + at, place - first, mask=missing)


@triton.jit
def _use(  # type: ignore[no-untyped-def]
    batch, counters, feature_rows, feature_slot, feature_table, stamp, FEATURES: tl.constexpr, SEARCH: tl.constexpr, IDS32: tl.constexpr,
    OFFSETS32: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(batch + _COUNT)
    if tl.program_id(0).to(tl.int64) * BLOCK < count:
        ids, offsets = _ids_and_offsets(batch, IDS32, OFFSETS32)
        here = at < count
        now, dirty = tl.load(batch + _SEQ), tl.load(batch + _DIRTY)
        feature = _feature_at(offsets, tl.load(batch + _STRIDE), at, FEATURES, SEARCH)
        id = tl.load(ids + at, mask=here, other=0).to(tl.int64)
        good = here & (id >= 0) & (id < tl.load(feature_rows + feature))
        slot = tl.load(feature_slot + feature) + id
        old = tl.load(stamp + slot, mask=good, other=0)
        first = good & ((old >> 1) != now)  # of most rows that are in a batch often it is stamped already
        old = tl.atomic_xchg(stamp + slot, 2 * now + (dirty | (old & 1)), mask=first)
        first = first & ((old >> 1) != now)
        _add_by_table(counters + 1, tl.load(feature_table + feature), first.to(tl.int64), here)
        bad_here = tl.sum((here & ~good).to(tl.int64))
        if bad_here > 0:
            tl.atomic_add(counters, bad_here)


@triton.jit
def _tell(  # type: ignore[no-untyped-def]
    batch, counters, summary, tables, FEATURES: tl.constexpr, FEATURES_POW2: tl.constexpr, TABLES_POW2: tl.constexpr,
    OFFSETS32: tl.constexpr,
):  # fmt: skip
    _ids, offsets = _ids_and_offsets(batch, True, OFFSETS32)
    f, t, stride = tl.arange(0, FEATURES_POW2), tl.arange(0, TABLES_POW2), tl.load(batch + _STRIDE)
    begin = tl.load(offsets + f * stride, mask=f <= FEATURES, other=0).to(tl.int64)
    end = tl.load(offsets + (f + 1) * stride, mask=f < FEATURES, other=0).to(tl.int64)
    broken = tl.sum(((f < FEATURES) & (end < begin)).to(tl.int32))
    broken += (tl.load(offsets).to(tl.int64) != 0).to(tl.int32)
    broken += (tl.load(offsets + FEATURES * stride).to(tl.int64) != tl.load(batch + _COUNT)).to(tl.int32)
    bad = tl.load(counters)
    tl.store(summary, bad)
    tl.store(summary + 1, ((bad == 0) & (broken == 0)).to(tl.int64))
    tl.store(summary + 2 + t, tl.load(counters + 1 + t, mask=t < tables, other=0), mask=t < tables)
    tl.store(summary + 2 + tables + f, begin, mask=f <= FEATURES)


@triton.jit
def _seal(batch, seal):
    tl.store(seal, tl.load(batch + _SEQ))  # behind the summary, which an earlier launch has written


def use(
    given: Tensor, batch: Tensor, counters: Tensor, summary: Tensor, stamp: Tensor, feature_rows: Tensor, feature_slot: Tensor,
    feature_table: Tensor, tables: int, capacity: int, ids32: bool, offsets32: bool,
) -> None:  # fmt: skip
    """``Stamps.use`` of a batch of up to ``capacity`` ids."""
    features = feature_rows.numel()
    _start[(triton.cdiv(counters.numel(), 2048),)](given, batch, counters, counters.numel(), BLOCK=2048)
    _use[(triton.cdiv(capacity, BLOCK),)](
        batch, counters, feature_rows, feature_slot, feature_table, stamp, FEATURES=features, SEARCH=max(1, features.bit_length()),
        IDS32=ids32, OFFSETS32=offsets32, BLOCK=BLOCK,
    )  # fmt: skip
    pow2 = {"FEATURES_POW2": triton.next_power_of_2(features + 1), "TABLES_POW2": triton.next_power_of_2(tables)}
    _tell[(1,)](batch, counters, summary, tables, FEATURES=features, OFFSETS32=offsets32, **pow2)
    _seal[(1,)](batch, summary[-1:])


@triton.jit
def _count_pages(hosts, first_host, count_in, counts, rank_out, SHIFT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < tl.load(count_in)
    page = (tl.load(hosts + at, mask=here, other=0) - tl.load(first_host)) >> SHIFT
    tl.store(rank_out + at, tl.atomic_add(counts + page, 1, mask=here), mask=here)


@triton.jit
def _start_pages(counts, starts, pages, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    _scan_blocks(counts, starts, pages, CHUNK)


@triton.jit
def _order_pages(  # type: ignore[no-untyped-def]
    hosts, first_host, count_in, starts, rank_in, order_out, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < tl.load(count_in)
    page = (tl.load(hosts + at, mask=here, other=0) - tl.load(first_host)) >> SHIFT
    rank = tl.load(rank_in + at, mask=here, other=0)
    tl.store(order_out + tl.load(starts + page, mask=here, other=0) + rank, at, mask=here)


def by_page(hosts: Tensor, count: Tensor, first_host: Tensor, host_places: int) -> Tensor:
    """The first ``count`` of these host places in the order of their pages; within a page in any. Shapes: (n,) → (n,) int32."""
    shift, blocks = max(0, host_places.bit_length() - PAGES_POW2), triton.cdiv(hosts.numel(), BLOCK)
    pages = (host_places >> shift) + 1
    counts = hosts.new_zeros(pages, dtype=torch.int32)
    starts, rank, order = (hosts.new_empty(n, dtype=torch.int32) for n in (pages, hosts.numel(), hosts.numel()))
    _count_pages[(blocks,)](hosts, first_host, count, counts, rank, SHIFT=shift, BLOCK=BLOCK)
    _start_pages[(1,)](counts, starts, pages, CHUNK=CHUNK)
    _order_pages[(blocks,)](hosts, first_host, count, starts, rank, order, SHIFT=shift, BLOCK=BLOCK)
    return order


@triton.jit
def _exchange(  # type: ignore[no-untyped-def]
    upper, lower, order, slots, hosts, tables, first_slot, first_host, upper_start, lower_start, widths, count_in,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    count = tl.load(count_in).to(tl.int32)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(0) * ROWS
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
        first += tl.num_programs(0) * ROWS


def exchange(
    upper: Tensor, lower: Tensor, order: Tensor, slots: Tensor, hosts: Tensor, tables: Tensor, count: Tensor, firsts: tuple[Tensor, Tensor],
    upper_start: Tensor, lower_start: Tensor, widths: Tensor, widest: int, align: int,
) -> None:  # fmt: skip
    """The first ``count`` rows of one plane's layer change places. Starts and widths are in elements, by table; ``order``: of the rows."""
    columns = min(triton.next_power_of_2(widest), EXCHANGE_COLUMNS)
    rows = max(1, min(EXCHANGE_ROWS, EXCHANGE_ELEMENTS // columns))
    grid: Any = (min(EXCHANGE_PROGRAMS, triton.cdiv(slots.numel(), rows)), triton.cdiv(widest, columns))
    _exchange[grid](
        upper, lower, order, slots, hosts, tables, *firsts, upper_start, lower_start, widths, count,
        ALIGN=align, ROWS=rows, COLUMNS=columns, num_warps=EXCHANGE_WARPS,
    )  # fmt: skip
