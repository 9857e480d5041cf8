"""Tiered tables as TorchRec's checkpoints see them: ``ShardedTensor``s of many small lazy shards, and the fused optimizer.

A shard of the plan becomes blocks of whole rows, about ``SHARD_BYTES`` each, in the same order on every rank, so that saving
or loading holds one block in memory and never a table. Sizes and offsets are those of the table, so a checkpoint of stock
FUSED tables loads into tiered ones and the other way round: ``torch.distributed.checkpoint`` matches ranges, not shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata
from torchrec.distributed.embedding_types import ShardedEmbeddingTable
from torchrec.optim.fused import FusedOptimizer

from .initial_values import rows_per_block
from .lazy_rows import LazyRows, RowSource
from .tiered_tbe import TieredTBE

SHARD_BYTES = 50_000_000
"""Size of one local shard: what a checkpoint writer holds in memory at once, per thread."""


def _blocks(shard: ShardMetadata, row_bytes: int, dims: int) -> list[ShardMetadata]:
    """A shard of the plan as blocks of rows; ``dims`` is 2 for (rows, columns) and 1 for one value a row."""
    first, rows = shard.shard_offsets[0], shard.shard_sizes[0]
    block = rows_per_block(row_bytes, SHARD_BYTES)
    return [
        ShardMetadata(
            shard_offsets=[first + start, *shard.shard_offsets[1:]][:dims],
            shard_sizes=[min(block, rows - start), *shard.shard_sizes[1:]][:dims],
            placement=shard.placement,
        )
        for start in range(0, rows, block)
    ]


def sharded_tensor(
    plan_shards: Sequence[ShardMetadata],
    size: Sequence[int],
    dtype: torch.dtype,
    local: Sequence[tuple[ShardMetadata, RowSource]],
    pg: dist.ProcessGroup | None,
) -> ShardedTensor:
    """Weights or states of a whole table, of which this rank has ``local``: (its shard of the plan, where its rows are).

    Shapes: ``size`` (rows, columns), or (rows,) for a state of one value a row.
    """
    row_bytes = dtype.itemsize * torch.Size(size[1:]).numel()
    dims = len(size)
    metadata = ShardedTensorMetadata(
        shards_metadata=[block for shard in plan_shards for block in _blocks(shard, row_bytes, dims)],
        size=torch.Size(size),
        tensor_properties=TensorProperties(dtype=dtype),
    )
    shards = [
        Shard(LazyRows(source, block.shard_offsets[0] - shard.shard_offsets[0], block.shard_sizes[0]), block)
        for shard, source in local
        for block in _blocks(shard, row_bytes, dims)
    ]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local_shards=shards, sharded_tensor_metadata=metadata, process_group=pg
    )


class TableState:
    """One table's shard of a group, with the sharding of the whole table as the plan has it."""

    def __init__(self, tbe: TieredTBE, index: int, table: ShardedEmbeddingTable, pg: dist.ProcessGroup | None) -> None:
        assert table.global_metadata is not None
        assert table.local_metadata is not None
        self.tbe, self.index, self.pg, self.name = tbe, index, pg, table.name
        self.plan_shards: Sequence[ShardMetadata] = table.global_metadata.shards_metadata
        self.local_shard: ShardMetadata = table.local_metadata
        self.size = (table.num_embeddings, table.embedding_dim)

    def part(self, part: int) -> ShardedTensor:
        """Part 0, the weights, or part k, the k-th optimizer state."""
        source = RowSource(self.tbe, self.index, part)
        size = self.size if source.row_shape else self.size[:1]
        return sharded_tensor(self.plan_shards, size, source.dtype, [(self.local_shard, source)], self.pg)


class TieredFusedOptimizer(FusedOptimizer):
    """The optimizer that FBGEMM fuses into backward, with its state in the rows' records.

    ``params`` is keyed ``"<table>.weight"`` and state ``"<table>.momentum1"``, as stock FUSED's are. A learning rate set in
    ``param_groups`` reaches the TBE at ``step`` or ``zero_grad``.
    """

    def __init__(self, tbe: TieredTBE, tables: Sequence[TableState]) -> None:
        self._tbe = tbe
        params: dict[str, Any] = {}
        state: dict[Any, Any] = {}
        for table in tables:
            weight = table.part(0)
            params[f"{table.name}.weight"] = weight
            state[weight] = {f"{table.name}.{name}": table.part(k + 1) for k, name in enumerate(tbe.state_names)}
        group = {"params": list(params.values()), "lr": tbe.tbe.get_learning_rate()}
        super().__init__(params, state, [group])

    def step(self, closure: Any = None) -> None:
        """Backward has updated the rows already; the learning rate of the next one is set."""
        self._tbe.set_learning_rate(self.param_groups[0]["lr"])

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Rows have no gradients; the learning rate of the next backward is set."""
        self._tbe.set_learning_rate(self.param_groups[0]["lr"])
