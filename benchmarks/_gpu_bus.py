"""What the bus gives to rows that lie scattered in host memory: the best of many plain kernels that load and store, as an upper bound of
what an exchange of records can get, whatever else it does. And to such kernels in one direction beside copies in the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torchrec_mtrains.kernels.device_planes import _mapped

from _gpu_machine import GB, ROW_BYTES, seconds_on_device

Cut = tuple[int, int, int]
CUTS: list[Cut] = list(itertools.product((2048, 4096, 8192), (22, 33, 66, 132, 264), (1, 2, 4)))
"""Elements of a tile, programs, and their warps."""

COLUMNS = ROW_BYTES // 4
COPIES = 4
"""Blocks that are copied one after the other beside as many launches, so that beginning and end matter less."""


@triton.jit
def _move(  # type: ignore[no-untyped-def]
    host, device, places, count, READ: tl.constexpr, WRITE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    column = tl.arange(0, COLUMNS)
    first = tl.program_id(0) * ROWS
    while first < count:
        at = first + tl.arange(0, ROWS)
        here = (at < count)[:, None]
        there = host + tl.load(places + at, mask=at < count, other=0)[:, None] * COLUMNS + column[None, :]
        mine = device + at.to(tl.int64)[:, None] * COLUMNS + column[None, :]
        if READ:
            comes = tl.load(there, mask=here)
        if WRITE:
            tl.store(there, tl.load(mine, mask=here), mask=here)
        if READ:
            tl.store(mine, comes, mask=here)
        first += tl.num_programs(0) * ROWS


class _Rows:
    """``count`` of ``host_rows`` rows of host memory, in the order of addresses; scattered, or side by side."""

    def __init__(self, host_rows: int, count: int) -> None:
        self.count, self.bytes_one_way = count, count * ROW_BYTES
        self.device = torch.zeros(count, COLUMNS, device="cuda")
        self.host = _mapped(host_rows * COLUMNS, self.device)
        self.host.zero_()
        self.places = [torch.randperm(host_rows, device="cuda")[:count].sort().values, torch.arange(count, device="cuda")]

    def move(self, places: torch.Tensor, cut: Cut, read: bool, write: bool) -> None:
        """On the current stream."""
        tile, programs, warps = cut
        _move[(programs,)](
            self.host, self.device, places, self.count, READ=read, WRITE=write, ROWS=tile // COLUMNS, COLUMNS=COLUMNS, num_warps=warps
        )  # fmt: skip

    def best(self, launches: int, move: Callable[[torch.Tensor, Cut], None]) -> float:
        """GB/s of both directions together, of ``launches`` of each."""
        return max(
            2 * launches * self.bytes_one_way / seconds_on_device(lambda p=p, c=c: move(p, c), 3) / GB  # type: ignore[misc]
            for p, c in itertools.product(self.places, CUTS)
        )


def rows_and_bus(host_rows: int, count: int) -> dict[str, float]:
    """GB/s of both directions together."""
    rows, side = _Rows(host_rows, count), torch.cuda.Stream()
    block, source = torch.empty(count, COLUMNS, pin_memory=True), torch.zeros(count, COLUMNS, device="cuda")

    def beside_copies(reads: bool) -> Callable[[torch.Tensor, Cut], None]:
        to, from_ = (block, source) if reads else (source, block)

        def move(places: torch.Tensor, cut: Cut) -> None:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(COPIES):
                    to.copy_(from_, non_blocking=True)
            for _ in range(COPIES):
                rows.move(places, cut, reads, not reads)
            torch.cuda.current_stream().wait_stream(side)

        return move

    result: dict[str, Any] = {
        "pcie_rows_both_ways_gb_per_s": rows.best(1, lambda places, cut: rows.move(places, cut, True, True)),
        "pcie_rows_in_copies_out_gb_per_s": rows.best(COPIES, beside_copies(True)),
        "pcie_rows_out_copies_in_gb_per_s": rows.best(COPIES, beside_copies(False)),
    }
    return result
