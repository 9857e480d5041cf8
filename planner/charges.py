"""What the tiers of one table shard cost, in bytes. A record is a row's weights and its optimizer state.

::

    slot pool    ddr   4 × rows + pool_rows × (record + 33)
    DdrCache     ddr   4 × rows + cache_rows × (record + 32), records in whole pages
    PmemCache    ddr   4 × rows + cache_rows × 32            pmem   cache_rows × record, whole pages
    SsdHome      ddr   8 × rows, and what a snapshot needs   ssd    blocks of records × (1 ÷ fill + what checkpoints hold), and snapshots
    PmemHome     ddr   the same                              pmem   the same
    DdrHome      ddr   rows × (record + 1)

A pool or cache has no more rows than its shard. A volume of less capacity than ``SNAPSHOT_AFTER_BYTES`` has no snapshots, and one without
checkpoints has none. Ids of batches that wait are in ``waiting_ids.py``.
tests/test_planner_charges.py holds every line against what was allocated.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..tiers import Cache, DdrCache, DdrHome, Home, PmemCache, PmemHome, TierChain
from .checkpoint_schedule import CheckpointSchedule

Size = TypeVar("Size", int, NDArray[np.int64])
"""One number, or one for each of several."""

INDEX_BYTES_PER_ROW = 8
"""A log's map from a row to its place: one 64-bit word a row (kernels/csrc/log_table.h)."""

DIRECTORY_BYTES_PER_ROW = 4
"""The map from a row to its slot, of a pool and of each cache: one int32 a row (kernels/csrc/slot_directory.h)."""

DIRECTORY_BYTES_PER_SLOT = 32
"""The row in a slot (4), its state (16), its links in the eviction order (8), its place in the free list (4):
kernels/csrc/slot_directory.h, slot_state.h, eviction_order.h."""

PIN_BYTES_PER_SLOT = 1
"""A pool's flag of slots that pending backwards hold (kernels/csrc/slot_pool.h)."""

PRESENT_BYTES_PER_ROW = 1
"""Whether a row of host memory was ever put (kernels/csrc/memory_volume.h)."""

SLOT_NUMBER_BYTES = 8
"""A batch's ids are turned into slot numbers of int64 (kernels/tiered_tbe.py)."""

SNAPSHOT_AFTER_BYTES = 8 << 30
"""A volume writes its index beside the log when opening would replay more (kernels/csrc/log_volume.h)."""

SNAPSHOT_BYTES_PER_ROW = 2 * INDEX_BYTES_PER_ROW
"""The snapshot that manifests name, and the one that is being written."""

CHANGED_ENTRY_BYTES = 48
"""Of a row put while a snapshot is written, until it is: a node of a std::map. A device that takes 8 bytes a row of snapshot takes no more
than as many bytes of records meanwhile, so that no more than 8 × rows ÷ record rows change."""

LEAST_SEGMENT_BYTES = 128 << 10
BLOCKS_PER_SEGMENT = 8
SEGMENTS_PER_VOLUME = 16
"""Segments of a log are no smaller, nor than so many of its blocks, and a volume has at least so many (kernels/csrc/log_volume.cpp)."""

RECORD_HEADER_BYTES = 24
RECORD_ALIGNMENT_BYTES = 8
PAGE_BYTES = 4096
MOST_BLOCK_BYTES = 64 << 10
"""How records lie in blocks: kernels/csrc/log_format.h."""


@dataclass(frozen=True)
class TierBytes:
    """Bytes in every kind of tier."""

    ddr: int = 0
    pmem: int = 0
    ssd: int = 0

    def __add__(self, other: TierBytes) -> TierBytes:
        return TierBytes(self.ddr + other.ddr, self.pmem + other.pmem, self.ssd + other.ssd)


def slot_bytes(record_bytes: int) -> int:
    """DDR of one slot of a pool."""
    return record_bytes + DIRECTORY_BYTES_PER_SLOT + PIN_BYTES_PER_SLOT


def pool_bytes(rows: int, record_bytes: int, pool_rows: Size) -> Size:
    """DDR of a slot pool and its directory. Shapes: any → the same."""
    return rows * DIRECTORY_BYTES_PER_ROW + least(pool_rows, rows) * slot_bytes(record_bytes)


def cache_index_bytes(rows: int, cache_rows: Size) -> Size:
    """DDR that a cache takes beside its records, wherever they are. Shapes: any → the same."""
    return rows * DIRECTORY_BYTES_PER_ROW + least(cache_rows, rows) * DIRECTORY_BYTES_PER_SLOT


def cache_record_bytes(rows: int, record_bytes: int, cache_rows: Size) -> Size:
    """What the records of a cache take of its device. Shapes: any → the same."""
    return _up(least(cache_rows, rows) * record_bytes, PAGE_BYTES)


def block_bytes(record_bytes: int) -> int:
    """The block of a log, which one read brings."""
    stride = _stride(record_bytes)
    block = _up(stride, PAGE_BYTES)
    while block % stride > block // 8 and block + PAGE_BYTES <= MOST_BLOCK_BYTES:
        block += PAGE_BYTES
    return block


def records_per_block(record_bytes: int) -> int:
    """Of a log."""
    return block_bytes(record_bytes) // _stride(record_bytes)


def live_bytes(rows: int, record_bytes: int) -> int:
    """The blocks that one copy of every row takes in a log."""
    block = block_bytes(record_bytes)
    return -(-rows // records_per_block(record_bytes)) * block


def least_segment_bytes(block_sizes: Collection[int]) -> int:
    """The segments of the smallest volume that has tables with such blocks."""
    segment = LEAST_SEGMENT_BYTES
    while segment < PAGE_BYTES + BLOCKS_PER_SEGMENT * max(block_sizes):
        segment *= 2
    return segment


def volume_bytes(block_sizes: Collection[int], keep: int) -> int:
    """Segments that a volume keeps to itself: two streams a block size fill one each, and what cleaning turns over, a segment a stream and
    one more, is held back by every kept checkpoint (docs/checkpoints.md, "How much room"). Of volumes with larger segments
    ``CheckpointSchedule.fill`` leaves as much."""
    streams = 2 * len(set(block_sizes))
    return (streams + (keep + 1) * (streams + 1)) * least_segment_bytes(block_sizes)


def least_volume_bytes(block_sizes: Collection[int]) -> int:
    """The smallest volume that such tables may be in."""
    return SEGMENTS_PER_VOLUME * least_segment_bytes(block_sizes)


def bytes_for_tables(capacity_bytes: int, block_sizes: Collection[int], keep: int) -> int:
    """What a volume of such a capacity has for its tables."""
    return 0 if capacity_bytes < least_volume_bytes(block_sizes) else max(0, capacity_bytes - volume_bytes(block_sizes, keep))


def capacity_for(table_bytes: int, block_sizes: Collection[int], keep: int) -> int:
    """The capacity of the smallest volume that has so much for its tables."""
    return max(least_volume_bytes(block_sizes), table_bytes + volume_bytes(block_sizes, keep))


def _stride(record_bytes: int) -> int:
    return _up(record_bytes + RECORD_HEADER_BYTES, RECORD_ALIGNMENT_BYTES)


def log_bytes(rows: int, record_bytes: int, lookups: float, checkpoints: CheckpointSchedule, *, snapshots: bool) -> int:
    """What a log takes of its device, with room for cleaning and for what checkpoints hold."""
    blocks = math.ceil(live_bytes(rows, record_bytes) * checkpoints.disk_over_live(rows, lookups))
    return blocks + snapshots * rows * SNAPSHOT_BYTES_PER_ROW


def log_index_bytes(rows: int, record_bytes: int, *, snapshots: bool) -> int:
    """DDR of a log's index, and of what changes in it while a snapshot is written."""
    changed = rows * INDEX_BYTES_PER_ROW * CHANGED_ENTRY_BYTES // _stride(record_bytes)
    return rows * INDEX_BYTES_PER_ROW + snapshots * changed


def has_snapshots(home: Home, checkpoints: CheckpointSchedule) -> bool:
    """Whether a volume of that capacity ever writes its index beside the log."""
    return not isinstance(home, DdrHome) and checkpoints.keep > 0 and home.capacity_bytes > SNAPSHOT_AFTER_BYTES


def chain_bytes(
    chain: TierChain, *, rows: int, record_bytes: int, lookups: float = math.inf, checkpoints: CheckpointSchedule | None = None
) -> TierBytes:
    """What any chain costs on a rank that has ``rows`` rows of its table, without the ids and outputs of batches.

    ``lookups`` a step and ``checkpoints`` say what checkpoints hold back. Left out: all rows are replaced between two of them.
    """
    costs = TierBytes(ddr=pool_bytes(rows, record_bytes, chain.pool_rows))
    for cache in chain.caches:
        costs += _cache(cache, rows, record_bytes)
    return costs + _home(chain.home, rows, record_bytes, lookups, checkpoints or CheckpointSchedule())


def _cache(cache: Cache, rows: int, record_bytes: int) -> TierBytes:
    index, records = cache_index_bytes(rows, cache.rows), cache_record_bytes(rows, record_bytes, cache.rows)
    if isinstance(cache, DdrCache):
        return TierBytes(ddr=index + records)
    assert isinstance(cache, PmemCache)
    return TierBytes(ddr=index, pmem=records)


def _home(home: Home, rows: int, record_bytes: int, lookups: float, checkpoints: CheckpointSchedule) -> TierBytes:
    if isinstance(home, DdrHome):
        return TierBytes(ddr=rows * (record_bytes + PRESENT_BYTES_PER_ROW))
    snapshots = has_snapshots(home, checkpoints)
    log = log_bytes(rows, record_bytes, lookups, checkpoints, snapshots=snapshots)
    index = log_index_bytes(rows, record_bytes, snapshots=snapshots)
    return TierBytes(ddr=index, pmem=log) if isinstance(home, PmemHome) else TierBytes(ddr=index, ssd=log)


def _up(value: Size, multiple: int) -> Size:
    return -(-value // multiple) * multiple


def least(value: Any, most: Any) -> Any:
    """The lesser. Shapes: value any → the same."""
    return np.minimum(value, most) if isinstance(value, np.ndarray) else min(value, most)
