"""The plan as people read it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torchrec.distributed.planner.types import ShardingOption, Stats, Topology

from ..parameter_sharding import TIERED_KERNEL
from ..sizes import show_bytes
from .estimators import uncharged_bytes
from .explanations import PlanSummary, summary
from .perf_model import PerfModel
from .search import predicted
from .sharding_options import TieredShardingOption
from .storage import bytes_in

logger = logging.getLogger(__name__)
_TIERS = ("hbm", "ddr", "pmem", "ssd")
_TEXTS = ("table", "sharding", "kernel", "ranks", "why")


def plan_rows(options: Sequence[ShardingOption], pmem: bool, alternatives: Mapping[str, str]) -> list[dict[str, Any]]:
    """One dict a table, in the plan's order. ``pmem``: whether there is some for caches; ``alternatives``: what each table's other place
    would cost, by its fqn."""
    any_tiered = any(isinstance(option, TieredShardingOption) for option in options)
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
                "cache_rows": tiered.cache_rows or None if tiered else None,
                "hbm_bytes": option.total_storage.hbm,
                "ddr_bytes": option.total_storage.ddr + sum(uncharged_bytes(option)),
                "pmem_bytes": bytes_in(option.total_storage, "pmem"),
                "ssd_bytes": option.total_storage.ssd,
                "hit_ratio": tiered.hit_ratio() if tiered else None,
                "lookups": sum(use.lookups for use in option.uses),
                "why": "; ".join(filter(None, (_why(option, any_tiered, pmem), alternatives.get(option.fqn, "") if any_tiered else ""))),
            }
        )
    return rows


def _why(option: ShardingOption, any_tiered: bool, pmem: bool) -> str:
    if not isinstance(option, TieredShardingOption):
        return "most time saved a byte" if any_tiered else "everything fits"
    why = "smallest pool" if option.pool_rows == option.min_pool_rows else ""
    if option.pool_tier == "hbm":
        return "; ".join(filter(None, (option.place, why)))
    return "; ".join(filter(None, (why, "a cache's index costs more than it holds" if pmem and not option.cache_rows else "")))


def plan_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of a table of the rows of ``plan_rows``. Caches have columns where there are some.

    Shapes: (columns,), (tables, columns).
    """
    cached = any(r["cache_rows"] for r in rows)
    hits = any(r.get("hit_ratio") is not None for r in rows)
    heads = ["table", "sharding", "kernel", "ranks", "rows", "pool rows", *(["cache rows"] if cached else [])]
    heads += ["lookups", "hit ratio"] if hits else []
    on_gpu = any(r.get("hbm_bytes") for r in rows)
    heads += [*(["hbm"] if on_gpu else []), "ddr", *(["pmem"] if cached and not on_gpu else []), "ssd", "why"]
    lines = []
    for r in rows:
        cells = {
            "table": r["table"],
            "sharding": r["sharding"],
            "kernel": "tiered" if r["kernel"] == TIERED_KERNEL else r["kernel"],
            "ranks": ", ".join(map(str, r["ranks"])),
            "rows": f"{r['rows']:,}",
            "pool rows": "all" if r["pool_rows"] is None else f"{r['pool_rows']:,}",
            "cache rows": f"{r['cache_rows']:,}" if r["cache_rows"] else "",
            "lookups": f"{r.get('lookups', 0):,.0f}",
            "hit ratio": "" if r.get("hit_ratio") is None else f"{r['hit_ratio']:.3f}",
            **{tier: show_bytes(r[f"{tier}_bytes"]) if r.get(f"{tier}_bytes") else "" for tier in _TIERS},
            "why": r["why"],
        }
        lines.append([cells[head] for head in heads])
    return heads, lines


def render_plan(rows: Sequence[Mapping[str, Any]], topology: Topology | None = None) -> Table:
    """The rows of ``plan_rows`` as a rich table, with totals, and with the budgets of all ranks where there is a topology."""
    heads, lines = plan_cells(rows)
    totals = {tier: show_bytes(sum(r.get(f"{tier}_bytes", 0) for r in rows)) for tier in _TIERS}
    if topology is not None:
        for tier in ("hbm", "ddr", "ssd"):
            totals[tier] += f"\nof {show_bytes(sum(getattr(device.storage, tier) for device in topology.devices))}"
        pmem = getattr(topology, "pmem", None)
        totals["pmem"] += f"\nof {show_bytes(pmem.capacity_bytes * len(topology.devices))}" if pmem else ""
    totals |= {"table": "total", "rows": f"{sum(r['rows'] for r in rows):,}"}
    table = Table(title="plan", title_justify="left", show_footer=True, box=box.SIMPLE, pad_edge=False)
    for head in heads:
        justify: Any = "left" if head in _TEXTS else "right"
        table.add_column(head, totals.get(head, ""), justify=justify, no_wrap=head not in ("table", "ranks", "why"), overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


class TieredStats(Stats):
    """Logs the plan, at level INFO.

    In a stock planner it needs the model alone, and says what is known without a search: each table's bytes and place, and the predicted
    step. ``TieredShardingPlanner`` gives what its own ``described`` and ``summarized`` say.
    """

    def __init__(
        self,
        model: PerfModel,
        described: Callable[[list[ShardingOption]], list[dict[str, Any]]] | None = None,
        summarized: Callable[[list[ShardingOption]], PlanSummary] | None = None,
    ) -> None:
        self._model, self._described, self._summarized = model, described, summarized

    def log(self, sharding_plan: Any, topology: Topology, *args: Any, best_plan: list[ShardingOption], **kwargs: Any) -> None:
        """Called by the planner; without a plan the error says everything."""
        if not sharding_plan.plan:
            return
        rows = self._described(best_plan) if self._described else plan_rows(best_plan, getattr(topology, "pmem", None) is not None, {})
        if self._summarized:
            told = self._summarized(best_plan)
        else:
            told = summary(predicted(best_plan, self._model, topology.world_size), None, ())
        console = Console(width=160, no_color=True)
        with console.capture() as capture:
            console.print(render_plan(rows, topology))
            for line in told.lines():
                console.print(line, highlight=False)
        logger.info("\n%s", capture.get())
