"""TorchRec's options in HBM and, for every table, those below it: our pools above DDR and above an SSD, and UVM caching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.types import ModuleSharder
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from ..parameter_sharding import TIERED_KERNEL
from . import gpu_charges
from .access_profile import MissCurve, TableAccess
from .enumerators import FUSED, TieredEnumerator
from .gpu_options import UVM_CACHING, HbmOption, OverDdr, OverSsd, UvmCached, least_cached_rows
from .gpu_perf_model import GpuPerfModel
from .perf_model import ShardUse
from .records import rowwise_bytes_per_row
from .sharding_options import TieredShardingOption

DENSE = EmbeddingComputeKernel.DENSE.value
_WINDOW_SAVES = 0.3  # of LRU's misses: 31% to 39% in docs/gpu.md
KERNELS = (FUSED, UVM_CACHING, TIERED_KERNEL)
"""Of a model-parallel table; TorchRec's other ones keep no cache, or need operators that no FBGEMM wheel has."""


class GpuEnumerator(TieredEnumerator):
    """Options in HBM are TorchRec's ``fused`` and data-parallel ones, charged with optimizer state. Below it, table- and row-wise: ours, of
    the tables and with the optimizers that it has on a GPU, and ``fused_uvm_caching``. ``constraints`` leave out kernels, as everywhere.
    """

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """Every option of every shardable table, storage and perf filled in."""
        options = super().enumerate(module, sharders)
        for option in options:
            if not isinstance(option, TieredShardingOption):
                self._charge_state(option)
        return options

    @property
    def _has_tiers(self) -> bool:
        return True

    def _curve(self, option: ShardingOption, access: TableAccess, records: int) -> MissCurve:
        """Of the policy on a GPU: rows that no announced batch will use leave, the longest unused first. So LRU's, less what the window
        saves."""
        key = option.fqn, records
        if key not in self._curves:
            samples = self._batch_size * self._world_size
            factor, unique = samples / access.batch_samples, access.unique_rows(samples)
            kept = 1 - _WINDOW_SAVES if self._model.prefetched else 1.0
            lru = access.lru_miss_curve
            misses, write_backs = (
                tuple(min(unique, value * factor) * (kept if rows else 1.0) for rows, value in zip(lru.pool_rows, values, strict=True))
                for values in (lru.misses_per_batch, lru.write_backs_per_batch)
            )
            self._curves[key] = replace(lru, misses_per_batch=misses, write_backs_per_batch=write_backs, batch_samples=samples)
        return self._curves[key]

    def _charge_state(self, option: ShardingOption) -> None:
        option.uncharged_bytes = [0] * option.num_shards
        if hasattr(option.tensor, "_optimizer_classes"):
            return  # TorchRec has charged it
        state, columns = self._state_bytes(option) or 0, option.tensor.shape[1]
        for shard in option.shards:
            rows, width = shard.size
            shard.storage.hbm += rows * -(-state * width // columns)

    # -- kernels that constraints leave out go through as stand-ins, for the sharding of the others

    def _filter_compute_kernels(self, name: str, allowed_compute_kernels: list[str], sharding_type: str) -> list[str]:
        return [k for k in allowed_compute_kernels if k in (FUSED, DENSE)]

    def _is_stand_in(self, option: ShardingOption) -> bool:
        kernels = self._asked(option.name).compute_kernels
        return kernels is not None and option.compute_kernel not in kernels

    # -- below HBM

    def _may_be_tiered(self, option: ShardingOption) -> bool:
        return type(option.module[1]) in (EmbeddingBagCollection, EmbeddingCollection) and option.tensor.dtype in (
            torch.float32,
            torch.float16,
        )

    def _below(self, fused: ShardingOption, template: ShardingOption) -> Sequence[TieredShardingOption]:
        fused._tensor = template.tensor
        assert isinstance(self._model, GpuPerfModel)
        state = self._state_bytes(template)
        uses, asked = self._uses(fused), self._asked(template.name).compute_kernels or KERNELS
        rows, kinds = max(shard.size[0] for shard in fused.shards), list[tuple[type[HbmOption], int]]()
        if TIERED_KERNEL in asked and state is not None and template.tensor.shape[1] % 4 == 0:
            kinds += [(OverDdr, self._least_pool(template))]
            kinds += [(OverSsd, self._least_pool(template))] if self._topology.ssd else []
        if UVM_CACHING in asked and rows > 1:
            kinds += [(UvmCached, least_cached_rows(rows))]
        return [
            kind.above(
                fused,
                state_bytes=state or 0,
                waiting_bytes=self._waiting_bytes(fused, uses),
                rowwise_bytes=rowwise_bytes_per_row(self._optimizer(template)),
                graph_bytes=self._graph_bytes(fused, uses),
                min_pool_rows=least,
                uses=uses,
                model=self._model,
                snapshots=self._snapshots,
            )
            for kind, least in kinds
        ]

    def _graph_bytes(self, option: ShardingOption, uses: Sequence[ShardUse]) -> list[int]:
        """Of each shard: of several, none has batches of one shape."""
        if len(uses) > 1:
            return [0] * len(uses)
        ids = uses[0].lookups
        outputs = self._bags(option) if isinstance(option.module[1], EmbeddingBagCollection) else ids
        return [gpu_charges.graph_bytes(ids, outputs * option.tensor.shape[1])]
