"""The machine that plans assume where nobody measured one: the project's reference box, a virtual machine with an NVMe device."""

from __future__ import annotations

from dataclasses import replace

from .built_in_hardware import DDR4, H200, OPTANE_PMEM
from .hardware_profile import BlockDeviceProfile, DevicePoint, HardwareProfile, KernelCosts
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
        kernel=KernelCosts(
            cpu_ns_per_lookup=4.0,
            cpu_ns_per_miss=98.0,
            tbe_forward_ns_per_lookup=0.0,
            tbe_forward_ns_per_byte=0.072,
            tbe_backward_ns_per_lookup=0.8,
            tbe_backward_ns_per_byte=0.118,
            tbe_threads=2,
            step_overhead_us_per_group=0.0,
            step_overhead_us_per_table=0.0,
            row_bytes=(260,),
            cpu_ns_per_io=2045.0,
            cpu_ns_per_write_back=175.0,
            cpu_ns_per_cache_hit=100.0,  # guess: a copy of a record and an entry of an index; the box has no PMem
            source=_MEASURED,
        ),
        source="nobody measured this machine: run `mtrains calibrate` and give its profile",
    )
