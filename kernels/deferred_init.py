"""Deferred initial values: a row that was never written has the value of a counter-based generator.

The recurrence is in ``csrc/initializer.h``; this module is the same arithmetic on torch tensors, for in-memory twins.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from .. import errors

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: torch.Tensor) -> torch.Tensor:
    for bits, factor in _MIX:
        z = (z ^ _shift_right(z, bits)) * _signed(factor)
    return z ^ _shift_right(z, 31)


def table_seed(name: str, seed: int = 0) -> int:
    """The generator's seed for a table: the job's seed and the table's name, so that every sharding agrees."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")


Columns = int | tuple[range, ...]
"""Columns of a table: ranges of them, or how many of its first."""


def column_ranges(columns: Columns) -> tuple[range, ...]:
    """``columns`` as ranges."""
    return (range(columns),) if isinstance(columns, int) else columns


@dataclass(frozen=True)
class UniformInit:
    """Uniform values in [low, high), keyed by (seed, global row, global column).

    ``first_row`` is where the shard begins in its table, ``columns`` are those that it has, in the order of its elements.
    ``weight_type`` is ``"float32"`` or ``"float16"``.
    """

    seed: int
    low: float
    high: float
    first_row: int = 0
    columns: Columns = 0
    weight_type: str = "float32"

    def __post_init__(self) -> None:
        if self.weight_type not in ("float32", "float16"):
            raise errors.ConfigurationError(f"weight_type must be float32 or float16, got {self.weight_type!r}")

    def materialize(self, first_row: int, row_count: int) -> torch.Tensor:
        """The values of rows [first_row, first_row + row_count) of the shard.

        Shapes: (row_count, columns) of ``weight_type``.
        """
        rows = torch.arange(self.first_row + first_row + 1, self.first_row + first_row + row_count + 1)
        columns = torch.cat([torch.arange(r.start + 1, r.stop + 1) for r in column_ranges(self.columns)])
        golden = _signed(_GOLDEN)
        row_key = _mix(rows * golden + _signed(self.seed))
        key = _mix(row_key[:, None] + (columns * golden)[None, :])
        u = _shift_right(key, 40).to(torch.float32) * 2.0**-24
        low, high = torch.tensor(self.low, dtype=torch.float32), torch.tensor(self.high, dtype=torch.float32)
        return (u * (high - low) + low).to(getattr(torch, self.weight_type))
