"""The machine that plans assume where nobody measured one: the project's reference box, a virtual machine with an NVMe device."""

from __future__ import annotations

from dataclasses import replace

from .built_in_hardware import DDR4, H200, KERNEL, OPTANE_PMEM
from .hardware_profile import BlockDeviceProfile, DevicePoint, HardwareProfile
from .topology import TieredTopology

_MEASURED = "2 cores AMD EPYC, virtio NVMe, 2026-11-25"


def assumed_hardware(topology: TieredTopology) -> HardwareProfile:
    """Hosts with the reference box's device each, and its two cores for every rank; for GPUs, the H200 that was measured, one a rank."""
    if topology.compute_device == "cuda":
        source = "nobody measured this machine: run `mtrains calibrate` there and give its profile"
        return replace(H200, machine=f"assumed: {H200.machine}", cores=H200.cores * topology.ranks_per_host, source=source)
    points = [
        (4096, 1, 1.0, 15_000.0),
        (4096, 64, 1.0, 76_000.0),
        (4096, 128, 1.0, 76_000.0),
        (1 << 20, 8, 0.0, 3_050.0),
        (1 << 20, 8, 1.0, 3_050.0),
    ]
    return HardwareProfile(
        machine=f"assumed: {_MEASURED}",
        date="2026-11-25",
        cores=2 * topology.ranks_per_host,
        ddr=DDR4,
        pmem=OPTANE_PMEM,
        ssd=BlockDeviceProfile("virtio NVMe", tuple(DevicePoint(*point) for point in points), source=_MEASURED),
        kernel=KERNEL,
        source="nobody measured this machine: run `mtrains calibrate` and give its profile",
    )
