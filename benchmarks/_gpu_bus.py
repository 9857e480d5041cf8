"""What the bus gives to rows that lie scattered in host memory: by kernels that load and store, both ways at once, the best of several.

An upper bound of what an exchange of records can get, whatever else it does. The rows are in the order of addresses, as an exchange has them
(docs/architecture.md), or side by side.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torchrec_mtrains.kernels.device_planes import _mapped

from _gpu_machine import GB, seconds_on_device

TILES, PROGRAMS, WARPS = (2048, 4096, 8192), (22, 33, 66, 132, 264), (1, 2, 4)
"""Elements of a tile; programs; and their warps."""


@triton.jit
def _move(host, device, places, count, READ: tl.constexpr, WRITE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
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


class HostRows:
    """``host_rows`` rows of ``columns`` floats in host memory, of which ``moved`` come and go."""

    def __init__(self, columns: int, host_rows: int, moved: int) -> None:
        self.columns, self.moved, self.bytes_one_way = columns, moved, moved * columns * 4
        self.device = torch.zeros(moved, columns, device="cuda")
        self.host = _mapped(host_rows * columns, self.device)
        self.host.zero_()
        self.scattered = torch.randperm(host_rows, device="cuda")[:moved].sort().values
        self.dense = torch.arange(moved, device="cuda")

    def move(self, places: torch.Tensor, cut: tuple[int, int, int], read: bool = True, write: bool = True) -> None:
        """On the current stream. ``cut``: elements of a tile, programs, warps."""
        tile, programs, warps = cut
        _move[(programs,)](
            self.host, self.device, places, self.moved, READ=read, WRITE=write, ROWS=tile // self.columns, COLUMNS=self.columns, num_warps=warps
        )  # fmt: skip

    def gb_per_s(self, places: torch.Tensor, cuts: Any = None) -> tuple[float, tuple[int, int, int]]:
        """Both directions together, of the best cut."""
        return max(
            (2 * self.bytes_one_way / seconds_on_device(lambda cut=cut: self.move(places, cut), 3) / GB, cut)
            for cut in cuts or itertools.product(TILES, PROGRAMS, WARPS)
        )
