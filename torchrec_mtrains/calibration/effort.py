"""How much a calibration measures: sizes that its caches cannot hide, times over which its devices are steady, rounds for medians."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median


def undisturbed(times: Sequence[float], at_once: int) -> float:
    """The least of the medians of every ``at_once`` times in a row: threads that wait for each other are slowed many times over by
    whatever else runs for a moment."""
    return min(median(times[i : i + at_once]) for i in range(0, len(times), at_once))


Said = Callable[[str], None]
"""Called before each measurement with what it is."""


@dataclass(frozen=True)
class Effort:
    """``rounds`` of all points of a device, each of ``probe_seconds``; tables of ``rows``, batches of ``batch_rows``."""

    probe_seconds: float
    rounds: int
    file_bytes: int  # on each SSD path
    area_bytes: int  # of memory
    rows: int
    batch_rows: int
    batches: int  # of a round of the kernel's costs
    steps: int  # of a round of the TBE's

    def __post_init__(self) -> None:
        assert self.rows >= 8 * self.batch_rows
        assert self.batches >= 2


FULL = Effort(probe_seconds=0.12, rounds=5, file_bytes=1 << 30, area_bytes=256 << 20, rows=400_000, batch_rows=4096, batches=20, steps=8)
QUICK = Effort(probe_seconds=0.01, rounds=1, file_bytes=4 << 20, area_bytes=4 << 20, rows=8_000, batch_rows=256, batches=4, steps=2)
"""Shows that a calibration runs; its numbers say nothing."""
