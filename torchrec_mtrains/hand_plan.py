"""Plans of the main job that no planner makes: every table in tiers with pools of one size; and what such plans cost."""

from __future__ import annotations

from typing import Any

from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardingType,
    ShardMetadata,
)

from .data import TableShape
from .errors import ConfigurationError
from .job_model import EBC_PATH
from .job_shape import JobShape
from .parameter_sharding import TIERED_KERNEL, TieredParameterSharding
from .planner import PmemDevice
from .planner.pmem_caches import Uncached, cache_rows
from .sizes import show_bytes
from .tiers import PmemCache, SsdHome, TierChain


def tables_of_rank(job: JobShape, rank: int) -> tuple[TableShape, ...]:
    """Tables go to the ranks in turn."""
    return job.tables[rank :: job.world_size]


def plan_by_hand(job: JobShape, embedding_dim: int, pool_rows: int, home: SsdHome, pmem: PmemDevice | None) -> ShardingPlan:
    """Every table whole on one rank, in turn, with a pool of so many rows, and a cache where there is PMem.

    Raises: ConfigurationError for PMem that is too small for any cache.
    """
    by_table: dict[str, ParameterSharding] = {}
    for rank in range(job.world_size):
        tables = tables_of_rank(job, rank)
        cached = _caches(job, tables, pool_rows, pmem)
        for table in tables:
            shard = ShardMetadata(shard_offsets=[0, 0], shard_sizes=[table.rows, embedding_dim], placement=f"rank:{rank}/cpu")
            by_table[table.name] = TieredParameterSharding(
                sharding_type=ShardingType.TABLE_WISE.value,
                compute_kernel=TIERED_KERNEL,
                ranks=[rank],
                sharding_spec=EnumerableShardingSpec([shard]),
                tiers=TierChain(pool_rows, (*cached[table.name], home)),
            )
    return ShardingPlan({EBC_PATH: EmbeddingModuleShardingPlan({table.name: by_table[table.name] for table in job.tables})})


def _caches(job: JobShape, tables: tuple[TableShape, ...], pool_rows: int, pmem: PmemDevice | None) -> dict[str, tuple[PmemCache, ...]]:
    if pmem is None:
        return {table.name: () for table in tables}
    shards = [Uncached(t.rows, max(0, t.rows - pool_rows), job.record_bytes, job.lookups(t)) for t in tables]
    rows = cache_rows(shards, pmem.capacity_bytes)
    if not any(rows) and any(shard.rows_below_pool for shard in shards):
        raise ConfigurationError(
            f"--pmem-capacity {show_bytes(pmem.capacity_bytes)} is too small for {len(tables)} tables: the index of a cache there would "
            "take more memory than a pool with as many rows. Raise it, or leave out --pmem"
        )
    return {table.name: (PmemCache(pmem.path, n),) if n else () for table, n in zip(tables, rows, strict=True)}


def plan_rows(plan: ShardingPlan, job: JobShape) -> list[dict[str, Any]]:
    """A plan of whole tables, one dict a table, as ``TieredShardingPlanner.plan_rows``; what a batch brings along is left out."""
    by_name = {table.name: table for table in job.tables}
    rows = []
    for module in plan.plan.values():
        assert isinstance(module, EmbeddingModuleShardingPlan)
        for name, sharding in module.items():
            table = by_name[name]
            chain = sharding.tiers if isinstance(sharding, TieredParameterSharding) else None
            cost = None if chain is None else job.charge(table, chain)
            rows.append(
                {
                    "table": name,
                    "sharding": sharding.sharding_type,
                    "kernel": sharding.compute_kernel,
                    "ranks": sharding.ranks or [],
                    "rows": table.rows,
                    "pool_rows": None if chain is None else min(chain.pool_rows, table.rows),
                    "cache_rows": sum(min(c.rows, table.rows) for c in chain.caches) or None if chain else None,
                    "ddr_bytes": table.rows * job.record_bytes if cost is None else cost.ddr,
                    "pmem_bytes": cost.pmem if cost else 0,
                    "ssd_bytes": cost.ssd if cost else 0,
                    "why": "asked for in memory" if chain is None else "asked for by hand",
                }
            )
    return rows
