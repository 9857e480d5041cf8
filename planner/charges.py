"""What the tiers of one table shard cost, in bytes. A record is a row's weights and its optimizer state.

::

    slot pool    ddr   4 × rows + pool_rows × (record + 33)
    DdrCache     ddr   4 × rows + cache_rows × (record + 32), records in whole pages
    PmemCache    ddr   4 × rows + cache_rows × 32            pmem   cache_rows × record, whole pages
    SsdHome      ddr   8 × rows, and what a snapshot needs   ssd    blocks of records × (1 ÷ fill + what checkpoints hold), and snapshots
    PmemHome     ddr   the same                              pmem   the same
    DdrHome      ddr   rows × (record + 1)
    batches      ddr   ids of those that wait in the pipeline: 3, and the lookahead window

A pool or cache has no more rows than its shard. A volume of less capacity than ``SNAPSHOT_AFTER_BYTES`` has no snapshots, and one without
checkpoints has none. tests/test_planner_charges.py holds every line against what was allocated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..lookahead import MOST_BATCHES, POOLS_OF_BATCHES
from ..tiers import Cache, DdrCache, DdrHome, Home, PmemCache, PmemHome, TierChain
from .checkpoint_schedule import CheckpointSchedule

Size = TypeVar("Size", int, NDArray[np.int64])
"""One number, or one for each of several."""

INDEX_BYTES_PER_ROW = 8
"""A log's map from a row to its place: one 64-bit word a row (kernels/csrc/log_volume.h)."""

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

ID_BYTES, BAG_BYTES = 8, 12
"""An id, and what is held of a bag of ids: its length (int32) and its offset (int64)."""

BATCHES_WAITING = 3
"""Batches beside the one that trains and those of the window: prefetched ones and one that arrives (torchrec_mtrains/train_pipeline.py)."""

SNAPSHOT_AFTER_BYTES = 8 << 30
"""A volume writes its index beside the log when opening would replay more (kernels/csrc/log_volume.h)."""

SNAPSHOT_BYTES_PER_ROW = 2 * INDEX_BYTES_PER_ROW
"""The snapshot that manifests name, and the one that is being written."""

CHANGED_ENTRY_BYTES = 48
"""Of a row put while a snapshot is written, until it is: a node of a std::map. A device that takes 8 bytes a row of snapshot takes no more
than as many bytes of records meanwhile, so that no more than 8 × rows ÷ record rows change."""

VOLUME_BYTES = 5 * (128 << 10)
"""Segments that a volume keeps to itself: those that its streams fill, and that cleaning needs. The smallest ones there are: of volumes
with larger ones ``CheckpointSchedule.fill`` leaves as much (kernels/csrc/log_format.h; docs/checkpoints.md, "How much room")."""

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


def waiting_bytes(lookups: float, bags: float, unique_rows: float, pool_rows: Size, world_size: int) -> Size:
    """DDR of the ids that wait for a shard with such a pool, of so many lookups in so many bags a batch.

    The window is that of a pipeline left its own choice (``lookahead.useful_batches``) whose largest pool this is; another table's pool
    that holds more batches makes it longer. On several ranks a batch is held twice: as it was read, and as it came from all ranks. Never
    less for a larger pool. Shapes: any pool_rows → the same.
    """
    window = least(1 + POOLS_OF_BATCHES * pool_rows / max(unique_rows, 1.0), float(MOST_BATCHES))
    waiting: Any = _batch_waiting_bytes(lookups, bags, world_size) * (BATCHES_WAITING + window)
    whole: Any = np.ceil(waiting).astype(np.int64) if isinstance(waiting, np.ndarray) else math.ceil(waiting)
    return whole


def _batch_waiting_bytes(lookups: float, bags: float, world_size: int) -> float:
    return (1 if world_size == 1 else 2) * (ID_BYTES * lookups + BAG_BYTES * bags)


def waiting_bytes_per_slot(lookups: float, bags: float, unique_rows: float, pool_rows: int, world_size: int) -> float:
    """By how much ``waiting_bytes`` grows with a slot more, and no more than that with any further one."""
    if 1 + POOLS_OF_BATCHES * pool_rows / max(unique_rows, 1.0) >= MOST_BATCHES:
        return 0.0
    return _batch_waiting_bytes(lookups, bags, world_size) * POOLS_OF_BATCHES / max(unique_rows, 1.0)


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
