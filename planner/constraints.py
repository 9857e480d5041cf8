"""What a user asks of one table, beyond TorchRec's own constraints."""

from __future__ import annotations

from dataclasses import dataclass

from torchrec.distributed.planner.types import ParameterConstraints


@dataclass
class TieredParameterConstraints(ParameterConstraints):
    """TorchRec's constraints and ``min_pool_rows``: slots that each shard's pool has at least, when the table is tiered.

    Default: as many as a batch has lookups (batch size × world size × pooling factors). ``compute_kernels=["customized_kernel"]``
    keeps a table on the SSD, ``["fused"]`` keeps it in memory.
    """

    min_pool_rows: int | None = None

    def __hash__(self) -> int:
        return hash((super().__hash__(), self.min_pool_rows))
