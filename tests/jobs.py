"""A small job that tests run whole, stop and resume."""

from __future__ import annotations

from pathlib import Path

import torch

from torchrec_mtrains.data import SyntheticConfig, SyntheticSource
from torchrec_mtrains.job_model import ModelOptions
from torchrec_mtrains.placement import PlacementOptions
from torchrec_mtrains.process_group import process_group
from torchrec_mtrains.train import TrainOptions, TrainResult, train

SIZES = SyntheticConfig(table_count=3, rows=400, pooling=2, dense_dim=4)
BATCH_SIZE = 16
POOL_ROWS = 40  # a batch touches at most 32 rows of a table
STEPS = 40
CAPACITY_BYTES = 256 << 20
PMEM_BYTES = 24 << 10  # of three tables' 75 KiB


def options(ssd: Path | None, pmem: Path | None = None, **job: object) -> TrainOptions:
    """The job on an SSD folder, with caches in a PMem folder if there is one, or whole in memory."""
    tiers = PlacementOptions(in_memory=True) if ssd is None else PlacementOptions(
        ssd=(str(ssd),), ssd_capacity_bytes=CAPACITY_BYTES, pool_rows=POOL_ROWS,
        pmem=None if pmem is None else str(pmem), pmem_capacity_bytes=None if pmem is None else PMEM_BYTES,
    )  # fmt: skip
    model = ModelOptions(embedding_dim=8, dense_layers=(8,), over_layers=(8,), optimizer="adagrad")
    return TrainOptions(model=model, placement=tiers, **{"steps": STEPS, **job})  # type: ignore[arg-type]


def run(job: TrainOptions, on_step=None) -> TrainResult:
    """Train in this process."""
    torch.set_num_threads(1)
    with process_group() as pg:
        source = SyntheticSource(SIZES, BATCH_SIZE, rank=pg.rank(), world_size=pg.size(), held_out_batch_count=2)
        return train(source, job, pg, on_step)
