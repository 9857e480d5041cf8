"""What the charges of the main job go by: its tables, their records and lookups, and its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from .data import BatchSource, TableShape
from .job_model import ModelOptions, fused_params
from .planner import CheckpointSchedule, TierBytes, chain_bytes
from .planner.records import state_bytes_per_row
from .tiers import TierChain


@dataclass(frozen=True)
class JobShape:
    """Tables of one embedding dimension and optimizer, trained by ``world_size`` ranks of ``batch_size`` samples each."""

    tables: tuple[TableShape, ...]
    record_bytes: int
    batch_size: int
    world_size: int
    checkpoints: CheckpointSchedule

    @classmethod
    def of(cls, source: BatchSource, model: ModelOptions, checkpoints: CheckpointSchedule, world_size: int) -> JobShape:
        """The shape of a job on a data source."""
        state = state_bytes_per_row(fused_params(model)["optimizer"].name, model.embedding_dim)
        assert state is not None, "ModelOptions allows the optimizers of tiered tables alone"
        return cls(source.tables, 4 * model.embedding_dim + state, source.batch_size, world_size, checkpoints)

    def lookups(self, table: TableShape) -> int:
        """Rows of a table that a step looks up, over all ranks."""
        return self.world_size * self.batch_size * table.pooling

    def charge(self, table: TableShape, chain: TierChain) -> TierBytes:
        """What a table that is whole on one rank costs there."""
        return chain_bytes(
            chain, rows=table.rows, record_bytes=self.record_bytes, lookups=self.lookups(table), checkpoints=self.checkpoints
        )
