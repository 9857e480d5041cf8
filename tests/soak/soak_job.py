"""The job that the soak kills: so little room on its SSD that cleaning never rests, and a checkpoint every few steps."""

from __future__ import annotations

from pathlib import Path

from torchrec_mtrains.data import SyntheticConfig, SyntheticSource
from torchrec_mtrains.job_model import ModelOptions
from torchrec_mtrains.placement import PlacementOptions
from torchrec_mtrains.train import TrainOptions

# 1,600 rows of a table are in use, spread over many: an index that takes a while to be written.
SIZES = SyntheticConfig(table_count=3, rows=50_000, pooling=4, dense_dim=4, active_share=0.032)
BATCH_SIZE = 64
POOL_ROWS = 300  # a batch touches at most 256 rows of a table
STEPS = 200
CHECKPOINT_EVERY = 7
CAPACITY_BYTES = 7 << 20  # 1.5 MiB of records are live, index snapshots take 1 to 2; 200 steps write about 15 MiB


def options(ssd: Path | None, **job: object) -> TrainOptions:
    """The job on an SSD folder, or whole in memory."""
    tiers = PlacementOptions(in_memory=True) if ssd is None else PlacementOptions(
        ssd=(str(ssd),), ssd_capacity_bytes=CAPACITY_BYTES, pool_rows=POOL_ROWS
    )  # fmt: skip
    model = ModelOptions(embedding_dim=32, dense_layers=(8,), over_layers=(8,), optimizer="adagrad")
    return TrainOptions(model=model, placement=tiers, **{"steps": STEPS, **job})  # type: ignore[arg-type]


def snapshot_bytes(rank: int, world_size: int) -> int:
    """What a rank's index snapshot has at least when it is whole: 8 bytes for every row of the tables that the plan gives the rank."""
    return 8 * SIZES.rows * len(range(rank, SIZES.table_count, world_size))


def source(rank: int, world_size: int) -> SyntheticSource:
    """The batches of one rank."""
    return SyntheticSource(SIZES, BATCH_SIZE, rank=rank, world_size=world_size, held_out_batch_count=1)
