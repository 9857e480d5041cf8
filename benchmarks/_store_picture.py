"""One picture of a run of ``store.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHER, LIMIT = "#1f6f8b", "#c4c9cc", "#b5442e"


def _bars(axes: Any, title: str, unit: str, values: dict[str, float], goals: dict[str, float] | None = None) -> None:
    names = list(values)
    axes.barh(names, list(values.values()), color=[OTHER if n.startswith(("rocksdb", "lmdb", "mmap", "ceiling")) else OURS for n in names])
    for name, goal in (goals or {}).items():
        at = names.index(name)
        axes.plot([goal, goal], [at - 0.4, at + 0.4], color=LIMIT, linewidth=2)
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw(file: Path, sections: dict[str, Any], machine: dict[str, Any]) -> None:
    """Panels for the sections that ran."""
    panels: list[tuple[str, str, dict[str, float], dict[str, float]]] = []
    if reads := sections.get("reads"):
        panels.append(("Cold random reads", "rows/s", {n: s["rows_per_s"] for n, s in reads["subjects"].items()}, {}))
    if packing := sections.get("packing"):
        traces = packing["traces"]
        most = {n: t["at_most"] for n, t in traces.items()}
        panels.append(("Rows an I/O (red: at most)", "rows", {n: t["rows_per_io"] for n, t in traces.items()}, most))
    if mixed := sections.get("mixed"):
        panels.append(("Mixed load, 1 read : 1 write-back", "rows read/s", mixed["rows_per_s"], {}))
    if writes := sections.get("writes"):
        states = {f"{s['stream']}, {s['fill']:.0%} full": s for s in writes["steady_state"]}
        amplification, goals = ({n: s[key] for n, s in states.items()} for key in ("write_amplification", "goal"))
        panels.append(("Write amplification (red: goal)", "bytes written ÷ bytes put", amplification, goals))
    if opened := sections.get("open"):
        times = {how: opened[how]["seconds"] for how in ("clean", "crash")}
        panels.append((f"Opening {opened['rows'] / 1e6:,.0f}M rows, after", "s", times, {}))
    if not panels:
        return
    figure, axes = plt.subplots((len(panels) + 1) // 2, 2, figsize=(11, 3.2 * ((len(panels) + 1) // 2)), squeeze=False)
    for at, panel in zip(axes.flat, panels, strict=False):
        _bars(at, *panel)
    for at in list(axes.flat)[len(panels) :]:
        at.set_visible(False)
    figure.suptitle(f"SsdVolume on {machine['cpu']}, {machine['cores']} cores, kernel {machine['kernel']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
