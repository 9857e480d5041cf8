"""Kernels of one attempt of ``DeviceDirectory``, and of announcements. An attempt's launches, each of which needs what the one before has
written everywhere:

    start       batch from the host; counters to zero
    look        by position: place and slot; stamps of hits; what misses. By position of a batch that is announced: windows
    claim       by position that misses: its claim, the smaller the earlier
    win         by position that misses: whether its claim won. By candidate: whether it is fresh. Both counted by block and table
    scan        one program: where each block's winners and candidates begin; whether a table has too few candidates
    age … queue if so, the queue anew (``device_kernels_queue``)
    choose      by candidate: the k-th of a table is for its k-th miss. By position: the list of winners. The summary, for the host
    commit      by winner: rows and places; or the claim taken back. The summary's seal
    settle      by position that misses: its slot

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
    batch, feature_row, feature_rows, feature_slot, feature_table, place_of_row, stamp, window, row_out, feature_out, missing_out,
    bad, missing_count, hits, slots, sink, blocks, FEATURES: tl.constexpr, SEARCH: tl.constexpr, IDS32: tl.constexpr,
    OFFSETS32: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(batch + COUNT)
    if tl.program_id(0) >= blocks:
        at -= blocks * BLOCK
        later = tl.load(batch + LATER_COUNT)
        if (tl.program_id(0) - blocks) * BLOCK < later:
            later_ids, later_offsets = ids_and_offsets(batch, IDS32, OFFSETS32, LATER_IDS)
            _set_windows(
                later_ids, later_offsets, tl.load(batch + LATER_STRIDE), feature_row, feature_rows, place_of_row, window, later,
                tl.load(batch + LATER_SHIFT), at, True, FEATURES, SEARCH, BLOCK,
            )  # fmt: skip
    elif tl.program_id(0).to(tl.int64) * BLOCK >= count:
        tl.store(missing_out + at, tl.zeros([BLOCK], tl.int8))
    else:
        ids, offsets = ids_and_offsets(batch, IDS32, OFFSETS32)
        out = tl.load(batch + OUT).to(tl.pointer_type(tl.int64))
        here = at < count
        now, dirty = tl.load(batch + SEQ), tl.load(batch + DIRTY)
        feature, id, good = id_at(ids, offsets, tl.load(batch + STRIDE), feature_rows, at, here, FEATURES, SEARCH)
        row = tl.load(feature_row + feature) + id
        place = tl.load(place_of_row + row, mask=good, other=-1).to(tl.int64)
        hit = good & (place >= 0) & (place < slots)
        missing = good & ((place < 0) | (place >= slots))
        tl.store(out + at, place, mask=here)
        tl.store(out + count + at, place - tl.load(feature_slot + feature), mask=here)
        tl.store(missing_out + at, missing.to(tl.int8))
        tl.store(row_out + at, row, mask=missing)
        tl.store(feature_out + at, feature.to(tl.int32), mask=missing)
        first = stamp_used(stamp + PLACE * tl.where(hit, place, sink), now, dirty, hit)
        number = tl.load(batch + ANNOUNCED)
        if number > 0:
            bit = tl.full([BLOCK], 1, tl.int64) << (number % WINDOW)
            has = good & (place >= 0)
            window_at = window + PLACE * tl.maximum(place, 0)
            awaited = has & ((tl.load(window_at, mask=has, other=0, cache_modifier=".cg") & bit) != 0)
            tl.atomic_and(window_at, ~bit, mask=awaited, sem="relaxed")
        add_by_table(hits, tl.load(feature_table + feature), first.to(tl.int64), here)
        bad_here, missing_here = tl.sum((here & ~good).to(tl.int64)), tl.sum(missing.to(tl.int64))
        if bad_here > 0:
            tl.atomic_add(bad, bad_here, sem="relaxed")
        if missing_here > 0:
            tl.atomic_add(missing_count, missing_here, sem="relaxed")


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
        tl.atomic_min(place_of_row + row, at + _LOWEST, mask=missing, sem="relaxed")


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
                out = tl.load(batch + OUT).to(tl.pointer_type(tl.int64))
                table = tl.load(feature_table + tl.load(feature_in + at, mask=won, other=0), mask=won, other=0)
                is_below = won & (tl.load(out + at, mask=won, other=0) < 0)
                add_by_table(misses, table, won.to(tl.int64), won)
                add_by_table(below, table, is_below.to(tl.int64), won)
        else:
            block = tl.program_id(0) - blocks
            table = block // queue_blocks
            first, fill = (block % queue_blocks) * BLOCK, tl.load(queue_fill + table)
            if first >= fill:  # most are: a queue has room for many more than it holds
                tl.store(block_fresh + block, 0)
            else:
                at = first + i
                here = at < fill
                q = tl.load(queue_start + table) + at
                place = tl.load(queue_place + q, mask=here, other=0).to(tl.int64)
                fresh = here & (tl.load(stamp + PLACE * place, mask=here, other=0) == tl.load(queue_stamp + q, mask=here, other=0))
                fresh = fresh & (tl.load(window + PLACE * place, mask=here, other=0) == tl.load(queue_window + q, mask=here, other=0))
                tl.store(fresh_out + block.to(tl.int64) * BLOCK + i, fresh.to(tl.int8))
                fresh_here = tl.sum(fresh.to(tl.int32))
                tl.store(block_fresh + block, fresh_here)
                if fresh_here > 0:
                    tl.atomic_add(available + table, fresh_here.to(tl.int64), sem="relaxed")


@triton.jit
def _scan(  # type: ignore[no-untyped-def]
    batch, bad, missing_count, block_wins, win_starts, block_fresh, fresh_starts, misses, available, decided, blocks, fresh_blocks,
    tables, FEATURES: tl.constexpr, FEATURES_POW2: tl.constexpr, TABLES_POW2: tl.constexpr, IDS32: tl.constexpr,
    OFFSETS32: tl.constexpr, CHUNK: tl.constexpr,
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
        scan_blocks(block_wins, win_starts, blocks, CHUNK)
        scan_blocks(block_fresh, fresh_starts, fresh_blocks, CHUNK)
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
    chosen, summary, wins_in, win_starts, winners, queue_blocks, tables, FEATURES: tl.constexpr, FEATURES_POW2: tl.constexpr,
    TABLES_POW2: tl.constexpr, OFFSETS32: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) == 0:
        t = tl.arange(0, TABLES_POW2)
        fits = _fits(bad, decided, misses, below, available, tables, TABLES_POW2)
        tl.store(summary, tl.load(bad))
        tl.store(summary + 1, fits.to(tl.int64))
        tl.store(summary + 2 + t, tl.load(hits + t, mask=t < tables, other=0), mask=t < tables)
        tl.store(summary + 2 + tables + t, tl.load(misses + t, mask=t < tables, other=0), mask=t < tables)
        tl.store(summary + 2 + 2 * tables + t, tl.load(below + t, mask=t < tables, other=0), mask=t < tables)
        _ids, offsets = ids_and_offsets(batch, True, OFFSETS32)
        f = tl.arange(0, FEATURES_POW2)
        begins = tl.load(offsets + f * tl.load(batch + STRIDE), mask=f <= FEATURES, other=0).to(tl.int64)
        tl.store(summary + 2 + 3 * tables + f, begins, mask=f <= FEATURES)
    i = tl.arange(0, BLOCK)
    if tl.program_id(0) >= tables * queue_blocks:
        if tl.load(missing_count) > 0:
            block = tl.program_id(0) - tables * queue_blocks
            won = tl.load(wins_in + block * BLOCK + i) != 0
            rank = tl.load(win_starts + block) + tl.cumsum(won.to(tl.int32), 0) - 1
            tl.store(winners + rank, block * BLOCK + i, mask=won)
    else:
        table = tl.program_id(0) // queue_blocks
        first, fill = (tl.program_id(0) % queue_blocks) * BLOCK, tl.load(queue_fill + table)
        if (first < fill) & (tl.load(missing_count) > 0):  # noqa: SIM102
            if _fits(bad, decided, misses, below, available, tables, TABLES_POW2):
                at = first + i
                here = at < fill
                remade = tl.load(decided) != 0
                fresh = here & (remade | (tl.load(fresh_in + tl.program_id(0).to(tl.int64) * BLOCK + i) != 0))
                before = (tl.load(fresh_starts + tl.program_id(0)) - tl.load(decided + 2 + tables + table)).to(tl.int32)
                rank = tl.where(remade, at, before + tl.cumsum(fresh.to(tl.int32), 0) - 1)
                taken = fresh & (rank < tl.load(misses + table))
                place = tl.load(queue_place + tl.load(queue_start + table) + at, mask=taken, other=0)
                tl.store(chosen + tl.load(decided + 2 + table) + rank, place, mask=taken)


@triton.jit
def _commit(  # type: ignore[no-untyped-def]
    batch, bad, missing_count, decided, misses, below, available, winners, row_in, feature_in, feature_table, chosen, first_row,
    place_of_row, row_of_place, stamp, window, evictions, write_backs, slots_out, hosts_out, tables_out, count_out, seal, tables,
    TABLES_POW2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.load(decided + 2 + 2 * tables, mask=tl.load(missing_count) > 0, other=0)
    if tl.program_id(0).to(tl.int64) * BLOCK < tl.maximum(total, 1):
        fits = _fits(bad, decided, misses, below, available, tables, TABLES_POW2)
        if tl.program_id(0) == 0:
            tl.store(count_out, tl.where(fits, total, 0))
            tl.store(count_out + 1, tl.load(batch + COUNT))
            tl.store(seal, tl.load(batch + SEQ))  # behind the summary, which an earlier launch has written
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        here = i < total
        at = tl.load(winners + i, mask=here, other=0)
        row = tl.load(row_in + at, mask=here, other=0)
        host = tl.load(tl.load(batch + OUT).to(tl.pointer_type(tl.int64)) + at, mask=here, other=0)
        if fits:
            table = tl.load(feature_table + tl.load(feature_in + at, mask=here, other=0), mask=here, other=0)
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


@triton.jit
def _settle(batch, count_in, missing_in, row_in, feature_in, feature_slot, place_of_row, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    if tl.load(count_in) > 0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        missing = tl.load(missing_in + at) != 0
        place = tl.load(place_of_row + tl.load(row_in + at, mask=missing, other=0), mask=missing, other=0).to(tl.int64)
        out = tl.load(batch + OUT).to(tl.pointer_type(tl.int64))
        tl.store(out + at, place, mask=missing)
        first = tl.load(feature_slot + tl.load(feature_in + at, mask=missing, other=0), mask=missing, other=0)
        tl.store(out + tl.load(batch + COUNT) + at, place - first, mask=missing)
