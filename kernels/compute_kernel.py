"""``BatchedTieredEmbeddingBag`` and ``BatchedTieredEmbedding``: TorchRec's compute-kernel contract over a ``TieredTBE``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbedding, BaseBatchedEmbeddingBag
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.distributed.types import ShardingType
from torchrec.distributed.utils import append_prefix
from torchrec.modules.embedding_configs import data_type_to_sparse_type
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from .. import errors
from ..parameter_sharding import TABLE_TIERS, TableTiers
from .device_tbe import DeviceTBE
from .initial_values import InitFn, as_uniform, rows_per_block
from .lazy_rows import LazyRows, RowSource
from .sharded_state import TableState, TieredFusedOptimizer
from .tiered_tbe import TieredTable, TieredTBE

TBE_OPTIONS = frozenset(
    {
        "optimizer",
        "learning_rate",
        "eps",
        "beta1",
        "beta2",
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


class _TieredKernel(FusedOptimizerModule):
    """What the kernels of bags and of sequences have in common: a ``TieredTBE``, its rows as parameters, its optimizer.

    ``prefetch`` and ``forward`` of ``emb_module`` may be called directly. Weights are ``LazyRows``: they show the rows' current
    values, wherever these are.
    """

    _config: GroupedEmbeddingConfig
    _feature_table_map: list[int]

    def _make(
        self, config: GroupedEmbeddingConfig, pooling: PoolingMode, pg: dist.ProcessGroup | None, device: torch.device | None
    ) -> None:
        if device is not None and device.type not in ("cpu", "cuda"):
            raise errors.UnsupportedError(f"tiered tables train on a CPU or a CUDA device, got device {device}")
        precision = data_type_to_sparse_type(config.data_type)
        if precision not in (SparseType.FP32, SparseType.FP16):
            raise errors.UnsupportedError(f"data_type must be FP32 or FP16 on tiered tables, got {config.data_type}")
        self._config = _with_prefetch(config)
        together = _shards_of_rows(config.embedding_tables)
        tables, applied = [], []
        for shards in together:
            first = config.embedding_tables[shards[0]]
            assert first.fused_params is not None
            tiers: TableTiers = first.fused_params[TABLE_TIERS]
            uniform = as_uniform(tiers.init_fn, first.name, first.num_embeddings, first.embedding_dim)
            if uniform is None and tiers.init_fn is not None:
                applied += [(s, tiers.init_fn) for s in shards]
            columns, first_row = tuple(_columns(config.embedding_tables[s]) for s in shards), _first_row(first)
            weight_type = "float32" if precision is SparseType.FP32 else "float16"
            tables.append(
                TieredTable(
                    name=first.name,
                    rows=first.local_rows,
                    columns=columns,
                    chain=tiers.chain,
                    first_row=first_row,
                    init=None if uniform is None else uniform.deferred(columns=columns, weight_type=weight_type, first_row=first_row),
                )
            )
        make = TieredTBE if device is None or device.type == "cpu" else partial(DeviceTBE, device=device)
        self._emb_module = make(
            tables,
            self._feature_table_map,
            pooling,
            precision,
            rank=dist.get_rank() if dist.is_initialized() else 0,
            **tbe_options(config.fused_params),
        )
        of_table: dict[str, dict[int, ShardedEmbeddingTable]] = {}
        for shard, table in enumerate(config.embedding_tables):
            of_table.setdefault(table.name, {})[shard] = table
        self.table_states = [TableState(self._emb_module, name, shards, pg) for name, shards in of_table.items()]
        self._optim = TieredFusedOptimizer(self._emb_module, self.table_states)
        self._param_per_table = {name: self._parameter(tuple(shards)) for name, shards in of_table.items()}
        for shard, init_fn in applied:
            self._apply_init_fn(shard, init_fn)

    def _parameter(self, shards: tuple[int, ...]) -> nn.Parameter:
        rows = self._config.embedding_tables[shards[0]].local_rows
        parameter = nn.Parameter(LazyRows(RowSource(self._emb_module, shards, 0), 0, rows), requires_grad=False)
        parameter._in_backward_optimizers = [EmptyFusedOptimizer()]  # type: ignore[attr-defined]
        return parameter

    def _apply_init_fn(self, shard: int, init_fn: InitFn) -> None:
        """Applies an ``init_fn`` that cannot be deferred to blocks of rows, and writes every one of them to its home."""
        table = self._emb_module.table_of_shard[shard]
        volume = self._emb_module._home_tables[table].volume
        if self._emb_module.durable(table) and volume.epochs:
            return  # the volume of an earlier job: restoring one of its checkpoints brings the values
        weights = LazyRows(RowSource(self._emb_module, (shard,), 0), 0, self._emb_module.tables[table].rows)
        block = rows_per_block(weights.dtype.itemsize * weights.shape[1])
        for first in range(0, weights.shape[0], block):
            rows = torch.empty(min(block, weights.shape[0] - first), weights.shape[1], dtype=weights.dtype)
            with torch.no_grad():
                init_fn(rows)
                weights.narrow(0, first, rows.shape[0]).copy_(rows)

    def announce(self, features: KeyedJaggedTensor) -> bool:
        """As ``TieredTBE.announce``."""
        return self._emb_module.announce(features.values(), features.offsets(), batch_size_per_feature_per_rank=_batch_sizes(features))

    def prefetch(self, features: KeyedJaggedTensor, forward_stream: Any) -> None:
        """As ``TieredTBE.prefetch``."""
        self._emb_module.prefetch(
            features.values(), features.offsets(), forward_stream, batch_size_per_feature_per_rank=_batch_sizes(features)
        )

    def withdraw(self, features: KeyedJaggedTensor) -> None:
        """As ``TieredTBE.withdraw``."""
        self._emb_module.withdraw(features.values())

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


class BatchedTieredEmbeddingBag(_TieredKernel, BaseBatchedEmbeddingBag[Tensor]):
    """Pooled lookups of one group of tiered tables.

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
        self._make(config, self._pooling, pg, device)

    def forward(self, features: KeyedJaggedTensor, vbe_output: Tensor | None = None, vbe_output_offsets: Tensor | None = None) -> Tensor:
        """Pooled embeddings, (batch, sum of the features' dimensions).

        Where features differ in their batch sizes: (n,), by rank, feature and bag; or ``vbe_output`` with the bags of this group at
        ``vbe_output_offsets``, (ranks, features).
        Raises: as ``TieredTBE.forward``.
        """
        weights = features.weights_or_none()
        if weights is not None and not torch.is_floating_point(weights):
            weights = None
        batch_sizes = _batch_sizes(features)
        # The values go in as they came: a prefetched batch is found by their identity.
        pooled = self._emb_module(features.values(), features.offsets(), weights, batch_size_per_feature_per_rank=batch_sizes)
        if batch_sizes is None or vbe_output is None:
            return pooled
        assert vbe_output_offsets is not None
        return _place(pooled, vbe_output, vbe_output_offsets, batch_sizes, self._config.embedding_dims())


class BatchedTieredEmbedding(_TieredKernel, BaseBatchedEmbedding[Tensor]):
    """Lookups without pooling of one group of tiered tables.

    Raises: as ``BatchedTieredEmbeddingBag``.
    """

    def __init__(self, config: GroupedEmbeddingConfig, pg: dist.ProcessGroup | None = None, device: torch.device | None = None) -> None:
        super().__init__(config, pg, device)
        self._make(config, PoolingMode.NONE, pg, device)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Embeddings, (ids, dimension). Raises: as ``TieredTBE.forward``."""
        return self._emb_module(features.values(), features.offsets())


TieredKernel = BatchedTieredEmbeddingBag | BatchedTieredEmbedding


def _batch_sizes(features: KeyedJaggedTensor) -> list[list[int]] | None:
    return features.stride_per_key_per_rank() if features.variable_stride_per_key() else None


def _first_row(table: ShardedEmbeddingTable) -> int:
    return int(table.local_metadata.shard_offsets[0]) if table.local_metadata else 0


def _columns(table: ShardedEmbeddingTable) -> range:
    first = int(table.local_metadata.shard_offsets[1]) if table.local_metadata else 0
    return range(first, first + table.local_cols)


def _shards_of_rows(tables: Sequence[ShardedEmbeddingTable]) -> list[list[int]]:
    """Shards that are columns of the same rows; TorchRec lists them one after the other."""
    together = [list(shards) for _, shards in groupby(range(len(tables)), key=lambda i: (tables[i].name, _first_row(tables[i])))]
    assert len(together) == len({(t.name, _first_row(t)) for t in tables})
    return together


def _place(pooled: Tensor, vbe_output: Tensor, vbe_output_offsets: Tensor, batch_sizes: list[list[int]], dims: list[int]) -> Tensor:
    """``vbe_output`` with this group's bags, which come by rank and feature, where they belong."""
    places = [
        torch.arange(first, first + batch_sizes[f][rank] * dims[f], device=pooled.device)
        for rank, of_rank in enumerate(vbe_output_offsets.tolist())
        for f, first in enumerate(of_rank)
    ]
    return vbe_output.index_copy(0, torch.cat(places), pooled)


def _with_prefetch(config: GroupedEmbeddingConfig) -> GroupedEmbeddingConfig:
    """A copy whose tables say FUSED_UVM_CACHING: TorchRec's pooled lookup prefetches for no customized kernel otherwise."""
    result = copy.copy(config)
    result.embedding_tables = [copy.copy(t) for t in config.embedding_tables]
    for table in result.embedding_tables:
        table.compute_kernel = EmbeddingComputeKernel.FUSED_UVM_CACHING
    return result
