"""200 steps of tiered tables beside the stock TBE in HBM, bit by bit: outputs of every step, rows and optimizer state at the end."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec_mtrains.kernels.device_tbe import DEVICE_STATES

from _gpu_groups import Batches, Loop, Shape, fused, tiered
from torchrec_mtrains.tiers import DdrCache, DdrHome, SsdHome

# Widths that are no multiples of each other, so that rows are several units.
SHAPE = Shape(rows=20_000, dims=(64, 96, 32, 64), bags=512, length=6)
STEPS = 200


def same_bits(optimizer: EmbOptimType, on_ssd: bool) -> dict[str, Any]:
    """Whether all bits are equal, and what moved meanwhile. The pool has 15% of the rows, the DdrCache 20%."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        below = (DdrCache(4_000), SsdHome((folder,), capacity_bytes=2 << 30)) if on_ssd else (DdrHome(),)
        ours, theirs = tiered(SHAPE, optimizer, 3_000, *below), fused(SHAPE, optimizer)
        loops = [Loop(ours, batches := Batches(SHAPE, 40), True), Loop(theirs, batches, False)]
        equal_steps = sum(torch.equal(*(loop.step() for loop in loops)) for _ in range(STEPS))
        ours._pool.check()
        states = theirs.split_optimizer_states() if ours.state_names else [[] for _ in SHAPE.dims]
        equal_parts = 0
        for t, weights in enumerate(theirs.split_embedding_weights()):
            for a, b in zip(ours.read_rows(t, 0, SHAPE.rows), [weights, *states[t]], strict=True):
                equal_parts += torch.equal(a, b.detach().cpu().reshape(a.shape))
        parts = len(SHAPE.dims) * (1 + len(ours.state_names))
        moved = {k: sum(s[k] for s in ours.stats()) for k in ("misses", "evictions")}
        moved["misses_to_home"] = sum(tiers[1]["misses"] for tiers in ours.tier_stats())
        ours.close()
        return {"equal": equal_steps == STEPS and equal_parts == parts, "equal_steps": equal_steps, "equal_parts": equal_parts, **moved}


def all_optimizers() -> dict[str, Any]:
    """By optimizer and home, in deterministic mode."""
    torch.use_deterministic_algorithms(True)
    try:
        return {f"{o.name}, {'SSD' if ssd else 'DDR'}": same_bits(o, ssd) for o in DEVICE_STATES for ssd in (False, True)}
    finally:
        torch.use_deterministic_algorithms(False)
