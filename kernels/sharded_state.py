"""Tiered tables as TorchRec's checkpoints see them: ``ShardedTensor``s or ``DTensor``s of many small lazy shards, and the fused optimizer.

A shard of the plan becomes blocks of whole rows, about ``SHARD_BYTES`` each, in the same order on every rank, so that saving
or loading holds one block in memory and never a table. Sizes and offsets are those of the table, so a checkpoint of stock
FUSED tables loads into tiered ones and the other way round: ``torch.distributed.checkpoint`` matches ranges, not shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor import Shard as ShardedByRow
from torchrec.distributed.embedding_types import ShardedEmbeddingTable
from torchrec.distributed.shards_wrapper import LocalShardsWrapper
from torchrec.optim.fused import FusedOptimizer

from .initial_values import rows_per_block
from .lazy_rows import LazyRows, RowSource
from .tiered_tbe import TieredTBE

SHARD_BYTES = 50_000_000
"""Size of one local shard: what a checkpoint writer holds in memory at once, per thread."""


def _blocks(shard: ShardMetadata, row_bytes: int) -> list[ShardMetadata]:
    """A shard as blocks of whole rows."""
    first, rows = shard.shard_offsets[0], shard.shard_sizes[0]
    block = rows_per_block(row_bytes, SHARD_BYTES)
    return [
        ShardMetadata(
            shard_offsets=[first + start, *shard.shard_offsets[1:]],
            shard_sizes=[min(block, rows - start), *shard.shard_sizes[1:]],
            placement=shard.placement,
        )
        for start in range(0, rows, block)
    ]


class ShardedRows:
    """A tensor of ``shards``, of which this rank has those in ``local``: which of ``shards`` they are, and where their rows are.

    Shapes: ``size`` (rows, columns), or (rows,) for a state of one value a row.
    """

    def __init__(self, shards: Sequence[ShardMetadata], size: Sequence[int], dtype: torch.dtype, local: Mapping[int, RowSource]) -> None:
        self.size, self.dtype = torch.Size(size), dtype
        row_bytes = dtype.itemsize * self.size[1:].numel()
        self._blocks = [block for shard in shards for block in _blocks(shard, row_bytes)]
        self._local = [
            Shard(LazyRows(source, block.shard_offsets[0] - shards[i].shard_offsets[0], block.shard_sizes[0]), block)
            for i, source in local.items()
            for block in _blocks(shards[i], row_bytes)
        ]

    def sharded_tensor(self, pg: dist.ProcessGroup | None) -> ShardedTensor:
        """The usual form. No rank asks another."""
        metadata = ShardedTensorMetadata(shards_metadata=self._blocks, size=self.size, tensor_properties=TensorProperties(dtype=self.dtype))
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            local_shards=self._local, sharded_tensor_metadata=metadata, process_group=pg
        )

    def dtensor(self, mesh: DeviceMesh, placements: Sequence[Placement] | None) -> DTensor:
        """The form of environments with ``output_dtensor``."""
        local = LocalShardsWrapper([s.tensor for s in self._local], [tuple(s.metadata.shard_offsets) for s in self._local])
        stride = [self.size[i + 1 :].numel() for i in range(len(self.size))]
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=self.size, stride=tuple(stride))


def rowwise_shards(shards: Sequence[ShardMetadata], size: Sequence[int]) -> tuple[list[ShardMetadata], list[int]]:
    """Where TorchRec puts states of one value a row: the shards of such a state, in the order of the weights', and its size.

    With several shards of columns each has states of its own, and they stand one after the other, in the order of columns.
    """
    by_column = sorted(range(len(shards)), key=lambda i: shards[i].shard_offsets[1])
    over_columns = any(s.shard_sizes[1] != size[1] for s in shards)
    result: list[ShardMetadata | None] = [None] * len(shards)
    end = 0
    for i in by_column:
        s = shards[i]
        first = end if over_columns else s.shard_offsets[0]
        result[i] = ShardMetadata(shard_offsets=[first], shard_sizes=s.shard_sizes[:1], placement=s.placement)
        end += s.shard_sizes[0]
    return [s for s in result if s is not None], [end]


class TableState:
    """A table of a group: the sharding of the whole table as the plan has it, and which of its shards are here.

    ``local`` says where: from a place in ``plan_shards`` to the group's shard.
    """

    def __init__(self, tbe: TieredTBE, name: str, shards: Mapping[int, ShardedEmbeddingTable], pg: dist.ProcessGroup | None) -> None:
        of_table = next(iter(shards.values()))
        assert of_table.global_metadata is not None
        self.tbe, self.name, self.pg, self._dtensor = tbe, name, pg, of_table.dtensor_metadata
        self.size = (of_table.num_embeddings, of_table.embedding_dim)
        self.plan_shards: Sequence[ShardMetadata] = of_table.global_metadata.shards_metadata
        places = {tuple(s.shard_offsets): i for i, s in enumerate(self.plan_shards)}
        self.local = {places[tuple(t.local_metadata.shard_offsets)]: shard for shard, t in shards.items() if t.local_metadata is not None}

    def part(self, part: int) -> ShardedTensor | DTensor:
        """Part 0, the weights, or part k, the k-th optimizer state, in the form that the environment wants."""
        rows, by_row = self._rows(part)
        if not self._dtensor:
            return rows.sharded_tensor(self.pg)
        assert self._dtensor.mesh is not None
        return rows.dtensor(self._dtensor.mesh, (ShardedByRow(0),) if by_row else self._dtensor.placements)

    def weights(self) -> ShardedTensor:
        """The weights as optimizers name them: as TorchRec's, in the usual form in every environment."""
        return self._rows(0)[0].sharded_tensor(self.pg)

    def _rows(self, part: int) -> tuple[ShardedRows, bool]:
        sources = {place: RowSource(self.tbe, (shard,), part) for place, shard in self.local.items()}
        source = next(iter(sources.values()))
        by_row = not source.row_shape
        shards, size = rowwise_shards(self.plan_shards, self.size) if by_row else (self.plan_shards, self.size)
        return ShardedRows(shards, size, source.dtype, sources), by_row


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
            weight = table.weights()
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
