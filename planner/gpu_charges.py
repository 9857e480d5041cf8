"""What a table shard costs a GPU and its host, in bytes. A record is a row's weights and its optimizer state.

::

    slot pool       hbm   4 × rows + pool_rows × (record + 20 + 14) + host places × 20 + 100 × ids of the largest batch, twice
      DdrCache      ddr   host places × record; as many places as it has rows, and at least as many as the pool
        over SSD    ddr   8 × rows                                ssd    as on a CPU (charges.py)
      DdrHome       ddr   rows × record, a place for each; as much again below them where checkpoints put rows there
    UVM caching     hbm   4 × rows + cached rows × (weights + 20), in sets of 32; row-wise state of every row
                    ddr   rows × (weights + element-wise state)

The ids' scratch is rounded up to a power of two, hence twice (docs/gpu.md). A pool or cache has no more rows than its shard.
"""

from __future__ import annotations

import math

from . import charges

DIRECTORY_BYTES_PER_ROW, DIRECTORY_BYTES_PER_PLACE = 4, 20
"""Of the map from a row to its place, and of a slot's or host place's row, stamp and window (kernels/device_directory.py)."""

SCRATCH_BYTES_PER_SLOT, SCRATCH_BYTES_PER_ID = 14, 100
"""Of choosing victims, and of an attempt (kernels/device_fused.py)."""

UVM_SET_ROWS, UVM_BYTES_PER_CACHED_ROW, UVM_BYTES_PER_ROW = 32, 20, 4
"""FBGEMM's cache: rows of a set, their state, time and lock, and the map from a row to its table."""


def slot_bytes(record_bytes: int) -> int:
    """HBM of one slot of a pool."""
    return record_bytes + DIRECTORY_BYTES_PER_PLACE + SCRATCH_BYTES_PER_SLOT


def pool_bytes(rows: int, record_bytes: int, pool_rows: charges.Size, host_places: charges.Size, largest_batch: float) -> charges.Size:
    """HBM of a pool, its directory and the scratch of its batches. Shapes: any → the same."""
    directory = rows * DIRECTORY_BYTES_PER_ROW + charges.least(host_places, rows) * DIRECTORY_BYTES_PER_PLACE
    return directory + charges.least(pool_rows, rows) * slot_bytes(record_bytes) + 2 * SCRATCH_BYTES_PER_ID * math.ceil(largest_batch)


def home_bytes(rows: int, record_bytes: int, *, checkpoints: bool) -> int:
    """DDR of a ``DdrHome``: a host place for every row, and the volume below once it was flushed."""
    return rows * (record_bytes * (2 if checkpoints else 1) + charges.PRESENT_BYTES_PER_ROW)


def uvm_slot_bytes(weight_bytes: int) -> int:
    """HBM of one cached row."""
    return weight_bytes + UVM_BYTES_PER_CACHED_ROW


def uvm_hbm_bytes(rows: int, weight_bytes: int, rowwise_bytes: int, cached_rows: charges.Size) -> charges.Size:
    """HBM of a table in UVM caching; FBGEMM may make a set more of a load factor. Shapes: any → the same."""
    sets = -(-charges.least(cached_rows, rows) // UVM_SET_ROWS) + 1
    return rows * (UVM_BYTES_PER_ROW + rowwise_bytes) + sets * UVM_SET_ROWS * uvm_slot_bytes(weight_bytes)
