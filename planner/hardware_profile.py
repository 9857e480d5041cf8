"""What a machine can do, as numbers that plans are made from. Measured by ``mtrains calibrate``, or built in from published figures.

    HardwareProfile
      ddr, hbm, pmem   MemoryProfile       loads and stores of the processor, or of the GPU for hbm
      pcie             LinkProfile         between host and GPU
      ssd              BlockDeviceProfile  points (block bytes, queue depth, read share) → operations a second
      kernel           KernelCosts         processor time of this package and of the stock TBE

A tier that the machine lacks, or that was not measured, is None: nothing is guessed. All rates are of the whole device, which ranks of a
host share; kernel costs are processor time, so more of them in a second than seconds need as many cores.

What always holds: every number is finite and positive (shares are between 0 and 1, and costs may be 0). Rates never fall as the queue
gets deeper, operations a second never rise with the block, whatever noise the points have.

``profile_files.py`` says what the file is.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from .profile_files import ProfileFormat

_FILES = ProfileFormat("hardware profile", 1, "mtrains calibrate")


def _require(ok: bool, what: str, rule: str, got: object) -> None:
    if not ok:
        raise ConfigurationError(f"{what} must be {rule}, got {got!r}; measure again with `mtrains calibrate`, or correct the profile")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require_numbers(of: Any, names: Sequence[str], *, zero: bool = False) -> None:
    rule = "a finite number ≥ 0" if zero else "a finite number > 0"
    for name in names:
        value = getattr(of, name)
        _require(_number(value) and (value >= 0 if zero else value > 0), f"{type(of).__name__}.{name}", rule, value)


def _interpolated(points: Sequence[tuple[float, float]], x: float) -> float:
    """Log y over log x between points in ascending x; the first and last y outside."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            share = math.log(x / x0) / math.log(x1 / x0)
            return min(max(y0, y1), max(min(y0, y1), math.exp((1 - share) * math.log(y0) + share * math.log(y1))))
    return points[-1][1]


@dataclass(frozen=True)
class DevicePoint:
    """One measurement of a block device: random operations of ``block_bytes``, ``queue_depth`` in flight, of which a share reads.
    ``operations_per_s_least_most``: of the rounds that ``operations_per_s`` is the median of."""

    block_bytes: int
    queue_depth: int
    read_share: float
    operations_per_s: float
    latency_us_p50: float | None = None  # None: not published
    latency_us_p99: float | None = None
    operations_per_s_least_most: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _require_numbers(self, ("block_bytes", "queue_depth", "operations_per_s"))
        _require_numbers(self, [name for name in ("latency_us_p50", "latency_us_p99") if getattr(self, name) is not None])
        _require(_number(self.read_share) and 0 <= self.read_share <= 1, "DevicePoint.read_share", "between 0 and 1", self.read_share)
        span = self.operations_per_s_least_most
        known = span is None or (len(span) == 2 and all(map(_number, span)) and 0 < span[0] <= self.operations_per_s <= span[1])
        _require(known, "DevicePoint.operations_per_s_least_most", "numbers > 0 round operations_per_s", span)


@dataclass(frozen=True)
class BlockDeviceProfile:
    """A block device, or several that a volume is striped over, as they work together."""

    name: str
    points: tuple[DevicePoint, ...]
    source: str = ""

    def __post_init__(self) -> None:
        _require(len(self.points) > 0, "BlockDeviceProfile.points", "at least one point", self.points)

    def operations_per_s(self, block_bytes: float, queue_depth: float, read_share: float = 1.0) -> float:
        """Random operations a second of all processes together.

        Between points: log over log in depth and in block bytes; the time of an operation linear in the read share. Above the deepest queue
        nothing is gained, below the shallowest it is in proportion to depth. Smaller blocks than the smallest gain nothing; larger
        ones than the largest move as many bytes a second. Shares outside the points' are the nearest point's.
        """
        of_share = sorted({p.read_share for p in self.points})
        seconds = [1 / self._of_share(share, block_bytes, queue_depth) for share in of_share]
        if read_share <= of_share[0]:
            return 1 / seconds[0]
        for i, upper in enumerate(of_share[1:], start=1):
            if read_share <= upper:
                part = (read_share - of_share[i - 1]) / (upper - of_share[i - 1])
                return 1 / ((1 - part) * seconds[i - 1] + part * seconds[i])
        return 1 / seconds[-1]

    def bytes_per_s(self, block_bytes: float, queue_depth: float, read_share: float = 1.0) -> float:
        """The bytes that these operations move in a second."""
        return block_bytes * self.operations_per_s(block_bytes, queue_depth, read_share)

    def latency_us(self, block_bytes: float, queue_depth: float, read_share: float = 1.0) -> float:
        """Mean time of an operation, by Little's law."""
        return 1e6 * queue_depth / self.operations_per_s(block_bytes, queue_depth, read_share)

    def _of_share(self, share: float, block_bytes: float, queue_depth: float) -> float:
        mine = [p for p in self.points if p.read_share == share]
        by_block, least = [], math.inf
        for block in sorted({p.block_bytes for p in mine}):
            least = min(least, self._of_block([p for p in mine if p.block_bytes == block], queue_depth))
            by_block.append((float(block), least))
        largest = by_block[-1][0]
        return _interpolated(by_block, block_bytes) * min(1.0, largest / block_bytes)

    @staticmethod
    def _of_block(mine: Sequence[DevicePoint], queue_depth: float) -> float:
        by_depth, most = [], 0.0
        for point in sorted(mine, key=lambda p: p.queue_depth):
            most = max(most, point.operations_per_s)
            by_depth.append((float(point.queue_depth), most))
        return _interpolated(by_depth, queue_depth) * min(1.0, queue_depth / by_depth[0][0])


@dataclass(frozen=True)
class MemoryProfile:
    """Byte-addressable memory. ``random_read_rows_per_s``: rows of so many bytes, each anywhere, copied out by one core; none: the
    bandwidth bounds them. ``latency_ns`` None: not measured. A GPU's rows, and published ones, are of the whole device."""

    name: str
    read_bytes_per_s: float
    write_bytes_per_s: float
    random_read_rows_per_s: tuple[tuple[int, float], ...] = ()
    latency_ns: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        _require_numbers(self, ("read_bytes_per_s", "write_bytes_per_s", *(("latency_ns",) if self.latency_ns is not None else ())))
        ok = all(_number(b) and _number(r) and b > 0 and r > 0 for b, r in self.random_read_rows_per_s)
        _require(ok, "MemoryProfile.random_read_rows_per_s", "pairs of numbers > 0", self.random_read_rows_per_s)

    def random_rows_per_s(self, row_bytes: float) -> float:
        """Interpolated like ``BlockDeviceProfile``: never more for longer rows; beyond the longest as many bytes a second."""
        if not self.random_read_rows_per_s:
            return self.read_bytes_per_s / row_bytes
        points, least = [], math.inf
        for size, rows_per_s in sorted(self.random_read_rows_per_s):
            least = min(least, rows_per_s)
            points.append((float(size), least))
        return _interpolated(points, row_bytes) * min(1.0, points[-1][0] / row_bytes)


@dataclass(frozen=True)
class LinkProfile:
    """Between host and GPU: from pinned memory, to it, and the sum of both ways at once."""

    name: str
    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    both_bytes_per_s: float
    source: str = ""

    def __post_init__(self) -> None:
        _require_numbers(self, ("h2d_bytes_per_s", "d2h_bytes_per_s", "both_bytes_per_s"))


@dataclass(frozen=True)
class KernelCosts:
    """Processor time, and for the stock TBE wall time.

    ===================== ===========================================================================================================
    cpu_ns_per_lookup     an id of a batch whose rows are in the pool: directory, ticket, release
    cpu_ns_per_miss       a row more that is missed: eviction of a clean victim, read from memory behind the pool, admission
    cpu_ns_per_io         what a read of the SSD adds; a miss costs 1 ÷ (rows an I/O) of them. None: no SSD was measured
    cpu_ns_per_write_back what a victim adds when it is dirty and put into an SSD's log, its share of the writes included. None likewise
    cpu_ns_per_cache_hit  what a row adds that comes from a PmemCache, into which the victim goes. None: no PMem was measured
    tbe_…_ns_per_lookup   forward, and backward with its fused optimizer, on ``tbe_threads`` of torch: a line in the bytes of
    tbe_…_ns_per_byte     a row's weights
    step_overhead_us_…    a training step through TorchRec's modules of a tiered group, with next to no lookups: the first table included
    per_group, per_table  in the group's; each further table
    per_stock_group       what tables in memory add beside it, being a group of their own
    ===================== ===========================================================================================================

    ``row_bytes``: the records with which the first five were measured.
    """

    cpu_ns_per_lookup: float
    cpu_ns_per_miss: float
    tbe_forward_ns_per_lookup: float
    tbe_forward_ns_per_byte: float
    tbe_backward_ns_per_lookup: float
    tbe_backward_ns_per_byte: float
    tbe_threads: int
    step_overhead_us_per_group: float
    step_overhead_us_per_table: float
    row_bytes: tuple[int, ...]
    cpu_ns_per_io: float | None = None
    cpu_ns_per_write_back: float | None = None
    cpu_ns_per_cache_hit: float | None = None
    step_overhead_us_per_stock_group: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        costs = [f.name for f in dataclasses.fields(self) if f.name not in ("row_bytes", "source", "tbe_threads")]
        _require_numbers(self, [name for name in costs if getattr(self, name) is not None], zero=True)
        _require_numbers(self, ("tbe_threads",))

    def tbe_forward_s(self, lookups: float, row_bytes: float) -> float:
        """The stock TBE's forward of so many lookups of rows with so many bytes of weights, wall time."""
        return lookups * (self.tbe_forward_ns_per_lookup + row_bytes * self.tbe_forward_ns_per_byte) * 1e-9

    def tbe_backward_s(self, lookups: float, row_bytes: float) -> float:
        """Its backward and fused optimizer, wall time."""
        return lookups * (self.tbe_backward_ns_per_lookup + row_bytes * self.tbe_backward_ns_per_byte) * 1e-9


@dataclass(frozen=True)
class HardwareProfile:
    """A machine. ``machine``: for people; ``date``: ISO, of the measurement; ``source``: how these numbers came to be."""

    machine: str
    date: str
    cores: int
    ddr: MemoryProfile
    kernel: KernelCosts
    hbm: MemoryProfile | None = None
    pcie: LinkProfile | None = None
    pmem: MemoryProfile | None = None
    ssd: BlockDeviceProfile | None = None
    source: str = ""

    def __post_init__(self) -> None:
        _require_numbers(self, ("cores",))

    def save(self, path: str | Path) -> None:
        """Writes JSON, whole or not at all.

        Raises: ConfigurationError when the file cannot be written.
        """
        _FILES.save(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> HardwareProfile:
        """Raises: ConfigurationError for what is no profile, or one of a newer version."""
        return _FILES.load(path, _profile)


def _device_point(read: dict[str, Any]) -> DevicePoint:
    span = read.get("operations_per_s_least_most")
    return DevicePoint(**read | {"operations_per_s_least_most": span and tuple(span)})


def _profile(read: dict[str, Any]) -> HardwareProfile:
    def memory(of: dict[str, Any] | None) -> MemoryProfile | None:
        return (
            None if of is None else MemoryProfile(**of | {"random_read_rows_per_s": tuple((b, r) for b, r in of["random_read_rows_per_s"])})
        )

    ssd, pcie, kernel = read["ssd"], read["pcie"], read["kernel"]
    return HardwareProfile(
        **read
        | {name: memory(read[name]) for name in ("ddr", "hbm", "pmem")}
        | {
            "pcie": pcie and LinkProfile(**pcie),
            "ssd": ssd and BlockDeviceProfile(**ssd | {"points": tuple(map(_device_point, ssd["points"]))}),
            "kernel": KernelCosts(**kernel | {"row_bytes": tuple(kernel["row_bytes"])}),
        }
    )
