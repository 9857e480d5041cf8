"""What training's checkpoints hold back on the device of a log.

A checkpoint names segments, which stay until the last kept checkpoint that names them goes. With ``keep`` kept ones, as much as
``keep + 1`` intervals replace must be free or on its way, and live records and what cleaning needs have the rest::

    disk ÷ live = 1 ÷ fill + (keep + 1) × D ÷ rows

D, the rows replaced from one checkpoint to the next, is taken to be every row that the steps in between can look up: each lookup
another row, up to all rows of the table. Skew makes it less.

Of ``keep`` intervals, keep × A × D rows are emptied and not given back yet, with A writes a put; so A must stay below
(keep + 1) ÷ keep. A uniform stream cleaned greedily has A = 1 ÷ (1 - s) at fill = (s - 1) ÷ ln s, so that the bound is met at
s = 1 ÷ (keep + 1). ``benchmarks/store.py`` measures both lines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from ..errors import ConfigurationError

FILL_WITHOUT_CHECKPOINTS = 0.85
"""Live records may fill this share. Cleaning costs 2.5 writes an eviction there (benchmarks/store.py) and grows steeply beyond."""


@dataclass(frozen=True)
class CheckpointSchedule:
    """Training commits a checkpoint every ``every_steps`` steps and keeps the last ``keep``; 0: it commits none.

    ``every_steps=None``: nobody knows how often. Then every row may be replaced in between.
    """

    every_steps: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        if self.keep < 0 or (self.every_steps is not None and self.every_steps < 1):
            raise ConfigurationError(f"CheckpointSchedule: keep must not be negative and every_steps at least 1, got {self}")

    @property
    def fill(self) -> float:
        """The share that live records may have of what the checkpoints leave them."""
        if not self.keep:
            return FILL_WITHOUT_CHECKPOINTS
        return FILL_WITHOUT_CHECKPOINTS * self.keep / (self.keep + 1) / math.log(self.keep + 1)

    @cached_property
    def write_amplification(self) -> float:
        """Records that a log writes for one put, where it is as full as ``fill``: 1 ÷ (1 - s), s by bisection."""
        low, high = 1e-9, 1 - 1e-9
        for _ in range(60):
            s = (low + high) / 2
            low, high = (s, high) if (s - 1) / math.log(s) < self.fill else (low, s)
        return 1 / (1 - low)

    def replaced_rows(self, rows: int, lookups: float) -> int:
        """Rows of a table of ``rows`` that are replaced from one checkpoint to the next, at so many lookups a step."""
        if not self.keep:
            return 0
        return rows if self.every_steps is None else math.ceil(min(rows, self.every_steps * lookups))

    def disk_over_live(self, rows: int, lookups: float) -> float:
        """Bytes that a log takes on its device ÷ bytes of its live records."""
        return 1 / self.fill + (self.keep + 1) * self.replaced_rows(rows, lookups) / rows
