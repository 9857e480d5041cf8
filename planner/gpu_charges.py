"""What a table shard costs a GPU and its host, in bytes. A record is a row's weights and its optimizer state.

::

    slot pool       hbm   4 × rows + pool_rows × (record + 20 + 14) + host places × 20 + 217 × ids of the largest batch, twice
      graphs        hbm   output + the larger of output and 44 × ids, of a batch
      DdrCache      ddr   host places × record; as many places as it has rows, and at least as many as the pool
        over SSD    ddr   8 × rows                                ssd    as on a CPU (charges.py)
      DdrHome       ddr   rows × record, a place for each; as much again below them where checkpoints put rows there
    UVM caching     hbm   4 × rows + cached rows × (weights + 20), in sets of 32; row-wise state of every row
                    ddr   rows × (weights + element-wise state)

The ids' scratch is rounded up to a power of two, hence twice (docs/gpu.md). A pool or cache has no more rows than its shard.

Graphs are of a group of tables. Each table is charged for its own ids and its own columns of the output, which the group's are the sum
of; a row-wise shard for nothing, since its batches differ in how many ids they have. What PyTorch's allocator rounds up is charged to
nobody: up to 22 MiB for graphs, and as much for each of two streams of a group. tests/test_gpu_charges.py holds all of it against what a
GPU has given.
"""

from __future__ import annotations

import math

from . import charges

DIRECTORY_BYTES_PER_ROW, DIRECTORY_BYTES_PER_PLACE = 4, 20
"""Of the map from a row to its place, and of a slot's or host place's row, stamp and window (kernels/device_directory.py)."""

SCRATCH_BYTES_PER_SLOT, SCRATCH_BYTES_PER_ID = 14, 217
"""Of choosing victims, and of attempts (kernels/device_fused.py): 17 are of one, 64 of the rooms of four, and 24 of each batch that is
held, its ids, places and slots: the one that trains, two that are prefetched, some whose backward may still run. Measured on an H100."""

OUTPUT_ELEMENT_BYTES = 4
"""Of what FBGEMM gives for a batch."""

GRAPH_BYTES_PER_ID = 44
"""Of what FBGEMM's backward makes of a batch's ids, at once: rows and bags, both of them sorted, what sorting takes or the runs of equal
rows (kernels/graphed_lookup.py). Measured on an H200 with FBGEMM 1.6.0: 43.5 with 4 million ids, all optimizers alike."""

UVM_SET_ROWS, UVM_BYTES_PER_CACHED_ROW, UVM_BYTES_PER_ROW = 32, 20, 4
"""FBGEMM's cache: rows of a set, their state, time and lock, and the map from a row to its table."""


def slot_bytes(record_bytes: int) -> int:
    """HBM of one slot of a pool."""
    return record_bytes + DIRECTORY_BYTES_PER_PLACE + SCRATCH_BYTES_PER_SLOT


def pool_bytes(rows: int, record_bytes: int, pool_rows: charges.Size, host_places: charges.Size, largest_batch: float) -> charges.Size:
    """HBM of a pool, its directory and the scratch of its batches. Shapes: any → the same."""
    directory = rows * DIRECTORY_BYTES_PER_ROW + charges.least(host_places, rows) * DIRECTORY_BYTES_PER_PLACE
    return directory + charges.least(pool_rows, rows) * slot_bytes(record_bytes) + 2 * SCRATCH_BYTES_PER_ID * math.ceil(largest_batch)


def graph_bytes(ids: float, output_elements: float) -> int:
    """HBM of the graphs of a table's lookup and its backward, for batches of so many ids: what is kept of two outputs, in whose place the
    backward then has its own. With a mean of rows that is one more output."""
    output = output_elements * OUTPUT_ELEMENT_BYTES
    return math.ceil(output + max(output, GRAPH_BYTES_PER_ID * ids))


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
