"""A job's report: one HTML file with its pictures inside."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .html_page import document, picture, png, table, write
from .meters import PHASES
from .planner import plan_cells
from .show import summary
from .sizes import show_bytes
from .tier_table import tier_rows
from .train import StepRecord, TrainResult

_POINTS = 300  # a curve is averaged over equal stretches of steps down to so many points
_MIB = 1 << 20


def stretches(values: Sequence[float], points: int = _POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Means over equal stretches of a series.

    Shapes: values (n,) → positions and means, both (min(n, points),); a position is the middle of its stretch.
    """
    parts = np.array_split(np.asarray(values, np.float64), min(len(values), points))
    ends = np.cumsum([len(part) for part in parts])
    return ends - np.array([(len(part) + 1) / 2 for part in parts]), np.array([part.mean() for part in parts])


def _axes(ylabel: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3))
    axes = figure.subplots()
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def _curve(axes: Any, steps: Sequence[StepRecord], values: Sequence[float], **style: Any) -> None:
    at, mean = stretches(values)
    axes.plot(steps[0].number + at, mean, linewidth=1.5, **style)


def loss_picture(steps: Sequence[StepRecord]) -> str:
    """Training loss by step."""
    figure, axes = _axes("loss (binary cross-entropy)")
    _curve(axes, steps, [s.loss for s in steps])
    return png(figure)


def hit_picture(steps: Sequence[StepRecord]) -> str:
    """Share of lookups, and of distinct rows, that found their row in the pool."""
    figure, axes = _axes("share found in the pool")
    for label, of in (("lookups", "lookups"), ("distinct rows of a batch", "unique_rows")):
        _curve(axes, steps, [1 - s.tiers["misses"] / max(1, s.tiers[of]) for s in steps], label=label)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    return png(figure)


def io_picture(steps: Sequence[StepRecord]) -> str:
    """MiB read and written a step."""
    figure, axes = _axes("MiB a step")
    for label, key in (("read from the SSD", "read_bytes"), ("written to the SSD", "write_bytes")):
        _curve(axes, steps, [s.tiers[key] / _MIB for s in steps], label=label)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return png(figure)


def time_picture(steps: Sequence[StepRecord]) -> str:
    """Milliseconds of a step by phase, stacked; waiting for reads is a part of the lookup, drawn apart."""
    figure, axes = _axes("ms a step")
    layers: dict[str, list[float]] = {}
    for phase in PHASES:
        layers[phase] = [s.phases[phase] * 1e3 for s in steps]
    waited = [s.tiers.get("read_wait_seconds", 0.0) * 1e3 for s in steps]
    if any(waited):
        layers["lookup"] = [max(0.0, a - b) for a, b in zip(layers["lookup"], waited, strict=True)]
        layers["waiting for the SSD"] = waited
    averaged = {name: stretches(values) for name, values in layers.items()}
    at = next(iter(averaged.values()))[0]
    axes.stackplot(steps[0].number + at, *(mean for _, mean in averaged.values()), labels=list(averaged))
    highest = sum(mean for _, mean in averaged.values())
    axes.set_ylim(0, 1.15 * float(np.percentile(highest, 99)))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return png(figure)


def page(result: TrainResult) -> str:
    """The report of a finished job as HTML."""
    steps = result.steps
    parts = [f"<h1>{html.escape(result.data)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in summary(result))]
    parts.append("<h2>Tiers of this rank</h2>")
    parts.append(
        table(
            ("tier", "rows", "bytes", "lookups", "hits", "reads", "read", "writes", "written"),
            [
                (
                    r.tier,
                    r.rows,
                    show_bytes(r.bytes),
                    r.lookups,
                    r.hits,
                    r.reads,
                    show_bytes(r.read_bytes),
                    r.writes,
                    show_bytes(r.written_bytes),
                )
                for r in tier_rows(result)
            ],
        )
    )  # fmt: skip
    if steps:
        parts.append(picture("Loss", loss_picture(steps)))
        if any(s.tiers.get("lookups") for s in steps):
            parts.append(picture("Hit ratio", hit_picture(steps)))
            parts.append(picture("I/O per step", io_picture(steps)))
        parts.append(picture("Where a step's time went", time_picture(steps)))
    parts.append("<h2>Plan</h2>")
    parts.append(table(*plan_cells(result.plan)))
    return document(result.data, parts)


def write_report(result: TrainResult, path: Path) -> Path:
    """Write the report, making its folder.

    Raises: ConfigurationError when the file cannot be written.
    """
    return write(page(result), path)
