"""What was predicted against what was measured, and our plans beside others, as one PNG: of the sections that were run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from _common import median
from _planner_placement import ratios
from _store_picture import LIMIT, OURS

_HELD_OUT = "#eb6834"
_KINDS = (("predictions", OURS, "fitted on"), ("held_out", _HELD_OUT, "held out"))


def _scatter(axes: Any, sections: dict[str, Any], value: str, title: str, band: float | None) -> None:
    every: list[float] = []
    for section, color, label in _KINDS:
        lines = sections.get(section, {"lines": []})["lines"]
        measured, predicted = ([line[side][value] for line in lines] for side in ("measured", "predicted"))
        axes.scatter(measured, predicted, s=14, color=color, label=label)
        every += measured + predicted
    if every:
        least, most = min(every), max(every)
        axes.plot([least, most], [least, most], color=LIMIT, linewidth=1)
        if band:
            low, high = ([least * f, most * f] for f in (1 - band, 1 + band))
            axes.fill_between([least, most], low, high, color=LIMIT, alpha=0.15)
            axes.set_xscale("log")
            axes.set_yscale("log")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("measured", fontsize=8)
    axes.set_ylabel("predicted", fontsize=8)
    axes.legend(fontsize=8)


def _placement(axes: Any, lines: list[dict[str, Any]]) -> None:
    for other, color in (("equal", LIMIT), ("uniform", _HELD_OUT), ("greedy", OURS)):
        of_case = {
            line["number"]: median(ratios(*(line["plans"][p]["rounds_ms"] for p in ("ours", other))))
            for line in lines
            if other not in line["same"]
        }
        axes.plot(list(of_case), list(of_case.values()), "o", markersize=5, color=color, label=other)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_title("Our plan's step ÷ another's, by job", loc="left", fontsize=10)
    axes.legend(fontsize=8)


def draw(file: Path, sections: dict[str, Any]) -> None:
    """``sections``: as ``benchmarks/planner.py`` writes them."""
    figure, (steps, ratios, placement) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    _scatter(steps, sections, "step_ms", "Step, ms; the band is ±15%", 0.15)
    _scatter(ratios, sections, "miss_ratio", "Misses ÷ unique rows", None)
    _placement(placement, sections.get("placement", {"lines": []})["lines"])
    machines = {sections[name]["hardware"] for name, _, _ in _KINDS if name in sections}
    figure.suptitle("; ".join(sorted(machines)), fontsize=8, x=0.01, ha="left")
    figure.savefig(file, dpi=110)
    plt.close(figure)
