"""What one shard of a tiered table costs in each tier, in bytes.

::

    ddr = rows × (index + directory) + pool_rows × (record + slot bookkeeping) + ids and outputs of a batch
    ssd = blocks of records with their headers ÷ 85%

A record is a row's weights and its optimizer state.
"""

from __future__ import annotations

import math

from torch import Tensor

INDEX_BYTES_PER_ROW = 8
"""The home's map from a row to its place on disk: one 64-bit word a row."""

DIRECTORY_BYTES_PER_ROW = 4
"""The slot directory's map from a row to its slot: one int32 a row (kernels/csrc/slot_directory.h)."""

BOOKKEEPING_BYTES_PER_SLOT = 19
"""The row in a slot (4), its stamp (8), its place in the free list (4), an eviction candidate of 16 bytes for an eighth of the
slots (2), a pin flag (1): kernels/csrc/slot_directory.h."""

SLOT_NUMBER_BYTES = 8
"""A batch's ids are turned into slot numbers of int64 (kernels/tiered_tbe.py)."""

RECORD_HEADER_BYTES = 24
"""Checksum, table, row and sequence number of a record on disk."""

RECORD_ALIGNMENT_BYTES = 8
PAGE_BYTES = 4096
MOST_BLOCK_BYTES = 64 << 10
"""How records lie in blocks, as the rest: kernels/csrc/log_format.h."""

VOLUME_FILL = 0.85
"""Live records may fill this share of the capacity. Cleaning the log costs 3.4 writes a write there and grows steeply beyond."""

_FP32_BYTES = 4

ROWWISE, ELEMENTWISE = "rowwise", "elementwise"

# The per-row states of the optimizers that tiered tables train with, by FBGEMM's and by PyTorch's or TorchRec's names.
_STATES: dict[str, tuple[str, ...]] = {
    "EXACT_SGD": (),
    "EXACT_ADAGRAD": (ELEMENTWISE,),
    "EXACT_ROWWISE_ADAGRAD": (ROWWISE,),
    "SGD": (),
    "Adagrad": (ELEMENTWISE,),
    "RowWiseAdagrad": (ROWWISE,),
}


def optimizer_name(tensor: Tensor, fused_params: dict[str, object]) -> str:
    """The table's optimizer: of ``apply_optimizer_in_backward`` first, else of the sharder's fused params, else FBGEMM's default."""
    classes = getattr(tensor, "_optimizer_classes", None)
    if classes:
        return classes[0].__name__
    optimizer = fused_params.get("optimizer")
    return "EXACT_SGD" if optimizer is None else str(getattr(optimizer, "name", optimizer))


def state_bytes_per_row(optimizer: str, columns: int) -> int | None:
    """Optimizer state of one row of ``columns`` values; None for an optimizer that tiered tables do not train with."""
    states = _STATES.get(optimizer)
    if states is None:
        return None
    return sum(_FP32_BYTES * (1 if state is ROWWISE else columns) for state in states)


def slot_bytes(record_bytes: int) -> int:
    """DDR of one slot of a pool."""
    return record_bytes + BOOKKEEPING_BYTES_PER_SLOT


def tiered_ddr_bytes(rows: int, pool_rows: int, record_bytes: int) -> int:
    """DDR of a tiered shard, without what a batch brings along."""
    return rows * (INDEX_BYTES_PER_ROW + DIRECTORY_BYTES_PER_ROW) + pool_rows * slot_bytes(record_bytes)


def tiered_ssd_bytes(rows: int, record_bytes: int) -> int:
    """SSD of a tiered shard."""
    stride = _up(record_bytes + RECORD_HEADER_BYTES, RECORD_ALIGNMENT_BYTES)
    block = _up(stride, PAGE_BYTES)
    while block % stride > block // 8 and block + PAGE_BYTES <= MOST_BLOCK_BYTES:
        block += PAGE_BYTES
    blocks = -(-rows // (block // stride))
    return math.ceil(blocks * block / VOLUME_FILL)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
