"""``BatchedTieredEmbeddingBag``: TorchRec's compute-kernel contract over a ``TieredTBE``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbeddingBag
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.distributed.types import ShardingType
from torchrec.distributed.utils import append_prefix
from torchrec.modules.embedding_configs import data_type_to_sparse_type
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from .. import errors
from ..parameter_sharding import TABLE_TIERS, TableTiers
from .initial_values import InitFn, as_uniform, rows_per_block
from .lazy_rows import LazyRows, RowSource
from .sharded_state import TableState, TieredFusedOptimizer
from .tiered_tbe import TieredTable, TieredTBE

TBE_OPTIONS = frozenset(
    {
        "optimizer",
        "learning_rate",
        "eps",
        "weight_decay",
        "weight_decay_mode",
        "gradient_clipping",
        "max_gradient",
        "stochastic_rounding",
        "output_dtype",
        "bounds_check_mode",
    }
)
"""Fused parameters that reach the TBE: all of them act on a row alone, so a slot serves as well as a row."""

OTHER_OPTIONS = frozenset(
    {
        TABLE_TIERS,
        # What the optimizers that are not admitted take; the stock TBE ignores it for the admitted ones too.
        "momentum",
        "beta1",
        "beta2",
        "eta",
        # FBGEMM's own cache and memory placement, which a tiered table does not have.
        "cache_algorithm",
        "cache_load_factor",
        "cache_sets",
        "cache_reserved_memory",
        "cache_precision",
        "enforce_hbm",
        "gather_uvm_cache_stats",
        "multipass_prefetch_config",
        "prefetch_pipeline",
        "record_cache_metrics",
        "uvm_host_mapped",
        # Ids and offsets are taken as int32 or int64, whichever comes.
        "embedding_table_index_type",
        "embedding_table_offset_type",
    }
)
"""Fused parameters that have nothing to say about a tiered table, and may be there for the tables beside it."""

WEIGHT_DECAY_MODES = (WeightDecayMode.NONE, WeightDecayMode.L2, WeightDecayMode.DECOUPLE)


def tbe_options(fused_params: dict[str, Any] | None) -> dict[str, Any]:
    """The fused parameters of a group as ``TieredTBE`` takes them.

    Raises: UnsupportedError for one that is unknown, or that acts on rows beyond those of the batch.
    """
    given = dict(fused_params or {})
    unknown = sorted(set(given) - TBE_OPTIONS - OTHER_OPTIONS)
    if unknown:
        raise errors.UnsupportedError(
            f"fused_params {unknown} are not supported on tiered tables; supported are {sorted(TBE_OPTIONS)}. Leave the others "
            "out, or keep these tables in memory"
        )
    mode = given.get("weight_decay_mode", WeightDecayMode.NONE)
    if mode not in WEIGHT_DECAY_MODES:
        raise errors.UnsupportedError(
            f"weight_decay_mode {WeightDecayMode(mode).name} is not supported on tiered tables, it needs rows beyond those of the "
            f"batch; use one of {', '.join(m.name for m in WEIGHT_DECAY_MODES)}"
        )
    options = {name: value for name, value in given.items() if name in TBE_OPTIONS}
    options.setdefault("optimizer", EmbOptimType.EXACT_SGD)  # the stock TBE's default
    return options


def _offset(table: ShardedEmbeddingTable, dim: int) -> int:
    return int(table.local_metadata.shard_offsets[dim]) if table.local_metadata else 0


class BatchedTieredEmbeddingBag(BaseBatchedEmbeddingBag[Tensor], FusedOptimizerModule):
    """Pooled lookups of one group of tiered tables.

    ``prefetch`` and ``forward`` of ``emb_module`` may be called directly. Weights are ``LazyRows``: they show the rows' current
    values, wherever these are.

    Raises: UnsupportedError for an optimizer, option or data type that tiered tables do not have; VolumeError when a home
    cannot be opened.
    """

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        pg: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        sharding_type: ShardingType | None = None,
    ) -> None:
        super().__init__(config, pg, device, sharding_type)
        if device is not None and device.type != "cpu":
            raise errors.UnsupportedError(f"tiered tables train on the CPU for now, got device {device}")
        precision = data_type_to_sparse_type(config.data_type)
        if precision not in (SparseType.FP32, SparseType.FP16):
            raise errors.UnsupportedError(f"data_type must be FP32 or FP16 on tiered tables, got {config.data_type}")
        self._config = _with_prefetch(config)
        applied: list[tuple[int, InitFn]] = []
        tables = []
        for i, table in enumerate(config.embedding_tables):
            assert table.fused_params is not None
            tiers: TableTiers = table.fused_params[TABLE_TIERS]
            uniform = as_uniform(tiers.init_fn, table.name, table.num_embeddings, table.embedding_dim)
            if uniform is None and tiers.init_fn is not None:
                applied.append((i, tiers.init_fn))
            tables.append(
                TieredTable(
                    name=table.name,
                    rows=table.local_rows,
                    dim=table.local_cols,
                    chain=tiers.chain,
                    first_row=_offset(table, 0),
                    first_column=_offset(table, 1),
                    init=None
                    if uniform is None
                    else uniform.deferred(
                        columns=table.local_cols,
                        weight_type="float32" if precision is SparseType.FP32 else "float16",
                        first_row=_offset(table, 0),
                        first_column=_offset(table, 1),
                    ),
                )
            )
        self._emb_module = TieredTBE(
            tables,
            self._feature_table_map,
            self._pooling,
            precision,
            rank=dist.get_rank() if dist.is_initialized() else 0,
            **tbe_options(config.fused_params),
        )
        self.table_states = [TableState(self._emb_module, i, t, pg) for i, t in enumerate(config.embedding_tables)]
        self._optim = TieredFusedOptimizer(self._emb_module, self.table_states)
        self._param_per_table = {t.name: self._parameter(i) for i, t in enumerate(config.embedding_tables)}
        for i, init_fn in applied:
            self._apply_init_fn(i, init_fn)

    def _parameter(self, table: int) -> nn.Parameter:
        parameter = nn.Parameter(LazyRows(RowSource(self._emb_module, table, 0), 0, self._local_rows[table]), requires_grad=False)
        parameter._in_backward_optimizers = [EmptyFusedOptimizer()]  # type: ignore[attr-defined]
        return parameter

    def _apply_init_fn(self, table: int, init_fn: InitFn) -> None:
        """Applies an ``init_fn`` that cannot be deferred to blocks of rows, and writes every one of them to its home."""
        volume = self._emb_module._home_tables[table].volume
        if self._emb_module.durable(table) and volume.epochs:
            return  # the volume of an earlier job: restoring one of its checkpoints brings the values
        weights = self._param_per_table[self._config.embedding_tables[table].name]
        block = rows_per_block(weights.dtype.itemsize * weights.shape[1])
        for first in range(0, weights.shape[0], block):
            rows = torch.empty(min(block, weights.shape[0] - first), weights.shape[1], dtype=weights.dtype)
            with torch.no_grad():
                init_fn(rows)
                weights.narrow(0, first, rows.shape[0]).copy_(rows)

    def init_parameters(self) -> None:
        """Initial values are deferred, or were written when the kernel was made."""

    @property
    def emb_module(self) -> TieredTBE:
        """The group; its ``prefetch(indices, offsets)`` starts a coming batch."""
        return self._emb_module

    @property
    def fused_optimizer(self) -> FusedOptimizer:
        """The optimizer of the group's rows."""
        return self._optim

    def forward(self, features: KeyedJaggedTensor, vbe_output: Tensor | None = None, vbe_output_offsets: Tensor | None = None) -> Tensor:
        """Pooled embeddings, (batch, sum of the features' dimensions).

        Raises: as ``TieredTBE.forward``; UnsupportedError for a variable batch size per feature.
        """
        if features.variable_stride_per_key():
            raise errors.UnsupportedError("variable batch size per feature is not supported on tiered tables yet")
        weights = features.weights_or_none()
        if weights is not None and not torch.is_floating_point(weights):
            weights = None
        # The values go in as they came: a prefetched batch is found by their identity.
        return self._emb_module(features.values(), features.offsets(), weights)

    def split_embedding_weights(self) -> list[Tensor]:
        """The local shard of every table, (rows, columns), lazily."""
        return [p.detach() for p in self._param_per_table.values()]

    def named_split_embedding_weights(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """``"<table>.weight"`` and its local shard, lazily."""
        for name, parameter in self._param_per_table.items():
            yield append_prefix(prefix, f"{name}.weight"), parameter.detach()

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """``"<table>.weight"`` and its parameter, which no other optimizer may update."""
        for name, parameter in self._param_per_table.items():
            yield append_prefix(prefix, f"{name}.weight"), parameter

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
        """None: the pool is not state, its rows are."""
        yield from ()

    def state_dict(self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """``"<table>.weight"`` as a ``ShardedTensor`` of lazy shards."""
        destination = {} if destination is None else destination
        for table in self.table_states:
            destination[f"{prefix}{table.name}.weight"] = table.part(0)
        return destination

    def flush(self) -> None:
        """Hands every changed row to its home."""
        self._emb_module.flush()

    def purge(self) -> None:
        """Nothing to drop: TorchRec calls this after loading weights behind a cache's back, and ours are written through it."""


def _with_prefetch(config: GroupedEmbeddingConfig) -> GroupedEmbeddingConfig:
    """A copy whose tables say FUSED_UVM_CACHING: TorchRec's pooled lookup prefetches for no customized kernel otherwise."""
    result = copy.copy(config)
    result.embedding_tables = [copy.copy(t) for t in config.embedding_tables]
    for table in result.embedding_tables:
        table.compute_kernel = EmbeddingComputeKernel.FUSED_UVM_CACHING
    return result
