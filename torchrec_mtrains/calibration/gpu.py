"""A GPU's memory, and the link between it and pinned host memory."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen

from ..planner.hardware_profile import LinkProfile, MemoryProfile
from .effort import Effort, Said
from .memory import ROW_BYTES

WARM = 2
LOOKUPS, LOOKUPS_A_BAG = 8 << 20, 16
"""Of rows at random places: enough that launching the kernel takes no part of its time."""

_FLOAT_BYTES = 4


def _seconds(effort: Effort, run: Callable[[], object]) -> float:
    """Median time of a call, by events on the current stream, which ``run`` must leave with all that it began."""
    times = []
    for number in range(WARM + effort.rounds * effort.steps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        if number >= WARM:
            times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def _rows_per_s(effort: Effort, row_bytes: int) -> float:
    """Rows at random places, summed by the stock TBE's kernel; torch's own gathering takes 0.6 ns a row, however short."""
    dim, rows = row_bytes // _FLOAT_BYTES, effort.area_bytes // row_bytes
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)], bounds_check_mode=BoundsCheckMode.NONE, device=torch.device("cuda")
    )
    ids = torch.randint(rows, (LOOKUPS,), device="cuda")
    offsets = torch.arange(0, LOOKUPS + 1, LOOKUPS_A_BAG, device="cuda")
    with torch.no_grad():
        return LOOKUPS / _seconds(effort, lambda: table(ids, offsets))


def memory(effort: Effort, say: Said) -> MemoryProfile:
    """The current device's. Random rows are of the whole device, not of one core."""
    say(f"memory of {torch.cuda.get_device_name()}")
    area = torch.ones(effort.area_bytes // _FLOAT_BYTES, device="cuda")
    rows_per_s = [(row_bytes, _rows_per_s(effort, row_bytes)) for row_bytes in ROW_BYTES]
    return MemoryProfile(
        torch.cuda.get_device_name(),
        read_bytes_per_s=effort.area_bytes / _seconds(effort, area.sum),
        write_bytes_per_s=effort.area_bytes / _seconds(effort, lambda: area.fill_(2.0)),
        random_read_rows_per_s=tuple(rows_per_s),
    )


def link(effort: Effort, say: Said) -> LinkProfile:
    """Copies of a half of the area each way."""
    say(f"link of {torch.cuda.get_device_name()}")
    bytes_ = effort.area_bytes // 2
    host = [torch.ones(bytes_, dtype=torch.uint8).pin_memory() for _ in range(2)]
    device = [torch.ones(bytes_, dtype=torch.uint8, device="cuda") for _ in range(2)]
    other = torch.cuda.Stream()

    def to_device() -> None:
        device[0].copy_(host[0], non_blocking=True)

    def to_host() -> None:
        host[1].copy_(device[1], non_blocking=True)

    def both() -> None:
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            to_host()
        to_device()
        torch.cuda.current_stream().wait_stream(other)

    return LinkProfile(
        f"host to {torch.cuda.get_device_name()}",
        h2d_bytes_per_s=bytes_ / _seconds(effort, to_device),
        d2h_bytes_per_s=bytes_ / _seconds(effort, to_host),
        both_bytes_per_s=2 * bytes_ / _seconds(effort, both),
    )
