"""One training, twice: from tiers with the smallest pools that its batches allow, and whole in memory. Nothing may differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

import torch.distributed as dist

from .data import BatchSource
from .errors import MTrainsError
from .placement import PlacementOptions
from .train import StepRecord, TrainOptions, TrainResult, train


class TwinsDifferError(MTrainsError, AssertionError):
    """The tiered run and the run in memory are not equal bit for bit. This is a bug; please report it."""


@dataclass(frozen=True)
class Twins:
    """Both results, and the pool's rows."""

    tiered: TrainResult
    in_memory: TrainResult
    pool_rows: int


def smallest_pool_rows(source: BatchSource, steps: int | None) -> int:
    """The most distinct rows of one table that any batch of the job touches, trained or held out."""
    most = 1
    keys = [table.feature for table in source.tables]
    trained = 0
    for batch in islice(source.train_batches(), steps):
        trained += 1
        most = max(most, *(batch.sparse_features[key].values().unique().numel() for key in keys))
    for batch in source.held_out_batches(trained):
        most = max(most, *(batch.sparse_features[key].values().unique().numel() for key in keys))
    return most


def train_twice(
    source: BatchSource,
    options: TrainOptions,
    pg: dist.ProcessGroup,
    on_step: Callable[[StepRecord], None] | None = None,
) -> Twins:
    """Train from ``options.placement.ssd`` with the smallest pools, then in memory, and compare every loss and the AUC.

    Raises: TwinsDifferError naming the first step that differs.
    """
    pool_rows = smallest_pool_rows(source, options.steps)
    tiered = train(source, replace(options, placement=PlacementOptions(ssd=options.placement.ssd, pool_rows=pool_rows)), pg, on_step)
    in_memory = train(source, replace(options, placement=PlacementOptions(in_memory=True)), pg, on_step)
    for a, b in zip(tiered.steps, in_memory.steps, strict=True):
        if a.loss != b.loss:
            raise TwinsDifferError(f"step {a.number}: loss {a.loss!r} from tiers, {b.loss!r} in memory")
    if (tiered.auc, tiered.held_out_loss) != (in_memory.auc, in_memory.held_out_loss):
        raise TwinsDifferError(f"held-out AUC {tiered.auc!r} from tiers, {in_memory.auc!r} in memory")
    return Twins(tiered, in_memory, pool_rows)
