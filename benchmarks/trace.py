"""A picture of some steps from tiers, with prefetch and without: what the training thread and the native one do, and what is in flight.

Drawn from the traces that ``mtrains.trace`` writes, which ``--traces FOLDER`` keeps for Perfetto. It measures nothing that is compared: the
figures are those of train.py.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import torchrec_mtrains as mtrains
from _common import finish, options, print_machine
from _train_dense import calibrated_width
from _train_sides import Batches, Shape, Side, put_every_row, tiered
from _train_traces import Stretch, zipf_trace
from torchrec_mtrains.process_group import process_group

SHARE = 0.05
"""Of a table's rows in its pool."""

COLOURS = {
    "forward": "#8fbfd0",
    "backward": "#1f6f8b",
    "optimizer": "#b9d8a8",
    "wait for rows": "#c0392b",
    "look up": "#e0a458",
    "evict": "#8e6c8a",
    "fill slots": "#c9b458",
}
LANES = {"training thread": ("forward", "backward", "optimizer", "wait for rows"), "native thread": ("look up", "evict", "fill slots")}


def traced(side: Side, batches: Batches, steps: int, file: Path) -> list[dict[str, Any]]:
    with mtrains.trace(file):
        side.run(batches, "top", steps, 0)
    return [e for e in json.loads(file.read_text())["traceEvents"] if e["ph"] == "X"]


def in_flight(events: list[dict[str, Any]], what: str) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds at which the number of reads or writes in flight changes, and that number from then on."""
    mine = [e for e in events if e["name"] == what]
    times = np.array([t for e in mine for t in (e["ts"], e["ts"] + e["dur"])])
    changes = np.array([c for _ in mine for c in (1, -1)])
    order = np.argsort(times, kind="stable")
    return times[order] / 1e3, np.cumsum(changes[order])


def _draw_side(axes: tuple[Any, Any], title: str, events: list[dict[str, Any]], last_ms: float) -> None:
    lanes, queue = axes
    for y, (lane, names) in enumerate(LANES.items()):
        for e in events:
            name = next((n for n in names if e["name"].startswith(n)), None)
            if name:
                over = name == "wait for rows"  # it is inside the forward
                lanes.broken_barh([(e["ts"] / 1e3, e["dur"] / 1e3)], (-y - 0.4, 0.8), color=COLOURS[name], zorder=2 + over, linewidth=0)
        lanes.text(-0.005 * last_ms, -y, lane, ha="right", va="center", fontsize=8)
    lanes.set_title(title, loc="left", fontsize=10)
    lanes.set_yticks([])
    lanes.set_xlim(0, last_ms)
    for what, colour in (("read", "#1f6f8b"), ("write", "#c0392b")):
        times, count = in_flight(events, what)
        queue.fill_between(times, count, step="post", color=colour, alpha=0.5, linewidth=0, label=f"{what}s in flight")
    queue.set_xlim(0, last_ms)
    queue.set_xlabel("milliseconds", fontsize=8)
    queue.legend(loc="upper right", fontsize=7, frameon=False)


def draw(file: Path, sides: dict[str, list[dict[str, Any]]]) -> None:
    """All sides on one scale of time."""
    last_ms = max(e["ts"] + e["dur"] for events in sides.values() for e in events if e["name"].startswith("optimizer")) / 1e3
    figure, axes = plt.subplots(2 * len(sides), 1, figsize=(12, 3.2 * len(sides)), height_ratios=[1, 1] * len(sides), layout="constrained")
    for k, (title, events) in enumerate(sides.items()):
        _draw_side((axes[2 * k], axes[2 * k + 1]), title, events, last_ms)
    figure.legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=c, label=n) for n, c in COLOURS.items()], loc="outside lower center", ncols=7, fontsize=8
    )
    figure.savefig(file, dpi=120)
    plt.close(figure)


def overlapped(events: list[dict[str, Any]]) -> float:
    """The share of the time with reads in flight in which the training thread did not wait for rows."""
    grid = np.arange(0, max(e["ts"] + e["dur"] for e in events), 20.0)  # microseconds

    def covered(name: str) -> np.ndarray:
        inside = np.zeros(len(grid) + 1, int)
        for e in events:
            if e["name"] == name:
                np.add.at(inside, np.searchsorted(grid, [e["ts"], e["ts"] + e["dur"]]), (1, -1))
        return np.cumsum(inside)[:-1] > 0

    reads = covered("read")
    return float((reads & ~covered("wait for rows")).sum() / max(1, reads.sum()))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--path", type=Path, default=Path.cwd(), help="a folder on the disk to train over")
    parser.add_argument("--dense-ms", type=float, default=40.0, help="forward and backward of the top MLP")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--picture", type=Path, help="the PNG to draw")
    parser.add_argument("--traces", type=Path, help="a folder for the traces themselves")
    args = parser.parse_args()
    facts = print_machine()
    shape = Shape((20_000,) * 2, 16, 32, 2) if args.quick else Shape((300_000,) * 8, 64, 1024, 4)
    dense_ms, warm = (1.0, 40) if args.quick else (args.dense_ms, 300)
    top = calibrated_width(shape.top_inputs, shape.batch_size, dense_ms, torch.get_num_threads())
    stretch = Stretch(warm, 80 + args.steps, 80)
    made = [zipf_trace("zipf 1.05", rows, shape.lookups, stretch, t) for t, rows in enumerate(shape.rows)]
    warming, batches = Batches(shape), Batches(shape)
    warming.append([type(m)(m.name, m.rows, m.ids[:warm]) for m in made])
    batches.append(made, first=warm)
    batches.make(0, len(batches))
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=args.path) as name, process_group():
        for title, depth, look in (("prefetch and lookahead", 2, None), ("no prefetch", 0, 0)):
            side = tiered(title, shape, {"top": top["width"]}, shape.pool_rows(SHARE), Path(name) / str(depth), depth, look)
            side.warm(list(warming.from_number(0)))
            put_every_row(side)
            side.run(batches, "top", 70, 0)  # the window fills
            file = (args.traces or Path(name)) / f"{title.replace(' ', '-')}.json"
            found[title] = traced(side, batches, args.steps, file)
            side.close()
    values = {}
    for title, events in found.items():
        steps = [e["dur"] / 1e3 for e in events if e["name"] == "wait for rows"]
        values[title] = {"share_of_reading_overlapped": overlapped(events), "wait_ms_median": statistics.median(steps)}
        print(f"{title}: {values[title]['share_of_reading_overlapped']:.0%} of the time with reads in flight was not waited for; "
              f"a step waits {values[title]['wait_ms_median']:.2f} ms")  # fmt: skip
    if args.picture:
        draw(args.picture, found)
        print(f"drawn: {args.picture}")
    finish(args, facts, {"sides": values})


if __name__ == "__main__":
    main()
