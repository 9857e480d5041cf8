"""Where the main job's tables live: all in memory (TorchRec's own plan), or in tiers under a memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from .data import BatchSource, TableShape
from .errors import ConfigurationError
from .job_model import stock_plan, stock_sharders

if TYPE_CHECKING:
    from .train import TrainOptions


@dataclass(frozen=True)
class PlacementOptions:
    """``in_memory`` keeps every table in memory. Otherwise ``ssd`` names the folders of the volume, ``ddr_budget_bytes`` bounds
    the memory of all pools, and ``pool_rows`` sets every table's pool by hand."""

    in_memory: bool = False
    ssd: tuple[str, ...] = ()
    ssd_capacity_bytes: int | None = None
    ddr_budget_bytes: int | None = None
    pool_rows: int | None = None

    def __post_init__(self) -> None:
        if self.in_memory and (self.ssd or self.ddr_budget_bytes or self.pool_rows):
            raise ConfigurationError("--in-memory keeps whole tables in memory: leave out --ssd, --ddr-budget and --pool-rows")
        if not self.in_memory and not self.ssd:
            raise ConfigurationError("say where the tables live: --ssd PATH for the SSD tier, or --in-memory")


def init_fns(tables: Sequence[TableShape], options: TrainOptions) -> dict[str, Any] | None:
    """Initial values per table; None leaves TorchRec's default."""
    return None


def place(model: nn.Module, source: BatchSource, options: TrainOptions, pg: Any) -> tuple[Any, Any]:
    """Sharders and plan for the model."""
    sharders = stock_sharders(options.model)
    return sharders, stock_plan(model, sharders, pg.size(), pg)


def plan_rows(plan: Any, tables: Sequence[TableShape], options: TrainOptions) -> list[dict[str, Any]]:
    """The plan, one dict a table."""
    by_name = {t.name: t for t in tables}
    row_bytes = 4 * options.model.embedding_dim
    rows = []
    for module in plan.plan.values():
        for name, sharding in module.items():
            table = by_name[name]
            rows.append(
                {
                    "table": name,
                    "sharding": sharding.sharding_type,
                    "kernel": sharding.compute_kernel,
                    "ranks": sharding.ranks,
                    "rows": table.rows,
                    "pool_rows": None,
                    "ddr_bytes": table.rows * row_bytes,
                    "ssd_bytes": 0,
                    "why": "all in memory",
                }
            )
    return rows


def counters(dmp: nn.Module) -> dict[str, float]:
    """The tiered tables' counters, summed."""
    return {}


def table_stats(dmp: nn.Module) -> list[dict[str, Any]]:
    """The tiered tables' counters, one dict a table."""
    return []


def volume_stats(dmp: nn.Module) -> list[dict[str, Any]]:
    """The volumes' counters, one dict a volume."""
    return []
