"""Why a plan is what it is: the predicted step and its bottleneck, what each table's other place would cost, what more memory would buy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchrec.distributed.planner.types import ShardingOption

from ..errors import ConfigurationError
from ..sizes import show_bytes
from .candidates import busy_of_shards
from .estimators import uncharged_bytes
from .footprint import Table
from .perf_model import RESOURCES, Floats, PerfModel, StepPrediction
from .search import SearchResult
from .sharding_options import TieredShardingOption

GIB = 1 << 30
_CURVE_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class PlanSummary:
    """``busy_share``: of the step, by resource. ``bound_ms``: no plan with tiers has a faster step; None where everything is in memory.
    ``one_more_gib_ms``: by tier, what a GiB more on every rank takes off the bound. ``memory``: "ddr", or "hbm", where tables train;
    ``memory_bytes``: that a rank has of it for tables, on average, and ``step_by_memory``: (bytes a rank, bound) pairs; 0 and none where
    everything is there. ``notes``: what was assumed."""

    step_ms: float
    bottleneck: str
    busy_share: dict[str, float]
    bound_ms: float | None
    search_seconds: float
    one_more_gib_ms: dict[str, float]
    memory: str
    memory_bytes: float
    step_by_memory: tuple[tuple[float, float], ...]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """The summary as people read it."""
        busy = ", ".join(f"{name} {share:.0%}" for name, share in self.busy_share.items() if share >= 0.005)
        lines = [f"predicted step {_ms(self.step_ms)}, dense compute not counted unless given; bottleneck {self.bottleneck}; busy: {busy}"]
        if self.bound_ms is not None:
            over = self.step_ms / self.bound_ms if self.bound_ms else 1.0
            lines.append(
                f"no plan is faster than {_ms(self.bound_ms)} (this one ÷ bound: {over:.3f}; searched {self.search_seconds:.1f} s)"
            )
            gains = ", ".join(f"{tier} {_ms(saved)}" for tier, saved in self.one_more_gib_ms.items())
            lines.append(f"one more GiB a rank would save: {gains}")
        return [*lines, *self.notes]


def summary(prediction: StepPrediction, result: SearchResult | None, notes: Sequence[str], memory: str = "ddr") -> PlanSummary:
    """Of a plan; ``result``: of the search, where there was one; ``memory``: where tables train."""
    gains: dict[str, float] = {}
    curve: list[tuple[float, float]] = []
    have_memory = 0.0
    if result is not None:
        for tier in ("hbm", "ddr", "pmem", "ssd"):
            have = result.capacity_bytes(tier)
            more = result.bound_with(tier, have + GIB) if have else None
            if more is not None:
                gains[tier] = max(0.0, result.bound_ms - more)
        have_memory = result.capacity_bytes(memory)
        curve = [(have_memory * f, step) for f in _CURVE_FACTORS if (step := result.bound_with(memory, have_memory * f)) is not None]
    return PlanSummary(
        prediction.step_ms,
        prediction.bottleneck,
        prediction.busy_share,
        result.bound_ms if result else None,
        result.seconds if result else 0.0,
        gains,
        memory,
        have_memory,
        tuple(curve),
        tuple(notes),
    )


def alternative(option: ShardingOption, table: Table, model: PerfModel, *, allowed_in_memory: bool) -> str:
    """What the table's other place would save and cost: in memory for one above the SSD, and the other way round."""
    other = table.in_memory if isinstance(option, TieredShardingOption) else table.tiered
    if other is None:
        if isinstance(option, TieredShardingOption):
            return f"in memory: {'no rank has room' if allowed_in_memory else 'its constraints forbid it'}"
        return "on the SSD: its constraints, module, optimizer or dimension forbid it"
    more_bytes, more_ms = _memory(other) - _memory(option), _busy(other, model) - _busy(option, model)
    where = other.place if isinstance(other, TieredShardingOption) else "in memory"
    at = int(np.argmax(np.abs(more_ms)))
    return f"{where}: {_signed(more_bytes)} {'HBM' if option.total_storage.hbm else 'DDR'}, {more_ms[at]:+.3g} ms of {RESOURCES[at]}"


def draw(plan: PlanSummary, path: str | Path) -> None:
    """One picture: the fastest step that any plan can have, by memory of a rank, with this plan in it.

    Raises: ConfigurationError for a plan that nobody searched for.
    """
    if not plan.step_by_memory:
        raise ConfigurationError(
            f"no picture {path}: every table is in memory, more of which buys nothing; leave --picture out, or lower --{plan.memory}-budget"
        )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    memory, step = zip(*plan.step_by_memory, strict=True)
    axes.plot(np.array(memory) / GIB, step, marker="o", label="bound")
    axes.plot([plan.memory_bytes / GIB], [plan.step_ms], marker="*", markersize=12, linestyle="none", label="this plan")
    axes.set_xlabel(f"{plan.memory.upper()} a rank, GiB")
    axes.set_ylabel("predicted step, ms")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _memory(option: ShardingOption) -> int:
    """Where the table trains."""
    return int(option.total_storage.hbm or option.total_storage.ddr + sum(uncharged_bytes(option)))


def _busy(option: ShardingOption, model: PerfModel) -> Floats:
    """Of all shards together. Shape (resources,)."""
    return np.sum(busy_of_shards(option, model), axis=0)


def _signed(size: int) -> str:
    return f"{'+' if size >= 0 else '-'}{show_bytes(abs(size))}"


def _ms(value: float) -> str:
    return f"{value:.3g} ms"
