"""Built-in profiles: machines made of published figures of their devices, and a calibrated one. Each constant has its source beside it.

Published figures are few: a device's rates at their best, and the latency of one operation. Points between follow from Little's law: up
to rate × latency operations in flight each takes the latency, and beyond that the rate is reached. So they promise more than a device
holds in between, and latencies are not predicted beyond that depth. ``mtrains calibrate`` measures instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .hardware_profile import BlockDeviceProfile, DevicePoint, HardwareProfile, KernelCosts, LinkProfile, MemoryProfile

_PAGE_BYTES = 4096
_LARGE_BYTES = 256 << 10

_MYNVM = "Eisenman et al., Reducing DRAM Footprint with NVM in Facebook, EuroSys 2018, Table 1"
_OPTANE_PMEM = "Intel Optane Persistent Memory 100, six DIMMs of a socket: Yang et al., FAST 2020; 256-byte granularity"
_P4800X = "Intel Optane SSD DC P4800X, product brief"
_PM9A3 = "Samsung PM9A3, U.2: announcement of May 2020 (computerbase.de/2020-05/samsung-pm9a3-e1.s-pcie-4.0-ssd)"
_TLC_LATENCY = "latency of TLC: Intel P4500, Lenovo product guide (read 85 µs, write 20 µs)"


@dataclass(frozen=True)
class _Published:
    """One direction of a block device."""

    pages_per_s: float
    bytes_per_s: float
    latency_us: float

    def points(self, read_share: float) -> list[DevicePoint]:
        large_us = self.latency_us + 1e6 * _LARGE_BYTES / self.bytes_per_s
        of_block = ((_PAGE_BYTES, self.latency_us, self.pages_per_s), (_LARGE_BYTES, large_us, self.bytes_per_s / _LARGE_BYTES))
        return [point for block, us, rate in of_block for point in _until_saturated(block, us, rate, read_share)]


def _until_saturated(block_bytes: int, latency_us: float, operations_per_s: float, read_share: float) -> list[DevicePoint]:
    alone = min(operations_per_s, 1e6 / latency_us)
    saturating = math.ceil(operations_per_s * latency_us / 1e6)
    points = [DevicePoint(block_bytes, 1, read_share, alone)]
    return points if saturating <= 1 else [*points, DevicePoint(block_bytes, saturating, read_share, operations_per_s)]


def _device(name: str, reads: _Published, writes: _Published, source: str) -> BlockDeviceProfile:
    return BlockDeviceProfile(name, (*reads.points(1.0), *writes.points(0.0)), source)


DDR4 = MemoryProfile("DDR4-2400", 75e9, 75e9, latency_ns=75, source=_MYNVM)

OPTANE_PMEM = MemoryProfile(
    "Optane PMem 100, six DIMMs",
    read_bytes_per_s=39.4e9,
    write_bytes_per_s=13.9e9,
    random_read_rows_per_s=((64, 39.4e9 / 256), (256, 39.4e9 / 256)),  # of the device: less than its granularity costs as much
    latency_ns=305,
    source=_OPTANE_PMEM,
)

OPTANE_SSD = _device("Optane SSD P4800X", _Published(550e3, 2.4e9, 10), _Published(500e3, 2.0e9, 10), _P4800X)

NAND_2018 = _device(
    "TLC NAND SSD of 2018",
    _Published(1.3e9 / _PAGE_BYTES, 1.3e9, 100),  # pages a second are not given: those that its bandwidth has room for
    _Published(0.8e9 / _PAGE_BYTES, 0.8e9, 14),
    _MYNVM,
)

NVME_GEN4 = _device("Samsung PM9A3", _Published(900e3, 6.5e9, 85), _Published(200e3, 3.5e9, 20), f"{_PM9A3}; {_TLC_LATENCY}")

KERNEL = KernelCosts(
    cpu_ns_per_lookup=3.9,
    cpu_ns_per_miss=92,
    cpu_ns_per_io=2110,
    cpu_ns_per_write_back=130,
    cpu_ns_per_cache_hit=95,
    tbe_forward_ns_per_lookup=4.6,
    tbe_forward_ns_per_byte=0.028,
    tbe_backward_ns_per_lookup=9.1,
    tbe_backward_ns_per_byte=0.058,
    tbe_threads=2,
    step_overhead_us_per_group=820,
    step_overhead_us_per_table=4,
    row_bytes=(260,),
    source="mtrains calibrate on 2 cores of an AMD EPYC, 2026-11-25: between those of two runs",
)


def _machine(name: str, ssd: BlockDeviceProfile, pmem: MemoryProfile | None = None) -> HardwareProfile:
    return HardwareProfile(name, "2026-11-25", 32, DDR4, KERNEL, pmem=pmem, ssd=ssd, source="published figures, 32 cores assumed")


_H200 = "measured: mtrains calibrate on a machine with one H200, 16 cores of an Intel Xeon and a virtio NVMe, torch 2.11, 2026-11-26"

_H200_SSD = (  # block bytes, queue depth, read share, operations/s, µs p50, µs p99
    (4096, 1, 1.0, 34500, 27.4, 48.9),
    (4096, 8, 1.0, 94600, 77.2, 393),
    (4096, 32, 1.0, 78400, 367, 930),
    (4096, 128, 1.0, 106000, 1190, 2550),
    (16384, 1, 1.0, 26500, 35, 62.1),
    (16384, 8, 1.0, 58600, 140, 300),
    (16384, 32, 1.0, 62100, 496, 948),
    (16384, 128, 1.0, 68500, 1830, 3000),
    (65536, 1, 1.0, 17700, 53.6, 84.8),
    (65536, 8, 1.0, 23800, 260, 734),
    (65536, 32, 1.0, 28500, 1090, 1630),
    (65536, 128, 1.0, 31500, 4140, 6220),
    (4096, 32, 0.5, 48900, 632, 1160),
    (4096, 128, 0.5, 59100, 2120, 3690),
    (65536, 32, 0.5, 23800, 1300, 1750),
    (65536, 128, 0.5, 27000, 4960, 7530),
    (4096, 8, 0.0, 25800, 238, 874),
    (4096, 128, 0.0, 41400, 3280, 4520),
    (262144, 1, 0.0, 9330, 102, 161),
    (262144, 8, 0.0, 10100, 750, 1160),
)

H200 = HardwareProfile(
    "NVIDIA H200, 16 cores of an Intel Xeon, virtio NVMe",
    "2026-11-26",
    cores=16,
    ddr=MemoryProfile(
        "DDR",
        read_bytes_per_s=149e9,
        write_bytes_per_s=266e9,
        random_read_rows_per_s=((64, 4.83e7), (128, 3.8e7), (256, 2.24e7), (512, 1.16e7), (1024, 6.27e6)),
        latency_ns=149,
        source=_H200,
    ),
    kernel=KernelCosts(
        cpu_ns_per_lookup=11.2,
        cpu_ns_per_miss=200,
        cpu_ns_per_io=2560,
        cpu_ns_per_write_back=0,
        tbe_forward_ns_per_lookup=0,
        tbe_forward_ns_per_byte=0.151,
        tbe_backward_ns_per_lookup=276,
        tbe_backward_ns_per_byte=0.0871,
        tbe_threads=16,
        step_overhead_us_per_group=1330,
        step_overhead_us_per_table=23.9,
        row_bytes=(260,),
        source=_H200 + "; the processor's, as all kernel costs",
    ),
    hbm=MemoryProfile(
        "NVIDIA H200",
        read_bytes_per_s=3.48e12,
        write_bytes_per_s=4.13e12,
        random_read_rows_per_s=((64, 2.59e10), (128, 2.38e10), (256, 1.46e10), (512, 7.91e9), (1024, 4.27e9)),
        source=_H200 + "; rows in a second run",
    ),
    pcie=LinkProfile("host to NVIDIA H200", 55.2e9, 55.1e9, 96.2e9, source=_H200),
    ssd=BlockDeviceProfile("virtio NVMe beside an H200", tuple(DevicePoint(*point) for point in _H200_SSD), _H200),
    source=_H200,
)


def hardware_profiles() -> dict[str, HardwareProfile]:
    """By name:

    nvme-gen4   DDR4 and one Samsung PM9A3, a TLC drive on PCIe 4.0
    nand-2018   DDR4 and the TLC drive of MyNVM
    optane      DDR4, Optane PMem 100 and one Optane P4800X: MTrainS's tiers
    h200        one NVIDIA H200 and what stood beside it, measured by ``mtrains calibrate``
    """
    return {
        "nvme-gen4": _machine("DDR4-2400, Samsung PM9A3", NVME_GEN4),
        "nand-2018": _machine("DDR4-2400, TLC NAND SSD of 2018", NAND_2018),
        "optane": _machine("DDR4-2400, Optane PMem 100, Optane SSD P4800X", OPTANE_SSD, OPTANE_PMEM),
        "h200": H200,
    }
