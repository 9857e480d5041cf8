"""Kernels that make the queue of candidates of an attempt anew, where a table has too few: those of its slots that leave first.

Its launches:

    age         by slot: its bucket; how many are in each, by table
    threshold   by table: the buckets that are taken whole, and how much of the next one
    count_old   by block: how many are in those, and in that one
    scan_old    by table: where each block's begin
    queue       by slot: the queue
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_kernels import BEFORE, FIRST, PLACE, SEQ


@triton.jit
def _age(  # type: ignore[no-untyped-def]
    batch, decided, first_slot, stamp, window, bucket_out, bins,
    BUCKETS: tl.constexpr, FAR_BATCHES: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(decided) != 0:
        table = tl.program_id(0)
        start, end = tl.load(first_slot + table), tl.load(first_slot + table + 1)
        stays: tl.constexpr = BUCKETS + WINDOW + 1
        far: tl.constexpr = BUCKETS // 2
        mask: tl.constexpr = (1 << WINDOW) - 1
        counts = tl.zeros([2 * BUCKETS], tl.int32)
        block = tl.program_id(1).to(tl.int64)
        while start + block * BLOCK < end:
            place = start + block * BLOCK + tl.arange(0, BLOCK)
            here = place < end
            used, awaited = tl.load(stamp + PLACE * place, mask=here, other=0), tl.load(window + PLACE * place, mask=here, other=0)
            age = tl.load(batch + SEQ) - (used >> 1)
            age = tl.where(age < far, age, tl.minimum(far + (age - far) // FAR_BATCHES, BUCKETS - 1))
            shift = tl.load(batch + FIRST) % WINDOW
            turned = (awaited >> shift) | ((awaited << (WINDOW - shift)) & mask)
            lowest = (turned & (0 - turned)).to(tl.float32)  # a power of two: exact
            next_use = (lowest.to(tl.int32, bitcast=True) >> 23) - 127
            bucket = tl.where(awaited == 0, BUCKETS - age, (BUCKETS + WINDOW - next_use).to(tl.int64))
            bucket = tl.where(used < 2 * tl.load(batch + BEFORE), bucket, stays)
            bucket = tl.where(used < 0, 0, bucket)
            bucket = tl.where(here, bucket, stays).to(tl.int32)
            tl.store(bucket_out + place, bucket, mask=here)
            counts += tl.histogram(bucket, 2 * BUCKETS)
            block += tl.num_programs(1)
        b = tl.arange(0, 2 * BUCKETS)
        bin = bins + table.to(tl.int64) * (2 * BUCKETS) + b
        tl.atomic_add(bin, counts.to(tl.int64), mask=(counts > 0) & (b < stays), sem="relaxed")


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
def _sorted(first_slot, bucket_in, whole_in, block, STAYS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a block of this program's table: places, whether they are in buckets that are taken whole, and whether in the next one."""
    table = tl.program_id(0)
    start, end = tl.load(first_slot + table), tl.load(first_slot + table + 1)
    place = start + block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bucket, whole = tl.load(bucket_in + place, mask=place < end, other=STAYS), tl.load(whole_in + table)
    return place, bucket < whole, (bucket == whole) & (bucket < STAYS)


@triton.jit
def _count_old(  # type: ignore[no-untyped-def]
    decided, first_slot, bucket_in, whole_in, whole_counts, part_counts, blocks, STAYS: tl.constexpr, BLOCK: tl.constexpr
):
    if tl.load(decided) != 0:
        block = tl.program_id(1)
        while block < blocks:
            _place, whole, part = _sorted(first_slot, bucket_in, whole_in, block, STAYS, BLOCK)
            tl.store(whole_counts + tl.program_id(0) * blocks + block, tl.sum(whole.to(tl.int32)))
            tl.store(part_counts + tl.program_id(0) * blocks + block, tl.sum(part.to(tl.int32)))
            block += tl.num_programs(1)


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
    queue_window, blocks, STAYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(decided) != 0:
        table, block = tl.program_id(0), tl.program_id(1)
        while block < blocks:
            place, whole, part = _sorted(first_slot, bucket_in, whole_in, block, STAYS, BLOCK)
            rank = tl.load(part_starts + table * blocks + block) + tl.cumsum(part.to(tl.int32), 0) - 1
            taken = whole | (part & (rank < tl.load(rest_in + table)))
            q = tl.load(queue_start + table) + tl.load(taken_starts + table * blocks + block) + tl.cumsum(taken.to(tl.int32), 0) - 1
            tl.store(queue_place + q, place.to(tl.int32), mask=taken)
            tl.store(queue_stamp + q, tl.load(stamp + PLACE * place, mask=taken, other=0), mask=taken)
            tl.store(queue_window + q, tl.load(window + PLACE * place, mask=taken, other=0), mask=taken)
            block += tl.num_programs(1)
