"""All measurements, into one ``HardwareProfile``."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version

import torch

from ..meters import processor_name
from ..planner.hardware_profile import BlockDeviceProfile, HardwareProfile, KernelCosts
from . import block_device, gpu, lookup_costs, memory, pool_costs, step_overhead
from .effort import FULL, Effort, Said


def _machine() -> str:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor_name()}, {os.cpu_count()} cores, {gib:.0f} GiB, Linux {platform.release()}"


def _kernel_costs(paths: Sequence[str], pmem_path: str | None, effort: Effort, say: Said) -> KernelCosts:
    lookup = lookup_costs.measure(effort, say)
    pool = pool_costs.measure(paths, pmem_path, effort, say)
    overhead = step_overhead.measure(effort, say)
    return KernelCosts(
        cpu_ns_per_lookup=lookup.directory_ns_per_lookup,
        cpu_ns_per_miss=max(0.0, pool.per_missed_lookup - lookup.directory_ns_per_lookup),
        cpu_ns_per_io=pool.per_io,
        cpu_ns_per_write_back=pool.per_write_back,
        cpu_ns_per_cache_hit=pool.per_cache_hit,
        tbe_forward_ns_per_lookup=lookup.forward_ns_per_lookup,
        tbe_forward_ns_per_byte=lookup.forward_ns_per_byte,
        tbe_backward_ns_per_lookup=lookup.backward_ns_per_lookup,
        tbe_backward_ns_per_byte=lookup.backward_ns_per_byte,
        tbe_threads=torch.get_num_threads(),
        step_overhead_us_per_group=overhead.us_per_group,
        step_overhead_us_per_table=overhead.us_per_table,
        step_overhead_us_per_stock_group=overhead.us_per_stock_group,
        row_bytes=(pool_costs.RECORD_BYTES,),
    )


def calibrate(
    paths: Sequence[str] = (), pmem_path: str | None = None, *, effort: Effort = FULL, say: Said = lambda what: None
) -> HardwareProfile:
    """Measures this machine. About half a minute, with 1 GiB written to each of ``paths`` meanwhile; nothing is left there.

    ``paths``: folders on SSDs, one on each device that volumes will be striped over. ``pmem_path``: a folder on PMem, CXL memory or tmpfs.
    What has no path is absent from the profile; HBM and PCIe are there if torch sees a GPU. ``say`` hears of each measurement before it.
    Other work on the machine is measured with it.

    Raises: ConfigurationError for a folder that is missing or not writable; VolumeIoError, VolumeFullError for devices.
    """
    has_gpu = torch.cuda.is_available()
    ssd: BlockDeviceProfile | None = block_device.measure(paths, effort, say) if paths else None
    return HardwareProfile(
        machine=_machine(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        cores=os.cpu_count() or 1,
        ddr=memory.measure("DDR", "", effort, say),
        pmem=memory.measure(pmem_path, pmem_path, effort, say) if pmem_path else None,
        ssd=ssd,
        kernel=_kernel_costs(paths, pmem_path, effort, say),
        hbm=gpu.memory(effort, say) if has_gpu else None,
        pcie=gpu.link(effort, say) if has_gpu else None,
        source="mtrains calibrate, " + ", ".join(f"{package} {version(package)}" for package in ("torchrec-mtrains", "torch", "torchrec")),
    )
