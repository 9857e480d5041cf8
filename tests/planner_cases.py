"""Models, machines and accounts for the planner's tests; what a plan needs is summed up here from the plan alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from hypothesis import strategies as st
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec_mtrains.planner import PmemDevice, TieredParameterConstraints, TieredShardingPlanner, TieredTopology

from torchrec_mtrains import SsdHome, TieredParameterSharding

STATE_VALUES = {EmbOptimType.EXACT_SGD: 0, EmbOptimType.EXACT_ROWWISE_ADAGRAD: 1, EmbOptimType.EXACT_ADAGRAD: None}


@dataclass
class TableCase:
    """One table; ``pooling`` has a factor per feature."""

    rows: int
    dim: int
    pooling: list[float] = field(default_factory=lambda: [1.0])


@dataclass
class Case:
    """Tables, and the job that trains them."""

    tables: list[TableCase]
    world_size: int = 1
    batch_size: int = 8
    optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)

    def model(self) -> nn.Module:
        configs = [
            EmbeddingBagConfig(
                name=f"t{i}",
                num_embeddings=t.rows,
                embedding_dim=t.dim,
                feature_names=[f"t{i}f{j}" for j in range(len(t.pooling))],
            )
            for i, t in enumerate(self.tables)
        ]
        return nn.ModuleDict({"ebc": EmbeddingBagCollection(tables=configs, device=torch.device("meta"))})

    def sharders(self) -> list[Any]:
        return [EmbeddingBagCollectionSharder(fused_params={"optimizer": self.optimizer})]

    def constraints(self) -> dict[str, ParameterConstraints]:
        return {
            f"t{i}": TieredParameterConstraints(pooling_factors=t.pooling, **self.extra.get(f"t{i}", {})) for i, t in enumerate(self.tables)
        }

    def planner(self, ddr: int, ssd: int | None, pmem: int | None = None, **kwargs: Any) -> TieredShardingPlanner:
        home = None if ssd is None else SsdHome(("/nowhere",), ssd)
        device = None if pmem is None else PmemDevice("/pmem", pmem)
        kwargs.setdefault("search_seconds", 0.05)
        topology = TieredTopology(self.world_size, ddr_budget_bytes=ddr, ssd=home, pmem=device)
        return TieredShardingPlanner(topology, batch_size=self.batch_size, constraints=self.constraints(), **kwargs)

    def plan(self, ddr: int, ssd: int | None, pmem: int | None = None, **kwargs: Any) -> ShardingPlan:
        return self.planner(ddr, ssd, pmem, **kwargs).plan(self.model(), self.sharders())

    def record_bytes(self, table: str) -> int:
        dim = self.tables[int(table[1:])].dim
        values = STATE_VALUES[self.optimizer]
        return 4 * (dim + (dim if values is None else values))

    def smallest_pool(self, table: str, shard_rows: int) -> int:
        lookups = self.world_size * self.batch_size * sum(self.tables[int(table[1:])].pooling)
        return min(math.ceil(lookups), shard_rows)

    def needs(self, plan: ShardingPlan) -> tuple[dict[int, int], dict[int, int]]:
        """Bytes that the tables take on every rank: in DDR (no batches) and on the SSD (no block or log overhead)."""
        ddr, _, ssd = self.needs_of_tiers(plan)
        return ddr, ssd

    def needs_of_tiers(self, plan: ShardingPlan) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
        """The same in DDR, in PMem (the records of caches) and on the SSD."""
        ddr: dict[int, int] = defaultdict(int)
        pmem: dict[int, int] = defaultdict(int)
        ssd: dict[int, int] = defaultdict(int)
        for name, sharding in plan.plan["ebc"].items():
            record = self.record_bytes(name)
            for rank, rows in shards(self, name, sharding):
                if isinstance(sharding, TieredParameterSharding):
                    ddr[rank] += rows * (8 + 4) + min(rows, sharding.tiers.pool_rows) * (record + 8)
                    ssd[rank] += rows * record
                    for cache in sharding.tiers.caches:
                        ddr[rank] += rows * 4 + min(rows, cache.rows) * 16
                        pmem[rank] += min(rows, cache.rows) * record
                else:
                    ddr[rank] += rows * record
        return ddr, pmem, ssd


def shards(case: Case, name: str, sharding: Any) -> list[tuple[int, int]]:
    """(rank, rows) of every shard, as if whole rows; a data-parallel table is whole on every rank."""
    table = case.tables[int(name[1:])]
    if sharding.sharding_spec is None:
        return [(rank, table.rows) for rank in range(case.world_size)]
    return [
        (shard.placement.rank(), math.ceil(shard.shard_sizes[0] * shard.shard_sizes[1] / table.dim))
        for shard in sharding.sharding_spec.shards
    ]


def tiered_tables(plan: ShardingPlan) -> set[str]:
    return {name for name, sharding in plan.plan["ebc"].items() if isinstance(sharding, TieredParameterSharding)}


TABLES = st.builds(
    TableCase,
    rows=st.integers(1, 20_000) | st.integers(1, 50),
    dim=st.sampled_from([4, 8, 32]),
    pooling=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=1, max_size=2),
)


OPTIMIZERS = sorted(STATE_VALUES, key=lambda o: o.name)


def cases(max_world_size: int, optimizers: Sequence[EmbOptimType] = OPTIMIZERS) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        tables=st.lists(TABLES, min_size=1, max_size=4),
        world_size=st.integers(1, max_world_size),
        batch_size=st.sampled_from([1, 8, 64]),
        optimizer=st.sampled_from(optimizers),
    )


DDR = st.integers(1, 6 << 20)
SSD = st.integers(1, 20 << 20)
PLENTY = 1 << 40
