"""Kernels of a batch of a group whose rows all have slots of their own (``Stamps``).

Its launches:

    start   batch from the host; counters to zero
    use     by position: its id checked, its row stamped and counted
    tell    the summary, for the host
    seal    the number of the batch behind it
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device_kernels import COUNT, DIRTY, SEQ, STRIDE, add_by_table, id_at, ids_and_offsets, stamp_used, start
from .device_sequences import BLOCK


@triton.jit
def _use(  # type: ignore[no-untyped-def]
    batch, counters, feature_rows, feature_slot, feature_table, stamp, FEATURES: tl.constexpr, SEARCH: tl.constexpr, IDS32: tl.constexpr,
    OFFSETS32: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(batch + COUNT)
    if tl.program_id(0).to(tl.int64) * BLOCK < count:
        ids, offsets = ids_and_offsets(batch, IDS32, OFFSETS32)
        here = at < count
        now, dirty = tl.load(batch + SEQ), tl.load(batch + DIRTY)
        feature, id, good = id_at(ids, offsets, tl.load(batch + STRIDE), feature_rows, at, here, FEATURES, SEARCH)
        first = stamp_used(stamp + tl.load(feature_slot + feature) + id, now, dirty, good)
        add_by_table(counters + 1, tl.load(feature_table + feature), first.to(tl.int64), here)
        bad_here = tl.sum((here & ~good).to(tl.int64))
        if bad_here > 0:
            tl.atomic_add(counters, bad_here, sem="relaxed")


@triton.jit
def _tell(  # type: ignore[no-untyped-def]
    batch, counters, summary, tables, FEATURES: tl.constexpr, FEATURES_POW2: tl.constexpr, TABLES_POW2: tl.constexpr,
    OFFSETS32: tl.constexpr,
):  # fmt: skip
    _ids, offsets = ids_and_offsets(batch, True, OFFSETS32)
    f, t, stride = tl.arange(0, FEATURES_POW2), tl.arange(0, TABLES_POW2), tl.load(batch + STRIDE)
    begin = tl.load(offsets + f * stride, mask=f <= FEATURES, other=0).to(tl.int64)
    end = tl.load(offsets + (f + 1) * stride, mask=f < FEATURES, other=0).to(tl.int64)
    broken = tl.sum(((f < FEATURES) & (end < begin)).to(tl.int32))
    broken += (tl.load(offsets).to(tl.int64) != 0).to(tl.int32)
    broken += (tl.load(offsets + FEATURES * stride).to(tl.int64) != tl.load(batch + COUNT)).to(tl.int32)
    bad = tl.load(counters)
    tl.store(summary, bad)
    tl.store(summary + 1, ((bad == 0) & (broken == 0)).to(tl.int64))
    tl.store(summary + 2 + t, tl.load(counters + 1 + t, mask=t < tables, other=0), mask=t < tables)
    tl.store(summary + 2 + tables + f, begin, mask=f <= FEATURES)


@triton.jit
def _seal(batch, seal):
    tl.store(seal, tl.load(batch + SEQ))  # behind the summary, which an earlier launch has written


def use(
    given: Tensor, batch: Tensor, counters: Tensor, summary: Tensor, stamp: Tensor, feature_rows: Tensor, feature_slot: Tensor,
    feature_table: Tensor, tables: int, capacity: int, ids32: bool, offsets32: bool,
) -> None:  # fmt: skip
    """``Stamps.use`` of a batch of up to ``capacity`` ids."""
    features = feature_rows.numel()
    start[(triton.cdiv(counters.numel(), 2048),)](given, batch, counters, counters.numel(), BLOCK=2048)
    _use[(triton.cdiv(capacity, BLOCK),)](
        batch, counters, feature_rows, feature_slot, feature_table, stamp, FEATURES=features, SEARCH=max(1, features.bit_length()),
        IDS32=ids32, OFFSETS32=offsets32, BLOCK=BLOCK,
    )  # fmt: skip
    pow2 = {"FEATURES_POW2": triton.next_power_of_2(features + 1), "TABLES_POW2": triton.next_power_of_2(tables)}
    _tell[(1,)](batch, counters, summary, tables, FEATURES=features, OFFSETS32=offsets32, **pow2)
    _seal[(1,)](batch, summary[-1:])
