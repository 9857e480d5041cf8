"""The plan as people read it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from torchrec.distributed.planner.types import ShardingOption, Stats, Topology

from ..parameter_sharding import TIERED_KERNEL
from .estimators import uncharged_bytes
from .sharding_options import TieredShardingOption

if TYPE_CHECKING:
    from .planners import TieredShardingPlanner

logger = logging.getLogger(__name__)
_MIB = 1 << 20


def plan_rows(options: Sequence[ShardingOption], levels: Mapping[str, float]) -> list[dict[str, Any]]:
    """One dict a table, in the plan's order. ``levels``: bytes per lookup of a step that each tiered table got, by its fqn."""
    any_tiered = bool(levels)
    rows = []
    for option in options:
        tiered = option if isinstance(option, TieredShardingOption) else None
        rows.append(
            {
                "table": option.name,
                "module": option.path,
                "sharding": option.sharding_type,
                "kernel": option.compute_kernel,
                "ranks": [shard.rank for shard in option.shards],
                "rows": option.tensor.shape[0],
                "pool_rows": tiered.pool_rows if tiered else None,
                "ddr_bytes": option.total_storage.ddr + sum(uncharged_bytes(option)),
                "ssd_bytes": option.total_storage.ssd,
                "bytes_per_lookup": levels.get(option.fqn),
                "why": _why(option, any_tiered),
            }
        )
    return rows


def _why(option: ShardingOption, any_tiered: bool) -> str:
    if not isinstance(option, TieredShardingOption):
        return "most lookups a byte" if any_tiered else "everything fits"
    return "smallest pool" if option.pool_rows == option.min_pool_rows else "lookups' share"


def render_plan(rows: Sequence[Mapping[str, Any]], topology: Topology) -> Table:
    """The rows of ``plan_rows`` as a rich table, with totals; budgets are those of all ranks."""
    ddr, ssd = (sum(getattr(device.storage, tier) for device in topology.devices) for tier in ("ddr", "ssd"))
    table = Table(title="Sharding plan", show_footer=True, box=box.SIMPLE, pad_edge=False)
    table.add_column("table", "total", overflow="fold")
    table.add_column("sharding", no_wrap=True)
    table.add_column("kernel", no_wrap=True)
    table.add_column("ranks")
    table.add_column("rows", f"{sum(r['rows'] for r in rows):,}", justify="right", no_wrap=True)
    table.add_column("pool rows", justify="right", no_wrap=True)
    table.add_column("DDR MiB", _of(sum(r["ddr_bytes"] for r in rows), ddr), justify="right", no_wrap=True)
    table.add_column("SSD MiB", _of(sum(r["ssd_bytes"] for r in rows), ssd), justify="right", no_wrap=True)
    table.add_column("why")
    for r in rows:
        pool = "all" if r["pool_rows"] is None else f"{r['pool_rows']:,}"
        ranks = ", ".join(str(rank) for rank in r["ranks"])
        sizes = [f"{r[name] / _MIB:,.1f}" for name in ("ddr_bytes", "ssd_bytes")]
        kernel = "tiered" if r["kernel"] == TIERED_KERNEL else r["kernel"]
        table.add_row(r["table"], r["sharding"], kernel, ranks, f"{r['rows']:,}", pool, *sizes, r["why"])
    return table


def _of(used_bytes: int, have_bytes: int) -> str:
    return f"{used_bytes / _MIB:,.1f}\nof {have_bytes / _MIB:,.1f}"


class TieredStats(Stats):
    """Logs the plan, at level INFO."""

    def __init__(self, planner: TieredShardingPlanner) -> None:
        self._planner = planner

    def log(self, sharding_plan: Any, topology: Topology, *args: Any, best_plan: list[ShardingOption], **kwargs: Any) -> None:
        """Called by the planner; without a plan the error says everything."""
        if not sharding_plan.plan:
            return
        console = Console(width=160, no_color=True)
        with console.capture() as capture:
            console.print(render_plan(self._planner.described(best_plan), topology))
        logger.info("\n%s", capture.get())
