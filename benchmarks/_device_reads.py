"""What a device reads in a second at random: of files as they lie now, probe by probe until it has settled.

A disk that is shared with other machines, and cached below, may read what was just written at another rate than what has lain for long,
and its rates change by the hour. So what a prediction makes of a calibration is two things: the model, and how far the device is from its
calibration when a job trains. ``read_in_place`` tells them apart: it reads the job's own home where it lies, and nothing else, just
before it trains.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from torchrec_mtrains.kernels import _core
from torchrec_mtrains.planner import HardwareProfile
from torchrec_mtrains.planner.perf_model import QUEUE_DEPTH

from torchrec_mtrains.calibration.block_device import PAGE_BYTES
from torchrec_mtrains.calibration.settling import AT_ONCE, has_settled, until_settled
from torchrec_mtrains.errors import VolumeIoError

DRIFTED = 1.5
"""A device whose rate changed by more than so many times during a job is not the one that the job was predicted for."""

_PROBE_SECONDS = 0.1


@dataclass(frozen=True)
class ReadInPlace:
    """``reads_per_s``: of 4 KiB, at a volume's depth; the median of the last probes."""

    reads_per_s: float
    probes: int
    settled: bool


def read_in_place(home: Path) -> ReadInPlace:
    """Of the segments below the folder of a home, as far as they are written."""
    seen = until_settled(lambda number: _reads_per_s(home, number))
    return ReadInPlace(statistics.median(seen[-AT_ONCE:]), len(seen), has_settled(seen))


def _reads_per_s(home: Path, number: int) -> float:
    while True:
        files = [str(file) for file in sorted(home.rglob("segment_*.log"))]
        try:
            return float(_core.random_io(files, PAGE_BYTES, QUEUE_DEPTH, 1.0, _PROBE_SECONDS, "", number).operations_per_s)
        except VolumeIoError:
            if all(Path(file).exists() for file in files):
                raise  # else the volume has cleaned one meanwhile


def calibrated_reads(hardware: HardwareProfile) -> float:
    """A second, of 4 KiB at a volume's depth."""
    assert hardware.ssd is not None
    return hardware.ssd.operations_per_s(PAGE_BYTES, QUEUE_DEPTH)


def as_read(hardware: HardwareProfile, reads_per_s: float) -> HardwareProfile:
    """The profile, had its calibration found that the SSD reads so much: all of its rates by that factor."""
    assert hardware.ssd is not None
    factor = reads_per_s / calibrated_reads(hardware)
    points = tuple(replace(p, operations_per_s=p.operations_per_s * factor, operations_per_s_least_most=None) for p in hardware.ssd.points)
    return replace(hardware, ssd=replace(hardware.ssd, points=points))
