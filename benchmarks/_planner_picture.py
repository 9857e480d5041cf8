"""Predicted against measured, as one PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from _store_picture import LIMIT, OURS


def _scatter(axes: Any, f: dict[str, Any], value: str, title: str, band: float | None) -> None:
    measured, predicted = ([line[side][value] for line in f["lines"]] for side in ("measured", "predicted"))
    least, most = min(measured + predicted), max(measured + predicted)
    axes.plot([least, most], [least, most], color=LIMIT, linewidth=1)
    if band:
        axes.fill_between(
            [least, most], [least * (1 - band), most * (1 - band)], [least * (1 + band), most * (1 + band)], color=LIMIT, alpha=0.15
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.scatter(measured, predicted, s=14, color=OURS)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("measured", fontsize=8)
    axes.set_ylabel("predicted", fontsize=8)


def draw(file: Path, f: dict[str, Any]) -> None:
    """The lines of ``_planner_predictions.measure``."""
    figure, (steps, ratios) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    _scatter(steps, f, "step_ms", "Step, ms; the band is ±15%", 0.15)
    _scatter(ratios, f, "miss_ratio", "Misses ÷ unique rows", None)
    figure.suptitle(f["hardware"], fontsize=8, x=0.01, ha="left")
    figure.savefig(file, dpi=110)
    plt.close(figure)
