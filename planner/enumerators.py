"""TorchRec's enumerator plus, for every table that may be tiered, its options above an SSD."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.constants import DEFAULT_PERF_ESTIMATOR
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator, get_partition_by_type
from torchrec.distributed.planner.estimator import EmbeddingPerfEstimatorFactory
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import ParameterConstraints, Shard, ShardingOption
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets
from torchrec.distributed.types import ModuleSharder, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from ..errors import ConfigurationError
from ..parameter_sharding import TIERED_KERNEL
from ..torchrec_hooks import sharders_for_estimators
from .access_profile import AccessProfile, MissCurve, TableAccess
from .alike_shards import copied, one_of_each_size
from .assumed_access import assumed_access
from .assumed_hardware import assumed_hardware
from .charges import has_snapshots, records_per_block
from .ddr_options import DdrOption
from .estimators import TieredStorageEstimator
from .neighbours import curve_over_ssd
from .perf_model import IN_FLIGHT_BATCHES, PerfModel, ShardUse
from .records import optimizer_name, state_bytes_per_row
from .sharding_options import TieredShardingOption
from .topology import TieredTopology
from .waiting_ids import WaitingIds

FUSED = EmbeddingComputeKernel.FUSED.value
_READ_AND_WRITTEN = 3  # of every row by a dense update: the gradient, and read and written by the optimizer
_SHARE_DIGITS = 12  # beyond, shards alike differ by rounding
ROW_WISE, TABLE_WISE = ShardingType.ROW_WISE.value, ShardingType.TABLE_WISE.value


class TieredEnumerator(EmbeddingEnumerator):
    """Options in memory are TorchRec's. Above an SSD: table-wise, and row-wise where there are several ranks or constraints ask, with
    the smallest legal pool. Every option has ``uses``: what a step does to each of its shards, by ``access``, or by a popularity law
    (``assumed_access``); and ``waiting_bytes``: ids that wait for each of them in a plan with tiers, of the ``waiting_ids`` that there are.

    Tiered are tables of ``EmbeddingBagCollection``s and ``EmbeddingCollection``s in FP32 or FP16, of a dimension divisible by 4,
    trained by SGD, Adagrad or row-wise Adagrad, unless their constraints leave ``customized_kernel`` out.
    """

    def __init__(
        self,
        topology: TieredTopology,
        batch_size: int,
        constraints: dict[str, ParameterConstraints] | None = None,
        model: PerfModel | None = None,
        access: AccessProfile | None = None,
        **kwargs: object,
    ) -> None:
        estimators = [
            EmbeddingPerfEstimatorFactory.create(DEFAULT_PERF_ESTIMATOR, topology=topology, constraints=constraints),
            TieredStorageEstimator(topology=topology, constraints=constraints),
        ]
        super().__init__(topology, batch_size, constraints=constraints, estimator=estimators, **kwargs)
        self._topology = topology
        self._model = model or PerfModel(assumed_hardware(topology), topology.ranks_per_host)
        self._access = access
        self._plain_storage = EmbeddingStorageEstimator(topology=topology, constraints=constraints)
        self._row_wise_by_us: set[str] = set()
        self.waiting_ids = WaitingIds()
        self._used: dict[str, TableAccess] = {}
        self._curves: dict[tuple[str, int], MissCurve] = {}

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """Every option of every shardable table, storage and perf filled in."""
        self._used, self._curves = {}, {}
        stock = super().enumerate(module, sharders)
        for option in stock:
            option.uses = self._uses(option)
        templates = {option.fqn: option for option in stock}
        self.waiting_ids = WaitingIds()
        if self._has_tiers and self._model.prefetched:
            of_tables = [(self._lookups(t), self._bags(t)) for t in templates.values()]
            self.waiting_ids = WaitingIds.of(of_tables, self._world_size, self._model.lookahead_bytes)
        tiered = self._tiered(templates) if self._has_tiers else []
        if not tiered:
            self.waiting_ids = WaitingIds()
        for option in stock:
            option.waiting_bytes = self._waiting_bytes(option, option.uses)
        options = [o for o in stock if not self._is_stand_in(o)] + tiered
        for name in {o.fqn for o in stock} - {o.fqn for o in options}:
            raise ConfigurationError(
                f"table {name!r}: its constraints leave no way to keep it: they ask for the SSD tier or for row-wise sharding on a CPU, "
                "and it cannot be tiered (TieredTopology has no ssd, the optimizer, dtype or dimension is not supported there, or it "
                "has fewer rows than there are ranks). Relax its ParameterConstraints"
            )
        return options

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """As TorchRec does it, once for shards of a size."""
        with one_of_each_size(sharding_options):
            super().populate_estimates(sharding_options)

    @property
    def _has_tiers(self) -> bool:
        return self._topology.ssd is not None

    # -- TorchRec's filters, for which the tiered kernel does not exist. A table that is to be on the SSD, or row-wise against the
    #    stock CPU sharder's list (gloo runs it, and our sharder offers it), goes through as a fused stand-in, dropped at the end.

    def _asked(self, name: str) -> ParameterConstraints:
        return (self._constraints or {}).get(name) or ParameterConstraints()

    def _filter_compute_kernels(self, name: str, allowed_compute_kernels: list[str], sharding_type: str) -> list[str]:
        allowed = [k for k in allowed_compute_kernels if k != TIERED_KERNEL]
        if self._asked(name).compute_kernels == [TIERED_KERNEL]:
            return [k for k in allowed if k == FUSED]
        return super()._filter_compute_kernels(name, allowed, sharding_type)

    def _filter_sharding_types(self, name: str, allowed_sharding_types: list[str], sharder_key: str = "") -> list[str]:
        types = super()._filter_sharding_types(name, allowed_sharding_types, sharder_key)
        if not types and ROW_WISE in (self._asked(name).sharding_types or ()):
            self._row_wise_by_us.add(name)
            return [ROW_WISE]
        return types

    def _is_stand_in(self, option: ShardingOption) -> bool:
        return self._asked(option.name).compute_kernels == [TIERED_KERNEL] or option.name in self._row_wise_by_us

    # -- options above an SSD

    def _tiered(self, templates: Mapping[str, ShardingOption]) -> list[TieredShardingOption]:
        fused = [f for t in templates.values() if self._may_be_tiered(t) for f in self._fused(t)]
        self.populate_estimates(fused)
        perfs = [[shard.perf for shard in option.shards] for option in fused]
        for option in fused:  # storage of the table and its batch alone, no optimizer state
            option._tensor = torch.empty(option.tensor.shape, dtype=option.tensor.dtype, device="meta")
        with one_of_each_size(fused):
            self._plain_storage.estimate(fused, sharders_for_estimators(self))
        for option, perf in zip(fused, perfs, strict=True):
            for shard, of_shard in zip(option.shards, perf, strict=True):
                shard.perf = of_shard
        return [below for option in fused for below in self._below(option, templates[option.fqn])]

    def _optimizer(self, option: ShardingOption) -> str:
        return optimizer_name(option.tensor, sharders_for_estimators(self)[option.module_type_key].fused_params)

    def _may_be_tiered(self, option: ShardingOption) -> bool:
        columns = option.tensor.shape[1]
        kernels = self._asked(option.name).compute_kernels
        return (
            (kernels is None or TIERED_KERNEL in kernels)
            and type(option.module[1]) in (EmbeddingBagCollection, EmbeddingCollection)
            and option.tensor.dtype in (torch.float32, torch.float16)
            and columns % 4 == 0
            and self._state_bytes(option) is not None
        )

    def _state_bytes(self, option: ShardingOption) -> int | None:
        return state_bytes_per_row(self._optimizer(option), option.tensor.shape[1], self._topology.compute_device)

    def _fused(self, template: ShardingOption) -> list[ShardingOption]:
        asked = self._asked(template.name).sharding_types
        options = []
        for sharding_type in (TABLE_WISE, ROW_WISE):
            if sharding_type not in (asked or ((TABLE_WISE, ROW_WISE) if self._world_size > 1 else (TABLE_WISE,))):
                continue
            sizes, offsets = calculate_shard_sizes_and_offsets(
                tensor=template.tensor,
                world_size=self._world_size,
                local_world_size=self._local_world_size,
                sharding_type=sharding_type,
            )
            if any(rows == 0 for rows, _ in sizes):
                continue  # fewer rows than ranks
            option = copied(template)
            option.sharding_type, option.compute_kernel = sharding_type, FUSED
            option.partition_by = get_partition_by_type(sharding_type)
            option.shards = [Shard(size=size, offset=offset) for size, offset in zip(sizes, offsets, strict=True)]
            options.append(option)
        return options

    def _below(self, fused: ShardingOption, template: ShardingOption) -> Sequence[TieredShardingOption]:
        """The ways below memory of a table so sharded."""
        fused._tensor = template.tensor
        state, uses = self._state_bytes(template), self._uses(fused, above_ssd=True)
        assert state is not None
        return [
            DdrOption.above(
                fused,
                state_bytes=state,
                min_pool_rows=self._least_pool(template),
                uses=uses,
                waiting_bytes=self._waiting_bytes(fused, uses),
                model=self._model,
                snapshots=self._snapshots,
            )
        ]

    def _waiting_bytes(self, option: ShardingOption, uses: Sequence[ShardUse]) -> list[int]:
        """Ids that wait for each shard."""
        bags = self._bags(option)
        if option.sharding_type == ShardingType.DATA_PARALLEL.value:
            bags /= self._world_size
        return [self.waiting_ids.of_shard(use.lookups, bags) for use in uses]

    @property
    def _snapshots(self) -> bool:
        return self._topology.ssd is not None and has_snapshots(self._topology.ssd, self._model.checkpoints)

    def _least_pool(self, option: ShardingOption) -> int:
        asked = getattr(self._asked(option.name), "min_pool_rows", None)
        return math.ceil(self._lookups(option)) if asked is None else int(asked)  # one shard may get a whole batch

    # -- what a step does

    def _uses(self, option: ShardingOption, *, above_ssd: bool = False) -> list[ShardUse]:
        rows, columns = option.tensor.shape
        samples = self._batch_size * self._world_size
        access = self._table_access(option)
        lookups, unique = self._lookups(option), access.unique_rows(samples)
        weight_bytes = option.tensor.element_size()
        state = self._state_bytes(option) or 0
        curve = self._curve(option, access, 1)
        ssd_curve = self._curve(option, access, records_per_block(columns * weight_bytes + state)) if above_ssd else None
        copies = option.sharding_type == ShardingType.DATA_PARALLEL.value
        uses: list[ShardUse] = []
        of_kind: dict[tuple[float, ...], ShardUse] = {}
        for shard, share in zip(option.shards, _shares(option, access), strict=True):
            comms_ms = shard.perf.fwd_comms + shard.perf.bwd_comms
            kind = (*shard.size, share, comms_ms)
            if kind in of_kind:
                uses.append(of_kind[kind])
                continue
            width, update_ms = shard.size[1] * weight_bytes, 0.0
            if copies:  # each rank looks up its own part of the batch, and updates every row
                update_bytes = _READ_AND_WRITTEN * rows * (width + state)
                update_ms = 1e3 * update_bytes / self._model.memory_bytes_per_s
            of_kind[kind] = ShardUse(
                rows=shard.size[0],
                lookups=lookups * share,
                unique_rows=access.unique_rows(self._batch_size) if copies else unique * share,
                weight_bytes=width,
                record_bytes=width + state * shard.size[1] // columns,
                curve=curve,
                table_rows=rows,
                share=share,
                ssd_curve=ssd_curve,
                comms_ms=comms_ms,
                compute_ms=update_ms,
                in_flight=access.unique_rows(IN_FLIGHT_BATCHES * samples) * share,
            )
            uses.append(of_kind[kind])
        return uses

    def _curve(self, option: ShardingOption, access: TableAccess, records: int) -> MissCurve:
        """Of batches of all ranks, over blocks of so many records. Where nothing is prefetched, nobody looks ahead."""
        key = option.fqn, records
        if key not in self._curves:
            lookahead = None if self._model.prefetched else 0
            self._curves[key] = curve_over_ssd(access, self._batch_size * self._world_size, records, lookahead)
        return self._curves[key]

    def _table_access(self, option: ShardingOption) -> TableAccess:
        if option.fqn not in self._used:
            self._used[option.fqn] = self._access_of(option)
        return self._used[option.fqn]

    def _access_of(self, option: ShardingOption) -> TableAccess:
        rows = option.tensor.shape[0]
        if self._access is None:
            return assumed_access(rows, max(self._lookups(option), 1e-6), self._batch_size * self._world_size)
        measured = self._access.table(option.name)
        if measured.rows != rows:
            raise ConfigurationError(
                f"access profile: table {option.name!r} has {measured.rows} rows there and {rows} in the model; "
                "profile the data of this job"
            )
        return measured

    def _lookups(self, option: ShardingOption) -> float:
        """Rows of the table that one step looks up, over all ranks and features."""
        if self._access is not None:
            return self._access.table(option.name).pooling_factor * self._batch_size * self._world_size
        asked = self._asked(option.name)
        factors = list(asked.pooling_factors)
        if len(factors) == 1 and not asked.num_poolings and not asked.batch_sizes:
            factors *= self._features(option)
        poolings = asked.num_poolings or [1.0] * len(factors)
        batch_sizes = asked.batch_sizes or [self._batch_size] * len(factors)
        return self._world_size * sum(f * p * b for f, p, b in zip(factors, poolings, batch_sizes, strict=True))

    def _features(self, option: ShardingOption) -> int:
        module: Any = option.module[1]
        configs = module.embedding_bag_configs() if isinstance(module, EmbeddingBagCollection) else module.embedding_configs()
        return next(len(c.feature_names) for c in configs if c.name == option.name)

    def _bags(self, option: ShardingOption) -> float:
        """Bags of ids a step, over all ranks and features: one a sample, unless constraints say more."""
        asked = self._asked(option.name)
        poolings = asked.num_poolings or [1.0] * self._features(option)
        batch_sizes = asked.batch_sizes or [self._batch_size] * len(poolings)
        return self._world_size * sum(p * b for p, b in zip(poolings, batch_sizes, strict=True))


def _shares(option: ShardingOption, access: TableAccess) -> list[float]:
    """The part of the table's uses that falls into each shard."""
    if option.sharding_type == ShardingType.DATA_PARALLEL.value:
        return [1 / option.num_shards] * option.num_shards
    ranges = access.lookup_share_by_row_range
    below = np.concatenate([[0.0], np.cumsum(ranges)])
    edges = np.linspace(0, option.tensor.shape[0], len(below))
    first = np.array([shard.offset[0] for shard in option.shards], np.float64)
    last = first + np.array([shard.size[0] for shard in option.shards], np.float64)
    share = np.interp(last, edges, below) - np.interp(first, edges, below)
    return [float(x) for x in share.round(_SHARE_DIGITS)]
