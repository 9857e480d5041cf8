"""A DLRM over several ranks: its tables in tiers under one sharding, or in stock FUSED, and one table in FUSED on either side."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, row_wise, table_row_wise, table_wise
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer
from torchrec_mtrains.kernels import durability
from torchrec_mtrains.planner import CheckpointSchedule, HardwareProfile, TieredShardingPlanner, TieredTopology

import torchrec_mtrains as mtrains
from _common import ZipfIds
from _multi_ranks import device_of
from torchrec_mtrains.data import TableShape
from torchrec_mtrains.data.source import make_batch
from torchrec_mtrains.job_model import EBC_PATH, ModelOptions, build_model, dense_optimizer, fused_params

SHARDINGS = ("table_wise", "row_wise", "column_wise", "table_row_wise")
DENSE_FEATURES = 13
BATCHES_HELD = 3.5
"""Of all ranks, whose rows a pool has room for at least: the one that trains, two that are prefetched, and what chance adds."""


@dataclass(frozen=True)
class Shape:
    """Tables alike, the last of which is in FUSED on either side; ``batch_size`` samples a rank, ``pooling`` lookups of each a table."""

    tables: int
    rows: int
    dim: int
    batch_size: int
    pooling: int
    over: tuple[int, ...]
    exponent: float = 1.05

    def distinct_rows(self, lookups: int) -> float:
        """Of a table's rows, those among so many lookups, on average."""
        share = torch.arange(1, self.rows + 1, dtype=torch.float64).pow(-self.exponent)
        return float(-torch.expm1(lookups * torch.log1p(-share / share.sum())).sum())

    @property
    def options(self) -> ModelOptions:
        return ModelOptions(embedding_dim=self.dim, over_layers=self.over, learning_rate=0.02, dense_learning_rate=0.001)

    @property
    def shapes(self) -> list[TableShape]:
        return [TableShape(f"t{i}", f"f{i}", self.rows, self.pooling) for i in range(self.tables)]


@dataclass(frozen=True)
class Tiers:
    """``pool_share`` of a shard's rows are in its pool, but never fewer than batches need; ``below``: what is under it."""

    pool_share: float
    below: tuple[Any, ...]


@dataclass(frozen=True)
class Budget:
    """The planner decides: each rank has so much of HBM (on a processor, of memory in its place) and of DDR, and the ``home``, of a machine
    of that ``hardware``."""

    hbm_bytes: int
    ddr_bytes: int
    home: mtrains.SsdHome
    hardware: HardwareProfile

    def planner(self, shape: Shape, world: int, device: str) -> TieredShardingPlanner:
        """Of this job, which commits no checkpoint."""
        budgets: dict[str, Any] = {"hbm_budget_bytes": self.hbm_bytes, "ddr_budget_bytes": self.ddr_bytes}
        topology = TieredTopology(
            world, device, **(budgets if device == "cuda" else {"ddr_budget_bytes": self.hbm_bytes}), ssd=self.home, local_world_size=world
        )
        return TieredShardingPlanner(
            topology,
            batch_size=shape.batch_size,
            constraints={t.name: ParameterConstraints(pooling_factors=[float(t.pooling)]) for t in shape.shapes},
            hardware=self.hardware,
            checkpoints=CheckpointSchedule(keep=0),
        )


class Batches:
    """So many batches of one rank, drawn once, on its device, and used in turn. Popular rows are scattered, the same on all ranks."""

    def __init__(self, shape: Shape, count: int, rank: int) -> None:
        features = [t.feature for t in shape.shapes]
        drawing = torch.Generator(device_of(rank)).manual_seed(1000 + rank)
        tables = [ZipfIds(shape.rows, shape.exponent, torch.Generator().manual_seed(i)).by(drawing) for i in range(shape.tables)]
        size, where = shape.batch_size, drawing.device
        self.made = [
            make_batch(
                features,
                torch.cat([table.draw(size * shape.pooling) for table in tables]).cpu().numpy(),
                np.full(shape.tables * size, shape.pooling, np.int32),
                torch.rand(size, DENSE_FEATURES, generator=drawing, device=where).cpu().numpy(),
                torch.randint(2, (size,), generator=drawing, device=where).float().cpu().numpy(),
            )
            for _ in range(count)
        ]
        if where.type == "cuda":
            self.made = [batch.pin_memory() for batch in self.made]

    def stream(self, first: int, last: int) -> Iterator[Batch]:
        for number in range(first, last):
            yield self.made[number % len(self.made)]


def plan(shape: Shape, model: nn.Module, sharding: str, tiers: Tiers | None) -> ShardingPlan:
    """``sharding`` for every table but the last, which is whole on the last rank."""
    world, device = dist.get_world_size(), device_of(0).type
    make = {
        "table_wise": lambda i: table_wise(i % world),
        "row_wise": lambda _: row_wise(),
        "column_wise": lambda _: column_wise(list(range(world))),
        "table_row_wise": lambda _: table_row_wise(0),
    }[sharding]
    needed = math.ceil(BATCHES_HELD * shape.distinct_rows(world * shape.batch_size * shape.pooling)) if tiers else 0
    generators = {t.name: make(i) for i, t in enumerate(shape.shapes[:-1])} | {shape.shapes[-1].name: table_wise(world - 1)}
    collection = model.get_submodule(EBC_PATH)
    stock = construct_module_sharding_plan(
        collection, generators, EmbeddingBagCollectionSharder(fused_params(shape.options)), world, world, device
    )
    result = EmbeddingModuleShardingPlan()
    for name, table in stock.items():
        where = {"sharding_type": table.sharding_type, "ranks": table.ranks, "sharding_spec": table.sharding_spec}
        if tiers and name != shape.shapes[-1].name:
            rows = max(shard.shard_sizes[0] for shard in table.sharding_spec.shards)  # type: ignore[union-attr]
            chain = mtrains.TierChain(min(rows, max(int(rows * tiers.pool_share), needed)), tiers.below)
            result[name] = mtrains.TieredParameterSharding(**where, tiers=chain)
        else:
            result[name] = ParameterSharding(**where, compute_kernel="fused")
    return ShardingPlan({EBC_PATH: result})


class Side:
    """A sharded model and its optimizer on this rank. ``predicted_ms`` and ``rows``: of the plan, where the planner made it."""

    def __init__(self, shape: Shape, rank: int, sharding: str, tiers: Tiers | Budget | None, alike: bool = False) -> None:
        """``alike``: tables in memory begin with the values that tiered ones begin with."""
        self.predicted_ms: float | None = None
        self.rows: list[dict[str, Any]] = []
        self.shape, self.device = shape, device_of(rank)
        model = build_model(shape.shapes, DENSE_FEATURES, shape.options)
        params = fused_params(shape.options) | ({"prefetch_pipeline": True} if self.device.type == "cuda" else {})
        sharders = mtrains.sharders(params) if tiers else [EmbeddingBagCollectionSharder(params)]
        if isinstance(tiers, Budget):
            planner = tiers.planner(shape, dist.get_world_size(), self.device.type)
            decided = planner.collective_plan(model, sharders, dist.group.WORLD)
            self.predicted_ms = planner.summary(decided).step_ms
            self.rows = planner.plan_rows(decided)
        else:
            decided = plan(shape, model, sharding, tiers)
        in_memory = {n for n, table in decided.plan[EBC_PATH].items() if not isinstance(table, mtrains.TieredParameterSharding)}  # type: ignore[attr-defined]
        configs = model.get_submodule(EBC_PATH).embedding_bag_configs()  # type: ignore[operator]
        values = {}
        for config in configs:
            key = f"{EBC_PATH}.embedding_bags.{config.name}.weight"
            if config.name in in_memory:
                if alike:
                    values[key] = config.init_fn(torch.empty(shape.rows, shape.dim))
                config.init_fn = nn.init.zeros_  # a shard cannot know its rows
        self.dmp = DistributedModelParallel(model, device=self.device, plan=decided, sharders=sharders)  # type: ignore[arg-type]
        if values:
            self.dmp.load_state_dict(values, strict=False)
        self.dense = dense_optimizer(self.dmp, shape.options)
        self.optimizer = CombinedOptimizer([self.dmp.fused_optimizer, self.dense])
        self.groups = mtrains.tiered_groups(self.dmp)

    def put_every_row(self) -> None:
        """Every row comes into its pool once, in an order of its own: what is below has its values, and what lies in one block there
        has nothing to do with use."""
        for group in self.groups:
            orders = [torch.randperm(t.rows, generator=torch.Generator().manual_seed(i)) for i, t in enumerate(group.tables)]
            size = max(1, min(group.pool_rows) // 2)
            for first in range(0, max(map(len, orders)), size):
                parts = [order[first : first + size] for order in orders]
                offsets = torch.tensor([0, *map(len, parts)]).cumsum(0)
                ticket = group._begin(torch.cat(parts).to(self.device), offsets.to(self.device), None, True)
                group._pool.wait(ticket.seq)
                group._pool.release(ticket.seq)

    def counters(self) -> dict[str, int]:
        """Sums over this rank's tables and volumes."""
        tables = [t for g in self.groups for t in g.stats()]
        volumes = [v.stats() for v in durability.volumes(self.groups)]  # groups share them
        sums = {k: sum(int(t[k]) for t in tables) for k in ("lookups", "unique_rows", "misses")}
        return sums | {"read_ios": sum(int(v["read_ios"]) for v in volumes)}

    def every_row(self) -> torch.Tensor:
        """What the model's tables say of each row, looked up one by one on all ranks. Shape: (rows, tables × dim), on the processor."""
        features, parts = [t.feature for t in self.shape.shapes], []
        collection = self.dmp.module.get_submodule(EBC_PATH)
        with torch.no_grad():
            for rows in torch.arange(self.shape.rows).split(self.shape.batch_size):
                count = len(rows) * len(features)
                batch = make_batch(features, rows.repeat(len(features)).numpy(), np.ones(count, np.int32), np.zeros((1, 1), np.float32),
                                   np.zeros(1, np.float32))  # fmt: skip
                pooled = collection(batch.sparse_features.to(self.device)).wait()
                parts.append(torch.cat([pooled[f] for f in features], dim=1).cpu())
        return torch.cat(parts)
