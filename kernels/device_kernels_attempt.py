"""Kernels of one attempt of ``DeviceDirectory``, and of announcements. An attempt's launches, each of which needs what the one before has
written everywhere:

    start       batch from the host; counters to zero
    look        by position: place and slot; stamps of hits; the list of what misses. By position of a batch that is announced: windows
    claim       by position that misses: its claim, the smaller the earlier
    win         by position that misses: whether its claim won. By candidate: whether it is fresh. Both counted by block and table
    scan        one program: where each block's winners and candidates begin; whether a table has too few candidates
    age … queue if so, the queue anew (``device_kernels_queue``)
    choose      by candidate: the k-th of a table is for its k-th miss. By position: the list of winners. The summary, for the host
    commit      by winner: rows and places; or the claim taken back. The summary's seal
    settle      by position that misses: its slot

Few positions miss: what they need is read from the batch again. Their list is in any order, on which nothing depends that is made of it.

``decided``: whether the queue is made anew, whether offsets are sound, then by table the first winner, and the first candidate, and
how many winners there are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device_kernels import (
    ANNOUNCED,
    COUNT,
    DIRTY,
    LATER_COUNT,
    LATER_IDS,
    LATER_SHIFT,
    LATER_STRIDE,
    OUT,
    PLACE,
    SEQ,
    STRIDE,
    add_by_table,
    feature_at,
    id_at,
    ids_and_offsets,
    scan_blocks,
    stamp_used,
)
from .device_sequences import BLOCK

_LOWEST = tl.constexpr(-(1 << 31))


@triton.jit
def _set_windows(  # type: ignore[no-untyped-def]
    ids, offsets, stride, feature_row, feature_rows, place_of_row, window, count, shift, at,
    COMES: tl.constexpr, FEATURES: tl.constexpr, SEARCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the rows of positions ``at``, which are in places: the bit of their batch."""
    feature, id, good = id_at(ids, offsets, stride, feature_rows, at, at < count, FEATURES, SEARCH)
    place = tl.load(place_of_row + tl.load(feature_row + feature) + id, mask=good, other=-1).to(tl.int64)
    bit = tl.full([BLOCK], 1, tl.int64) << shift
    there = tl.maximum(place, 0)
    has = (tl.load(window + PLACE * there, mask=place >= 0, other=0, cache_modifier=".cg") & bit) != 0
    if COMES:
        tl.atomic_or(window + PLACE * there, bit, mask=(place >= 0) & ~has, sem="relaxed")
    else:
        tl.atomic_and(window + PLACE * there, ~bit, mask=(place >= 0) & has, sem="relaxed")


@triton.jit
def _look(  # type: ignore[no-untyped-def]
    batch, feature_row, feature_rows, feature_slot, feature_table, place_of_row, stamp, window, missing_out, wins_out, block_wins, bad,
    missing_count, hits, slots, sink, FEATURES: tl.constexpr, SEARCH: tl.constexpr, IDS32: tl.constexpr, OFFSETS32: tl.constexpr,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    half = tl.num_programs(0) // 2
    if tl.program_id(0) < half:
        block = tl.program_id(0).to(tl.int64)
        while block * BLOCK < tl.load(batch + COUNT):
            _look_up(
                batch, feature_row, feature_rows, feature_slot, feature_table, place_of_row, stamp, window, missing_out, wins_out,
                block_wins, bad, missing_count, hits, slots, sink, block, FEATURES, SEARCH, IDS32, OFFSETS32, BLOCK, WINDOW,
            )  # fmt: skip
            block += half
    else:
        ids, offsets = ids_and_offsets(batch, IDS32, OFFSETS32, LATER_IDS)
        later, block = tl.load(batch + LATER_COUNT), (tl.program_id(0) - half).to(tl.int64)
        while block * BLOCK < later:
            _set_windows(
                ids, offsets, tl.load(batch + LATER_STRIDE), feature_row, feature_rows, place_of_row, window, later,
                tl.load(batch + LATER_SHIFT), block * BLOCK + tl.arange(0, BLOCK), True, FEATURES, SEARCH, BLOCK,
            )  # fmt: skip
            block += half


@triton.jit
def _look_up(  # type: ignore[no-untyped-def]
    batch, feature_row, feature_rows, feature_slot, feature_table, place_of_row, stamp, window, missing_out, wins_out, block_wins, bad,
    missing_count, hits, slots, sink, block, FEATURES: tl.constexpr, SEARCH: tl.constexpr, IDS32: tl.constexpr, OFFSETS32: tl.constexpr,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    ids, offsets = ids_and_offsets(batch, IDS32, OFFSETS32)
    out = tl.load(batch + OUT).to(tl.pointer_type(tl.int64))
    count, number = tl.load(batch + COUNT), tl.load(batch + ANNOUNCED)
    at = block * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    feature, id, good = id_at(ids, offsets, tl.load(batch + STRIDE), feature_rows, at, here, FEATURES, SEARCH)
    row = tl.load(feature_row + feature) + id
    place = tl.load(place_of_row + row, mask=good, other=-1).to(tl.int64)
    hit = good & (place >= 0) & (place < slots)
    missing = good & ((place < 0) | (place >= slots))
    tl.store(out + at, place, mask=here)
    tl.store(out + count + at, place - tl.load(feature_slot + feature), mask=here)
    tl.store(wins_out + at, tl.zeros([BLOCK], tl.int8))  # so far
    tl.store(block_wins + block, 0)
    first = stamp_used(stamp + PLACE * tl.where(hit, place, sink), tl.load(batch + SEQ), tl.load(batch + DIRTY), hit)
    if number > 0:
        bit = tl.full([BLOCK], 1, tl.int64) << (number % WINDOW)
        comes = first | (missing & (place >= 0))  # who is the first to use a slot clears its bit, for all others
        tl.atomic_and(window + PLACE * tl.maximum(place, 0), ~bit, mask=comes, sem="relaxed")
    add_by_table(hits, tl.load(feature_table + feature), first.to(tl.int64), here)
    bad_here, missing_here = tl.sum((here & ~good).to(tl.int64)), tl.sum(missing.to(tl.int64))
    if bad_here > 0:
        tl.atomic_add(bad, bad_here, sem="relaxed")
    if missing_here > 0:
        i = tl.atomic_add(missing_count, missing_here, sem="relaxed") + tl.cumsum(missing.to(tl.int32), 0) - 1
        tl.store(missing_out + i, at.to(tl.int32), mask=missing)


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
def _rows_at(  # type: ignore[no-untyped-def]
    batch, feature_row, at, here, FEATURES: tl.constexpr, SEARCH: tl.constexpr, IDS32: tl.constexpr, OFFSETS32: tl.constexpr
):
    """Of positions whose ids are known to be rows: their features, and rows through the group."""
    ids, offsets = ids_and_offsets(batch, IDS32, OFFSETS32)
    feature = feature_at(offsets, tl.load(batch + STRIDE), at, FEATURES, SEARCH)
    return feature, tl.load(feature_row + feature) + tl.load(ids + at, mask=here, other=0).to(tl.int64)


@triton.jit
def _claim(  # type: ignore[no-untyped-def]
    batch, missing_in, missing_count, feature_row, place_of_row, FEATURES: tl.constexpr, SEARCH: tl.constexpr, IDS32: tl.constexpr,
    OFFSETS32: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    count, block = tl.load(missing_count), tl.program_id(0).to(tl.int64)
    while block * BLOCK < count:
        here = block * BLOCK + tl.arange(0, BLOCK) < count
        at = tl.load(missing_in + block * BLOCK + tl.arange(0, BLOCK), mask=here, other=0)
        _feature, row = _rows_at(batch, feature_row, at, here, FEATURES, SEARCH, IDS32, OFFSETS32)
        tl.atomic_min(place_of_row + row, at + _LOWEST, mask=here, sem="relaxed")
        block += tl.num_programs(0)


@triton.jit
def _queue_blocks(queue_fill, tables, TABLES_POW2: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the fullest queue: each is looked at as if it had so many."""
    t = tl.arange(0, TABLES_POW2)
    return tl.cdiv(tl.max(tl.load(queue_fill + t, mask=t < tables, other=0)), BLOCK).to(tl.int32)


@triton.jit
def _win(  # type: ignore[no-untyped-def]
    batch, missing_in, missing_count, feature_row, feature_table, place_of_row, wins_out, block_wins, misses, below, queue_place,
    queue_stamp, queue_window, queue_start, queue_fill, stamp, window, fresh_out, block_fresh, available, tables,
    TABLES_POW2: tl.constexpr, FEATURES: tl.constexpr, SEARCH: tl.constexpr, IDS32: tl.constexpr, OFFSETS32: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    count, block = tl.load(missing_count), tl.program_id(0).to(tl.int64)
    if count > 0:
        i = tl.arange(0, BLOCK)
        out = tl.load(batch + OUT).to(tl.pointer_type(tl.int64))
        while block * BLOCK < count:
            here = block * BLOCK + i < count
            at = tl.load(missing_in + block * BLOCK + i, mask=here, other=0)
            feature, row = _rows_at(batch, feature_row, at, here, FEATURES, SEARCH, IDS32, OFFSETS32)
            won = here & (tl.load(place_of_row + row, mask=here, other=0) == at + _LOWEST)
            is_below = won & (tl.load(out + at, mask=won, other=0) < 0)
            table = tl.load(feature_table + feature)
            tl.store(wins_out + at, tl.full([BLOCK], 1, tl.int8), mask=won)
            tl.atomic_add(block_wins + at // BLOCK, 1, mask=won, sem="relaxed")
            add_by_table(misses, table, won.to(tl.int64), won)
            add_by_table(below, table, is_below.to(tl.int64), won)
            block += tl.num_programs(0)
        queue_blocks = _queue_blocks(queue_fill, tables, TABLES_POW2, BLOCK)
        block = tl.program_id(0).to(tl.int64)
        while block < tables * queue_blocks:
            table, at = block // queue_blocks, (block % queue_blocks) * BLOCK + i
            here = at < tl.load(queue_fill + table)
            q = tl.load(queue_start + table) + at
            place = tl.load(queue_place + q, mask=here, other=0).to(tl.int64)
            fresh = here & (tl.load(stamp + PLACE * place, mask=here, other=0) == tl.load(queue_stamp + q, mask=here, other=0))
            fresh = fresh & (tl.load(window + PLACE * place, mask=here, other=0) == tl.load(queue_window + q, mask=here, other=0))
            tl.store(fresh_out + block * BLOCK + i, fresh.to(tl.int8))
            fresh_here = tl.sum(fresh.to(tl.int32))
            tl.store(block_fresh + block, fresh_here)
            if fresh_here > 0:
                tl.atomic_add(available + table, fresh_here.to(tl.int64), sem="relaxed")
            block += tl.num_programs(0)


@triton.jit
def _scan(  # type: ignore[no-untyped-def]
    batch, bad, missing_count, block_wins, win_starts, block_fresh, fresh_starts, misses, available, decided, queue_fill,
    tables, FEATURES: tl.constexpr, FEATURES_POW2: tl.constexpr, TABLES_POW2: tl.constexpr, IDS32: tl.constexpr,
    OFFSETS32: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    _ids, offsets = ids_and_offsets(batch, IDS32, OFFSETS32)
    f = tl.arange(0, FEATURES_POW2)
    stride = tl.load(batch + STRIDE)
    begin = tl.load(offsets + f * stride, mask=f < FEATURES, other=0).to(tl.int64)
    end = tl.load(offsets + (f + 1) * stride, mask=f < FEATURES, other=0).to(tl.int64)
    broken = tl.sum(((f < FEATURES) & (end < begin)).to(tl.int32))
    broken += (tl.load(offsets).to(tl.int64) != 0).to(tl.int32)
    broken += (tl.load(offsets + FEATURES * stride).to(tl.int64) != tl.load(batch + COUNT)).to(tl.int32)
    refills = tl.full([], 0, tl.int32)
    if tl.load(missing_count) > 0:
        scan_blocks(block_wins, win_starts, tl.cdiv(tl.load(batch + COUNT), BLOCK).to(tl.int32), CHUNK)
        scan_blocks(block_fresh, fresh_starts, tables * _queue_blocks(queue_fill, tables, TABLES_POW2, BLOCK), CHUNK)
        t = tl.arange(0, TABLES_POW2)
        wanted, have = tl.load(misses + t, mask=t < tables, other=0), tl.load(available + t, mask=t < tables, other=0)
        tl.store(decided + 2 + t, tl.cumsum(wanted, 0) - wanted, mask=t < tables)
        tl.store(decided + 2 + tables + t, tl.cumsum(have, 0) - have, mask=t < tables)
        tl.store(decided + 2 + 2 * tables, tl.sum(wanted))
        if (tl.load(bad) == 0) & (broken == 0):  # a batch that is refused changes no queue
            refills = tl.max((have < wanted).to(tl.int32))
    tl.store(decided, refills.to(tl.int64))
    tl.store(decided + 1, (broken == 0).to(tl.int64))


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
    chosen, summary, wins_in, win_starts, winners, tables, FEATURES: tl.constexpr, FEATURES_POW2: tl.constexpr,
    TABLES_POW2: tl.constexpr, OFFSETS32: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    fits = _fits(bad, decided, misses, below, available, tables, TABLES_POW2)
    if tl.program_id(0) == 0:
        t = tl.arange(0, TABLES_POW2)
        tl.store(summary, tl.load(bad))
        tl.store(summary + 1, fits.to(tl.int64))
        tl.store(summary + 2 + t, tl.load(hits + t, mask=t < tables, other=0), mask=t < tables)
        tl.store(summary + 2 + tables + t, tl.load(misses + t, mask=t < tables, other=0), mask=t < tables)
        tl.store(summary + 2 + 2 * tables + t, tl.load(below + t, mask=t < tables, other=0), mask=t < tables)
        _ids, offsets = ids_and_offsets(batch, True, OFFSETS32)
        f = tl.arange(0, FEATURES_POW2)
        begins = tl.load(offsets + f * tl.load(batch + STRIDE), mask=f <= FEATURES, other=0).to(tl.int64)
        tl.store(summary + 2 + 3 * tables + f, begins, mask=f <= FEATURES)
    if tl.load(missing_count) > 0:
        i = tl.arange(0, BLOCK)
        block = tl.program_id(0)
        while block * BLOCK < tl.load(batch + COUNT):
            won = tl.load(wins_in + block * BLOCK + i) != 0
            rank = tl.load(win_starts + block) + tl.cumsum(won.to(tl.int32), 0) - 1
            tl.store(winners + rank, block * BLOCK + i, mask=won)
            block += tl.num_programs(0)
        if fits:
            remade = tl.load(decided) != 0
            queue_blocks = _queue_blocks(queue_fill, tables, TABLES_POW2, BLOCK)
            block = tl.program_id(0)
            while block < tables * queue_blocks:
                table, at = block // queue_blocks, (block % queue_blocks) * BLOCK + i
                here = at < tl.load(queue_fill + table)
                fresh = here & (remade | (tl.load(fresh_in + block.to(tl.int64) * BLOCK + i) != 0))
                before = (tl.load(fresh_starts + block) - tl.load(decided + 2 + tables + table)).to(tl.int32)
                rank = tl.where(remade, at, before + tl.cumsum(fresh.to(tl.int32), 0) - 1)
                taken = fresh & (rank < tl.load(misses + table))
                place = tl.load(queue_place + tl.load(queue_start + table) + at, mask=taken, other=0)
                tl.store(chosen + tl.load(decided + 2 + table) + rank, place, mask=taken)
                block += tl.num_programs(0)


@triton.jit
def _commit(  # type: ignore[no-untyped-def]
    batch, bad, missing_count, decided, misses, below, available, winners, feature_row, feature_table, chosen, first_row, place_of_row,
    row_of_place, stamp, window, evictions, write_backs, slots_out, hosts_out, tables_out, count_out, seal, tables,
    TABLES_POW2: tl.constexpr, FEATURES: tl.constexpr, SEARCH: tl.constexpr, IDS32: tl.constexpr, OFFSETS32: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.load(decided + 2 + 2 * tables, mask=tl.load(missing_count) > 0, other=0)
    fits = _fits(bad, decided, misses, below, available, tables, TABLES_POW2)
    if tl.program_id(0) == 0:
        tl.store(count_out, tl.where(fits, total, 0))
        tl.store(count_out + 1, tl.load(batch + COUNT))
        tl.store(seal, tl.load(batch + SEQ))  # behind the summary, which an earlier launch has written
    block = tl.program_id(0).to(tl.int64)
    while block * BLOCK < total:
        i = block * BLOCK + tl.arange(0, BLOCK)
        here = i < total
        at = tl.load(winners + i, mask=here, other=0)
        feature, row = _rows_at(batch, feature_row, at, here, FEATURES, SEARCH, IDS32, OFFSETS32)
        host = tl.load(tl.load(batch + OUT).to(tl.pointer_type(tl.int64)) + at, mask=here, other=0)
        if fits:
            table = tl.load(feature_table + feature)
            slot = tl.load(chosen + i, mask=here, other=0).to(tl.int64)
            first = tl.load(first_row + table)
            now, dirty = 2 * tl.load(batch + SEQ), tl.load(batch + DIRTY)
            leaves, left = tl.load(row_of_place + slot, mask=here, other=-1), tl.load(stamp + PLACE * slot, mask=here, other=0)
            held = here & (leaves >= 0)
            was_dirty = tl.load(stamp + PLACE * host, mask=here, other=0) & 1
            of_slot, of_host = tl.load(window + PLACE * slot, mask=here, other=0), tl.load(window + PLACE * host, mask=here, other=0)
            tl.store(place_of_row + row, slot.to(tl.int32), mask=here)
            tl.store(place_of_row + first + leaves, host.to(tl.int32), mask=held)
            tl.store(row_of_place + slot, (row - first).to(tl.int32), mask=here)
            tl.store(row_of_place + host, leaves, mask=here)
            tl.store(stamp + PLACE * slot, now + (dirty | was_dirty), mask=here)
            tl.store(stamp + PLACE * host, tl.where(held, now + (left & 1), -1), mask=here)
            tl.store(window + PLACE * slot, of_host, mask=here)
            tl.store(window + PLACE * host, of_slot, mask=here)
            tl.store(slots_out + i, slot.to(tl.int32), mask=here)
            tl.store(hosts_out + i, host.to(tl.int32), mask=here)
            tl.store(tables_out + i, table.to(tl.int32), mask=here)
            add_by_table(evictions, table, held.to(tl.int64), here)
            add_by_table(write_backs, table, tl.where(held, left & 1, 0), here)
        else:
            tl.store(place_of_row + row, host.to(tl.int32), mask=here)
        block += tl.num_programs(0)


@triton.jit
def _settle(  # type: ignore[no-untyped-def]
    batch, count_in, missing_in, missing_count, feature_row, feature_slot, place_of_row, FEATURES: tl.constexpr, SEARCH: tl.constexpr,
    IDS32: tl.constexpr, OFFSETS32: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(count_in) > 0:
        count, block = tl.load(missing_count), tl.program_id(0).to(tl.int64)
        out = tl.load(batch + OUT).to(tl.pointer_type(tl.int64))
        while block * BLOCK < count:
            here = block * BLOCK + tl.arange(0, BLOCK) < count
            at = tl.load(missing_in + block * BLOCK + tl.arange(0, BLOCK), mask=here, other=0)
            feature, row = _rows_at(batch, feature_row, at, here, FEATURES, SEARCH, IDS32, OFFSETS32)
            place = tl.load(place_of_row + row, mask=here, other=0).to(tl.int64)
            tl.store(out + at, place, mask=here)
            tl.store(out + tl.load(batch + COUNT) + at, place - tl.load(feature_slot + feature), mask=here)
            block += tl.num_programs(0)
