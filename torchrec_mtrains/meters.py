"""Measuring a training process from within: where a step's time goes, peak memory, and what its disk did."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path

_SECTOR_BYTES = 512  # /proc/diskstats counts sectors of 512 bytes whatever the device's (Documentation/admin-guide/iostats.rst)

PHASES = ("data", "lookup", "dense forward", "backward and update", "dense optimizer", "pipeline")


def processor_name() -> str:
    """As Linux names it, or else Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


class StepClock:
    """Splits a step's wall time among ``PHASES``: each ``lap`` charges the time since the last one to a phase.

    Every moment between ``start`` and ``stop`` belongs to exactly one phase, so the phases add up to the step.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._mark: float | None = None

    def start(self) -> None:
        """Begin a step: forget the laps of the one before."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._mark = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Charge the time since the last lap to ``phase``. Outside a step this does nothing."""
        if self._mark is not None:
            now = time.perf_counter()
            self.seconds[phase] += now - self._mark
            self._mark = now

    def stop(self, phase: str) -> float:
        """End the step and return its seconds."""
        self.lap(phase)
        self._mark = None
        return sum(self.seconds.values())


def keep_freed_memory_small(threshold_bytes: int = 1 << 20) -> None:
    """Have glibc give memory that a step frees back to the system.

    By itself it raises its thresholds with every large buffer that is freed and keeps up to 64 MiB, more or less by chance, so
    that a process's resident memory says little about what it holds. Elsewhere than on glibc this does nothing.
    """
    m_trim_threshold = -1  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_trim_threshold, threshold_bytes)


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far.

    ``VmHWM`` where there is a /proc, because ``getrusage`` still counts what the process was before its exec.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class DiskCounters:
    """What a block device has done since boot, for every process on the machine."""

    device: str
    reads: int
    read_bytes: int
    writes: int
    written_bytes: int

    def since(self, before: DiskCounters) -> DiskCounters:
        """The difference to an earlier reading of the same device."""
        return DiskCounters(
            self.device,
            self.reads - before.reads,
            self.read_bytes - before.read_bytes,
            self.writes - before.writes,
            self.written_bytes - before.written_bytes,
        )


def disk_counters(path: str | Path) -> DiskCounters | None:
    """The counters of the device that holds ``path``; None where the kernel does not show one (overlay, tmpfs, btrfs)."""
    try:
        device = os.stat(path).st_dev
        number = [str(os.major(device)), str(os.minor(device))]
        for line in Path("/proc/diskstats").read_text().splitlines():
            fields = line.split()
            if fields[:2] == number:
                reads, read_sectors, writes, written_sectors = (int(fields[i]) for i in (3, 5, 7, 9))
                return DiskCounters(fields[2], reads, read_sectors * _SECTOR_BYTES, writes, written_sectors * _SECTOR_BYTES)
    except OSError:
        pass
    return None
