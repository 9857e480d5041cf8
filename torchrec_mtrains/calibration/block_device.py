"""A block device with nothing above it: random reads and writes of a file through the volume's own I/O engines.

Reads come first until they have settled (``settling.py``). Then points are measured in rounds, in an order drawn anew for each, because
virtual devices give credit after idling; each point is the median of its rounds, and has the least and most of them. The file has been
written, so that no read is of a hole and no write allocates.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..errors import ConfigurationError
from ..kernels import _core
from ..planner.hardware_profile import BlockDeviceProfile, DevicePoint
from .effort import Effort, Said
from .settling import until_settled

PAGE_BYTES = 4096
LOG_WRITE_BYTES = 256 << 10  # of the log's writes

READS = [(block, depth, 1.0) for block in (PAGE_BYTES, 16 << 10, 64 << 10) for depth in (1, 8, 32, 256)]
MIXED = [(block, depth, 0.5) for block in (PAGE_BYTES, 64 << 10) for depth in (32, 256)]
WRITES = [(PAGE_BYTES, depth, 0.0) for depth in (8, 256)] + [(LOG_WRITE_BYTES, depth, 0.0) for depth in (1, 8)]
POINTS = READS + MIXED + WRITES
"""(block bytes, queue depth, read share)"""

DEEP_READS = (PAGE_BYTES, 256, 1.0)
"""What a volume does most."""

_CHUNK_BYTES = 1 << 20


def write_noise(file: Path, file_bytes: int) -> None:
    """Whole mebibytes of incompressible bytes, on the device when this returns."""
    block = np.random.default_rng(0).bytes(_CHUNK_BYTES)
    with file.open("wb") as out:
        for _ in range(max(1, file_bytes // _CHUNK_BYTES)):
            out.write(block)
        out.flush()
        os.fsync(out.fileno())


@contextmanager
def _noise(folder: str, file_bytes: int) -> Iterator[str]:
    try:
        with tempfile.TemporaryDirectory(prefix="mtrains_calibrate_", dir=folder) as inside:
            file = Path(inside) / "noise"
            write_noise(file, file_bytes)
            yield str(file)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as e:
        raise ConfigurationError(f"--path must name a folder that can be written, got {folder!r}: {e}") from e


def _together(pool: ThreadPoolExecutor, files: Sequence[str], point: tuple[int, int, float], seconds: float, seed: int) -> list[Any]:
    block, depth, share = point
    each = max(1, depth // len(files))
    return list(pool.map(lambda file: _core.random_io([file], block, each, share, seconds, seed=seed), files))


def measure(paths: Sequence[str], effort: Effort, say: Said) -> BlockDeviceProfile:
    """The device of a folder, or those of several folders at work together, as a volume that is striped over them uses them.

    Raises: ConfigurationError for a folder that is missing or not writable, VolumeIoError for a device that fails.
    """
    order = np.random.default_rng(0)
    probes: dict[tuple[int, int, float], list[list[Any]]] = {point: [] for point in POINTS}
    with ExitStack() as files, ThreadPoolExecutor(len(paths)) as pool:
        say(f"{', '.join(paths)}: writing {len(paths) * effort.file_bytes >> 20:,} MiB")
        made = [files.enter_context(_noise(path, effort.file_bytes)) for path in paths]
        say(f"{', '.join(paths)}: reading until it has settled")
        until_settled(lambda number: _rate(_together(pool, made, DEEP_READS, effort.probe_seconds, number)))
        for round_ in range(effort.rounds):
            for number in order.permutation(len(POINTS)):
                point = POINTS[number]
                say(f"{', '.join(paths)}: {point[0] >> 10} KiB, depth {point[1]}, {point[2]:.0%} reads, round {round_ + 1}")
                probes[point].append(_together(pool, made, point, effort.probe_seconds, round_))
    return BlockDeviceProfile(", ".join(paths), tuple(_point(point, rounds) for point, rounds in probes.items()))


def _rate(together: list[Any]) -> float:
    return float(sum(p.operations_per_s for p in together))


def _point(point: tuple[int, int, float], rounds: list[list[Any]]) -> DevicePoint:
    rates = [_rate(together) for together in rounds]
    return DevicePoint(
        *point,
        operations_per_s=median(rates),
        operations_per_s_least_most=(min(rates), max(rates)),
        latency_us_p50=median(median(p.latency_us_p50 for p in together) for together in rounds),
        latency_us_p99=median(max(p.latency_us_p99 for p in together) for together in rounds),
    )
