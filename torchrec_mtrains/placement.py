"""Where the main job's tables live: all in memory (TorchRec's own plan), or in tiers under a memory budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ModuleSharder,
    ParameterSharding,
    ShardingPlan,
    ShardingType,
    ShardMetadata,
)

from .data import BatchSource, TableShape
from .default_sharders import sharders as tiered_sharders
from .errors import ConfigurationError
from .job_model import EBC_PATH, ModelOptions, fused_params, stock_plan, stock_sharders
from .parameter_sharding import TIERED_KERNEL, TieredParameterSharding
from .planner import DdrStorageReservation, TieredShardingPlanner, TieredTopology
from .tiers import SsdHome, TierChain

# Bytes of per-row optimizer state beside the weights, per optimizer: none, one float an element, one float a row.
_STATE_BYTES = {"sgd": lambda dim: 0, "adagrad": lambda dim: 4 * dim, "rowwise_adagrad": lambda dim: 4}
# Room for the tables and as much again: at half full, cleaning the log costs little, and two checkpoints may hold rows back.
_LOG_FACTOR = 2
_LEAST_CAPACITY_BYTES = 1 << 30  # guess: what a small disk has to spare
# What a volume (write chunks, read buffers, cleaning, the heap's slack) and a batch's missed rows on their way cost beside what the
# planner charges. benchmarks/demo_memory.py, 2 cores AMD EPYC, 2026-11-25, 65,536 lookups a step of which 95% miss: 12 MiB over
# the budget with nothing reserved; 7 to 13 MiB below it with 16 MiB. Here 24 MiB at that size, split by guess.
_VOLUME_BYTES = 16 << 20
_BYTES_PER_LOOKUP = 128


@dataclass(frozen=True)
class PlacementOptions:
    """``in_memory`` keeps every table in memory. Otherwise ``ssd`` names the folders of the volume, ``ddr_budget_bytes`` bounds
    the memory of tables, pools and indexes of a rank, and ``pool_rows`` puts every table in tiers with a pool of so many rows."""

    in_memory: bool = False
    ssd: tuple[str, ...] = ()
    ssd_capacity_bytes: int | None = None
    ddr_budget_bytes: int | None = None
    pool_rows: int | None = None

    def __post_init__(self) -> None:
        if self.in_memory and (self.ssd or self.ddr_budget_bytes or self.pool_rows or self.ssd_capacity_bytes):
            raise ConfigurationError(
                "--in-memory keeps whole tables in memory: leave out --ssd, --ssd-capacity, --ddr-budget and --pool-rows"
            )
        if not self.in_memory and not self.ssd:
            raise ConfigurationError("say where the tables live: --ssd PATH with --ddr-budget BYTES for the SSD tier, or --in-memory")
        if self.ssd and (self.ddr_budget_bytes is None) == (self.pool_rows is None):
            raise ConfigurationError("with --ssd give either --ddr-budget BYTES, and the planner decides, or --pool-rows ROWS")


@dataclass
class Placement:
    """Sharders and plan of a model, and the plan as people read it."""

    sharders: list[ModuleSharder[nn.Module]]
    plan: ShardingPlan
    rows: list[dict[str, Any]]


def record_bytes(options: ModelOptions) -> int:
    """Bytes of one row with its optimizer state."""
    return 4 * options.embedding_dim + _STATE_BYTES[options.optimizer](options.embedding_dim)


def ssd_home(tables: tuple[TableShape, ...], model: ModelOptions, options: PlacementOptions, world_size: int) -> SsdHome:
    """The home that all tiered tables share."""
    share = sum(t.rows for t in tables) * record_bytes(model) // world_size
    return SsdHome(options.ssd, options.ssd_capacity_bytes or max(_LEAST_CAPACITY_BYTES, _LOG_FACTOR * share))


def place(model: nn.Module, source: BatchSource, model_options: ModelOptions, options: PlacementOptions, pg: Any) -> Placement:
    """Sharders and plan for the model. Called on every rank; every rank gets the same plan.

    Raises: the planner's errors when the tables do not fit.
    """
    world_size = pg.size()
    if options.in_memory:
        stock = stock_sharders(model_options)
        plan = stock_plan(model, source.tables, stock, world_size, pg)
        return Placement(stock, plan, _plan_rows(plan, source.tables, model_options))
    home = ssd_home(source.tables, model_options, options, world_size)

    tiered = tiered_sharders(fused_params=fused_params(model_options))
    if options.pool_rows is not None:
        plan = _plan_by_hand(source.tables, model_options, TierChain(options.pool_rows, (home,)), world_size)
        return Placement(tiered, plan, _plan_rows(plan, source.tables, model_options))

    assert options.ddr_budget_bytes is not None, "PlacementOptions has one of the two"
    planner = TieredShardingPlanner(
        topology=TieredTopology(
            world_size=world_size,
            compute_device="cpu",
            ddr_budget_bytes=options.ddr_budget_bytes,
            ssd=home,
            local_world_size=world_size,
        ),
        batch_size=source.batch_size,
        storage_reservation=DdrStorageReservation(
            _VOLUME_BYTES + _BYTES_PER_LOOKUP * source.batch_size * sum(t.pooling for t in source.tables)
        ),
        constraints={t.name: ParameterConstraints(pooling_factors=[float(t.pooling)]) for t in source.tables},
    )
    plan = planner.collective_plan(model, tiered, pg)
    return Placement(tiered, plan, planner.plan_rows(plan))


def _plan_by_hand(tables: tuple[TableShape, ...], options: ModelOptions, chain: TierChain, world_size: int) -> ShardingPlan:
    """Every table whole on one rank, in turn."""
    by_table: dict[str, ParameterSharding] = {}
    for t, table in enumerate(tables):
        rank = t % world_size
        shard = ShardMetadata(shard_offsets=[0, 0], shard_sizes=[table.rows, options.embedding_dim], placement=f"rank:{rank}/cpu")
        by_table[table.name] = TieredParameterSharding(
            sharding_type=ShardingType.TABLE_WISE.value,
            compute_kernel=TIERED_KERNEL,
            ranks=[rank],
            sharding_spec=EnumerableShardingSpec([shard]),
            tiers=chain,
        )
    return ShardingPlan({EBC_PATH: EmbeddingModuleShardingPlan(by_table)})


def _plan_rows(plan: ShardingPlan, tables: tuple[TableShape, ...], options: ModelOptions) -> list[dict[str, Any]]:
    """A plan that no tiered planner made, one dict a table, as ``TieredShardingPlanner.plan_rows``; weights and state alone."""
    by_name = {t.name: t for t in tables}
    size = record_bytes(options)
    rows = []
    for module in plan.plan.values():
        assert isinstance(module, EmbeddingModuleShardingPlan)
        for name, sharding in module.items():
            count = by_name[name].rows
            chain = sharding.tiers if isinstance(sharding, TieredParameterSharding) else None
            pool = None if chain is None else min(chain.pool_rows, count)
            rows.append(
                {
                    "table": name,
                    "sharding": sharding.sharding_type,
                    "kernel": sharding.compute_kernel,
                    "ranks": sharding.ranks or [],
                    "rows": count,
                    "pool_rows": pool,
                    "ddr_bytes": (count if pool is None else pool) * size,
                    "ssd_bytes": 0 if chain is None else count * size,
                    "why": "asked for in memory" if chain is None else "asked for by hand",
                }
            )
    return rows
