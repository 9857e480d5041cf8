"""Host memory, and a byte-addressable device through files mapped as a ``PmemCache`` maps them."""

from __future__ import annotations

import os
from statistics import median

from ..kernels import _core
from ..planner.hardware_profile import MemoryProfile
from .effort import Effort, Said

ROW_BYTES = (64, 128, 256, 512, 1024)


def measure(name: str, folder: str, effort: Effort, say: Said) -> MemoryProfile:
    """``folder`` "": host memory. Bandwidths on every core, rows and latency on one.

    Raises: VolumeIoError, VolumeFullError for a folder that is missing, not writable or too small.
    """
    probes = []
    for round_ in range(effort.rounds):
        say(f"{name}: round {round_ + 1}")
        probes.append(_core.probe_memory(folder, effort.area_bytes, os.cpu_count() or 1, ROW_BYTES, effort.probe_seconds, seed=round_))
    return MemoryProfile(
        name,
        read_bytes_per_s=median(p.read_bytes_per_s for p in probes),
        write_bytes_per_s=median(p.write_bytes_per_s for p in probes),
        random_read_rows_per_s=tuple((b, median(p.rows_per_s[i] for p in probes)) for i, b in enumerate(ROW_BYTES)),
        latency_ns=median(p.latency_ns for p in probes),
    )
