"""Dense parts of a chosen weight: top MLPs of a DLRM that take about so many milliseconds forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec.models.dlrm import OverArch

from _common import seconds

LAYERS = 3
_TRIES = 6


def top(inputs: int, width: int) -> OverArch:
    torch.manual_seed(width)
    return OverArch(inputs, [width] * LAYERS + [1])


def dense_ms(inputs: int, width: int, batch_size: int) -> float:
    """Forward and backward, of the inputs too, as a step has them. The least of several: what else runs on the machine is not theirs."""
    arch, features = top(inputs, width), torch.rand(batch_size, inputs, requires_grad=True)
    return 1e3 * min(seconds(lambda: arch(features).sum().backward()) for _ in range(7))


def calibrated_width(inputs: int, batch_size: int, target_ms: float, threads: int) -> dict[str, Any]:
    """The width, a multiple of 16, and what it takes with so many threads."""
    torch.set_num_threads(threads)
    width = 256
    for _ in range(_TRIES):
        measured = dense_ms(inputs, width, batch_size)
        if abs(measured / target_ms - 1) < 0.05:
            break
        width = max(16, round(width * min(2, max(0.5, (target_ms / measured) ** 0.5)) / 16) * 16)
    return {"width": width, "dense_ms": measured, "threads": threads}


class Tops(nn.Module):
    """Several top MLPs, one of which is in use: the rest of a model, its tables above all, stays as it is."""

    def __init__(self, inputs: int, widths: dict[str, int]) -> None:
        super().__init__()
        self.tops = nn.ModuleDict({name: top(inputs, width) for name, width in widths.items()})
        self.current = next(iter(widths))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.tops[self.current](features)
