"""What a GPU machine gives: HBM, the bus in both directions by copy engine and by kernels, and random reads of the SSD by depth."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torchrec_mtrains.kernels import _core

from _common import median
from torchrec_mtrains.calibration.block_device import LOG_WRITE_BYTES, write_noise

GB = 1e9
ROW_BYTES = 512


def seconds_on_device(run: Any, times: int = 5) -> float:
    """Median of ``times`` runs between events, after one that does not count."""
    run()
    taken = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return median(taken)


def memory_and_bus(megabytes: int = 1024) -> dict[str, float]:
    """GB/s. ``hbm`` counts bytes read and written; ``rows`` are 512-byte rows in random order, moved by a kernel over mapped memory."""
    bytes_ = megabytes << 20
    device = torch.device("cuda")
    a, b = (torch.empty(bytes_ // 4, dtype=torch.float32, device=device).normal_() for _ in range(2))
    pinned = torch.empty(bytes_ // 4, dtype=torch.float32, pin_memory=True)
    mapped = torch.ops.fbgemm.new_unified_tensor(torch.zeros(1, device=device), [bytes_ // 4], True).view(-1, ROW_BYTES // 4)
    rows = torch.randperm(mapped.shape[0], device=device)[: mapped.shape[0] // 4]
    some = torch.empty(rows.numel(), ROW_BYTES // 4, device=device).normal_()
    moved = rows.numel() * ROW_BYTES
    both = torch.cuda.Stream()

    def two_ways() -> None:
        half = pinned[: pinned.numel() // 2], pinned[pinned.numel() // 2 :]
        both.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(both):
            half[0].copy_(b[: half[0].numel()], non_blocking=True)
        a[: half[1].numel()].copy_(half[1], non_blocking=True)
        torch.cuda.current_stream().wait_stream(both)

    return {
        "hbm_copy_gb_per_s": 2 * bytes_ / seconds_on_device(lambda: a.copy_(b)) / GB,
        "pcie_to_device_gb_per_s": bytes_ / seconds_on_device(lambda: a.copy_(pinned, non_blocking=True)) / GB,
        "pcie_to_host_gb_per_s": bytes_ / seconds_on_device(lambda: pinned.copy_(a, non_blocking=True)) / GB,
        "pcie_both_ways_gb_per_s": bytes_ / seconds_on_device(two_ways) / GB,
        "pcie_rows_to_device_gb_per_s": moved / seconds_on_device(lambda: mapped.index_select(0, rows)) / GB,
        "pcie_rows_to_host_gb_per_s": moved / seconds_on_device(lambda: mapped.index_copy_(0, rows, some)) / GB,
    }


def ssd_writes(folder: str, gigabytes: float = 1, seconds: float = 1.5) -> float:
    """Writes of 256 KiB a second, eight at once, as a volume's log writes."""
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        file = Path(inside) / "probe"
        write_noise(file, int(gigabytes * 2**30))
        return float(_core.random_io([str(file)], LOG_WRITE_BYTES, 8, 0.0, seconds).operations_per_s)


def ssd_reads(folder: str, gigabytes: float = 2, seconds: float = 1.5) -> dict[str, Any]:
    """Random 4 KiB reads a second of a file in ``folder``, by depth, on the back end that a volume there would take."""
    from torchrec_mtrains.kernels.volumes import SsdVolume

    with tempfile.TemporaryDirectory(dir=folder) as inside:
        volume = SsdVolume(paths=(inside,), capacity_bytes=64 << 20)
        backend = volume.backend
        volume.close()
        file = Path(inside) / "probe"
        write_noise(file, int(gigabytes * 2**30))
        figures: dict[str, Any] = {"backend": backend}
        for depth in (1, 16, 64, 128, 256):
            probe = _core.random_io([str(file)], 4096, depth, 1.0, seconds, backend, depth)
            figures[f"reads_per_s_at_depth_{depth}"] = probe.operations_per_s
        return figures
