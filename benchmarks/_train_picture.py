"""The figures of ``train.py`` as one PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from _store_picture import LIMIT, OTHER, OURS

POLICIES = {"lru": ("LRU", OTHER), "ours": ("ours", "#8fbfd0"), "neighbours": ("ours, lookahead and neighbours", OURS)}
SIDES = {
    "memory": ("in memory", OTHER),
    "all": ("all rows in pools", "#8fbfd0"),
    "pools": ("10% in pools", OURS),
    "no look": ("no prefetch", "#e0c9a6"),
}


def _misses(axes: Any, f: dict[str, Any], share: str) -> None:
    names = list(f["traces"])
    for k, (policy, (label, colour)) in enumerate(POLICIES.items()):
        values = [f["traces"][n]["pools"][share][policy] for n in names]
        axes.barh([i + (k - 1) * 0.27 for i in range(len(names))], values, height=0.25, color=colour, label=label)
    for i, name in enumerate(names):
        best = f["traces"][name]["pools"][share]["optimum"]
        axes.plot([best, best], [i - 0.42, i + 0.42], color=LIMIT, linewidth=2, label=None if i else "optimum, without neighbours")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(f"Rows of a batch that are missing, pool {float(share):.0%}", loc="left", fontsize=10)
    axes.set_xlabel("misses ÷ unique rows", fontsize=8)


def _steps(axes: Any, f: dict[str, Any]) -> None:
    parts = f["parts"]
    for k, (side, (label, colour)) in enumerate(SIDES.items()):
        places = [i + (k - 1.5) * 0.2 for i in range(len(parts))]
        axes.barh(places, [p["step_ms"][side] for p in parts], height=0.18, color=colour, label=label)
    for i, p in enumerate(parts):
        bound = p[f"{p['bound_by']}_bound_ms"]
        axes.plot([bound, bound], [i - 0.42, i + 0.42], color=LIMIT, linewidth=2, label=None if i else "bound of 10% in pools")
    axes.set_yticks(range(len(parts)), [f"{p['trace']}, {p['top']}" for p in parts])
    axes.set_title(f"Step of a DLRM, {len(f['shape']['rows'])} tables", loc="left", fontsize=10)
    axes.set_xlabel("ms", fontsize=8)


def draw(file: Path, sections: dict[str, Any], machine: dict[str, Any]) -> None:
    """Panels for the sections that ran."""
    panels: list[Any] = []
    if misses := sections.get("misses"):
        shares = list(next(iter(misses["traces"].values()))["pools"])
        panels += [lambda axes, s=share: _misses(axes, misses, s) for share in (shares[0], shares[-1])]
    panels += [lambda axes, f=sections[name]: _steps(axes, f) for name in ("steps", "criteo") if name in sections]
    if not panels:
        return
    figure, axes = plt.subplots((len(panels) + 1) // 2, 2, figsize=(13, 4.6 * ((len(panels) + 1) // 2)), squeeze=False)
    for at, panel in zip(axes.flat, panels, strict=False):
        panel(at)
        at.invert_yaxis()
        at.tick_params(labelsize=8)
        at.legend(fontsize=7)
        for side in ("top", "right"):
            at.spines[side].set_visible(False)
    for at in list(axes.flat)[len(panels) :]:
        at.set_visible(False)
    figure.suptitle(f"Training from tiers on {machine['cpu']}, {machine['cores']} cores, kernel {machine['kernel']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
