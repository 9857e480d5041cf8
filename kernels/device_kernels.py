"""What the kernels for a CUDA device share, and how they are cut, in Triton.

The tensor operations beside them run on a CPU and are the reference; kernels leave the same state (tests/test_device_kernels.py). They are
for the host's sake as much as the device's: a step of an all-HBM table takes less than a millisecond, of which a launch takes 10 to 20 µs.
So nothing depends on the host once a batch has begun: what varies from batch to batch is in ``batch``, counts stay on the device, and the
sequence of launches is the same for every batch (``device_sequences`` has it replayed as a graph). Triton comes with PyTorch's CUDA wheels.

What trains runs beside an attempt, so an attempt has few programs, which take block after block (``PROGRAMS``).

Atomics are relaxed: what others need of a launch they read in a later one. Triton's own choice orders all that a program reads and writes
around each.

    device_kernels_attempt    an attempt of ``DeviceDirectory``, and announcements
    device_kernels_queue      the part of it that makes a queue of candidates anew
    device_kernels_stamps     a batch of a group whose rows all have slots of their own
    device_kernels_exchange   records between slots and host places
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_sequences import BATCH

CHUNK = 4096
"""Of what one program scans at a time."""

IDS, OFFSETS, OUT, COUNT, STRIDE, SEQ, BEFORE, DIRTY, ANNOUNCED, FIRST = (tl.constexpr(i) for i in range(10))
LATER_IDS, LATER_OFFSETS, LATER_COUNT, LATER_STRIDE, LATER_SHIFT = (tl.constexpr(i) for i in range(10, 15))
"""Of ``batch``: addresses, then numbers; and of a batch that is announced with it."""

PLACE = tl.constexpr(2)
"""Numbers of a place, side by side: its stamp and its window."""

_BATCH = tl.constexpr(BATCH)


@triton.jit
def feature_at(offsets, stride, at, FEATURES: tl.constexpr, SEARCH: tl.constexpr):  # type: ignore[no-untyped-def]
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
def id_at(ids, offsets, stride, feature_rows, at, here, FEATURES: tl.constexpr, SEARCH: tl.constexpr):  # type: ignore[no-untyped-def]
    """By position ``at``, of those ``here``: its feature, its id, and whether the feature's table has such a row."""
    feature = feature_at(offsets, stride, at, FEATURES, SEARCH)
    id = tl.load(ids + at, mask=here, other=0).to(tl.int64)
    return feature, id, here & (id >= 0) & (id < tl.load(feature_rows + feature))


@triton.jit
def stamp_used(stamp_at, now, dirty, here):
    """Stamps as used by batch ``now``, at these addresses; whether each is the first to. Of most rows that are in a batch often it is
    stamped already, and left. Read past the multiprocessor's own cache, which does not see what others stamp."""
    old = tl.load(stamp_at, mask=here, other=0, cache_modifier=".cg")
    first = here & ((old >> 1) != now)
    old = tl.atomic_xchg(stamp_at, 2 * now + (dirty | (old & 1)), mask=first, sem="relaxed")
    return first & ((old >> 1) != now)


@triton.jit
def add_by_table(counts, table, amount, here):
    """Adds to the counter of each table. Tables are sorted, so a block nearly always has one."""
    last = tl.max(tl.where(here, table, 0))
    first = tl.min(tl.where(here, table, last))
    if first == last:
        tl.atomic_add(counts + first, tl.sum(tl.where(here, amount, 0)), sem="relaxed")
    else:
        tl.atomic_add(counts + table, amount, mask=here & (amount != 0), sem="relaxed")


@triton.jit
def ids_and_offsets(batch, IDS32: tl.constexpr, OFFSETS32: tl.constexpr, AT: tl.constexpr = IDS):  # type: ignore[no-untyped-def]
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
def start(given, batch, counters, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counters + i, tl.zeros([BLOCK], tl.int64), mask=i < count)
    if tl.program_id(0) == 0:
        k = tl.arange(0, _BATCH)
        tl.store(batch + k, tl.load(given + k))


@triton.jit
def scan_blocks(counts, starts, size, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    carry = tl.full([], 0, tl.int32)
    first = 0
    while first < size:
        i = first + tl.arange(0, CHUNK)
        c = tl.load(counts + i, mask=i < size, other=0)
        tl.store(starts + i, carry + tl.cumsum(c, 0) - c, mask=i < size)
        carry += tl.sum(c)
        first += CHUNK
