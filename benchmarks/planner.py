"""Every figure of the planner in one run: a table, JSON and a picture.

Sections: predictions (step times and miss ratios, predicted and trained), held_out (the same of configurations that no constant was
fitted on), placement (our plans trained beside others of the same memory), contention (two ranks on one SSD), curves (sampled miss-ratio
curves against full ones), statistics (what a profile does for stock UVM-caching plans), oracles (the search against plans known to be
best), scale (large plans: objective over bound, time, memory). Each says in its module how it measures; docs/planner.md and
docs/calibrate.md what the figures mean.
"""

from __future__ import annotations

# ruff: noqa: E402
from torchrec_mtrains.spinning import spin_briefly

spin_briefly()  # before torch comes in: measured is what users of ``mtrains`` get

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

from torchrec_mtrains.planner import HardwareProfile

import _planner_contention
import _planner_curves
import _planner_oracles
import _planner_picture
import _planner_placement
import _planner_predictions
import _planner_scale
import _planner_statistics
import torchrec_mtrains as mtrains
from _common import Figure, finish, options, print_figures, print_machine
from torchrec_mtrains.calibration import QUICK as QUICK_CALIBRATION
from torchrec_mtrains.show import quiet


@dataclass
class _Run:
    """What sections measure with. ``root``: a folder on the disk; ``pmem``: one on memory or PMem."""

    args: argparse.Namespace
    root: Path
    pmem: Path

    @cached_property
    def hardware(self) -> HardwareProfile:
        if self.args.hardware:
            return HardwareProfile.load(self.args.hardware)
        start = perf_counter()
        effort = {"effort": QUICK_CALIBRATION} if self.args.quick else {}
        found = mtrains.calibrate((str(self.root),), str(self.pmem), **effort)
        print(f"calibrated in {perf_counter() - start:,.0f} s", flush=True)
        return found


def _predictions(run: _Run) -> tuple[Any, list[Figure]]:
    p = _planner_predictions
    jobs, size = (p.QUICK_CONFIGURATIONS, p.QUICK) if run.args.quick else (p.CONFIGURATIONS, p.FULL)
    found = p.measure(run.root, run.pmem, run.hardware, jobs, size)
    return found, p.figures(found, "predictions", 30)


def _held_out(run: _Run) -> tuple[Any, list[Figure]]:
    p = _planner_predictions
    if run.args.quick:
        jobs, size = p.held_out(2, rows=(1_000, 3_000), dims=(16,), batches=(32,), widths=(16,)), p.QUICK
    else:
        jobs, size = p.held_out(run.args.held_out, seed=run.args.held_out_seed), p.FULL
    found = p.measure(run.root, run.pmem, run.hardware, jobs, size)
    return found, p.figures(found, "held out", 20)


def _placement(run: _Run) -> tuple[Any, list[Figure]]:
    p = _planner_placement
    found = p.measure(run.root, run.hardware, p.QUICK if run.args.quick else p.FULL, run.args.cases)
    return found, p.figures(found)


def _curves(run: _Run) -> tuple[Any, list[Figure]]:
    shape: dict[str, Any] = dict(rows=2_000_000, lookups=32_768, batches=200)
    if run.args.quick:
        shape = dict(rows=60_000, lookups=2_048, batches=20, only=["zipf 0.9"])
    found = _planner_curves.run(**shape, movielens=run.args.movielens, copies=128)
    return found, _planner_curves.figures(found)


def _statistics(run: _Run) -> tuple[Any, list[Figure]]:
    shape = dict(rows=4_000, samples=128, batches=40) if run.args.quick else dict(rows=100_000, samples=2_048, batches=200)
    found = _planner_statistics.run(**shape, **({"hbm_shares": (0.5,)} if run.args.quick else {}))  # type: ignore[arg-type]
    return found, _planner_statistics.figures(found)


def _oracles(run: _Run) -> tuple[Any, list[Figure]]:
    seeds, every = (range(4), 2) if run.args.quick else (range(*run.args.oracle_seeds), 6)
    found = _planner_oracles.measure(seeds, every)
    return found, _planner_oracles.figures(found)


def _scale(run: _Run) -> tuple[Any, list[Figure]]:
    found = _planner_scale.measure(((4, 2),) if run.args.quick else _planner_scale.SIZES)
    return found, _planner_scale.figures(found)


def _contention(run: _Run) -> tuple[Any, list[Figure]]:
    found = _planner_contention.measure(run.root, run.hardware, _planner_contention.QUICK if run.args.quick else _planner_contention.FULL)
    return found, _planner_contention.figures(found)


SECTIONS: dict[str, Callable[[_Run], tuple[Any, list[Figure]]]] = {
    "predictions": _predictions,
    "held_out": _held_out,
    "placement": _placement,
    "contention": _contention,
    "curves": _curves,
    "statistics": _statistics,
    "oracles": _oracles,
    "scale": _scale,
}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--path", type=Path, default=Path.cwd(), help="a folder on the disk to measure")
    parser.add_argument("--pmem-path", type=Path, default=Path("/dev/shm"), help="a folder on PMem or tmpfs for caches")
    parser.add_argument("--hardware", type=Path, help="a profile of this machine by mtrains calibrate; made now if left out")
    parser.add_argument("--cases", type=int, nargs="+", help="of placement, by number; all if left out")
    parser.add_argument("--held-out", type=int, default=24, help="configurations of held_out")
    parser.add_argument("--held-out-seed", type=int, default=_planner_predictions.HELD_OUT_SEED, help="what draws them")
    parser.add_argument("--oracle-seeds", type=int, nargs=2, default=(0, 240), metavar=("FIRST", "END"), help="cases of oracles")
    parser.add_argument("--movielens", type=Path, help="ml-100k.inter, for two more traces of curves")
    parser.add_argument("--picture", type=Path, help="also draw the figures into this PNG")
    args = parser.parse_args()
    quiet()
    facts, start = print_machine(), perf_counter()
    sections: dict[str, Any] = {}
    lines: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=args.path.resolve()) as root, tempfile.TemporaryDirectory(dir=args.pmem_path) as pmem:
        run = _Run(args, Path(root), Path(pmem))
        for name in args.only:
            print(f"== {name}, after {perf_counter() - start:,.0f} s", flush=True)
            sections[name], found = SECTIONS[name](run)
            lines += [replace(f, goal="") if args.quick else f for f in found]
    print(f"== figures, after {perf_counter() - start:,.0f} s")
    print_figures(lines)
    if args.picture:
        _planner_picture.draw(args.picture, sections)
        print(f"drawn: {args.picture}")
    values = {f.name: {"value": f.value, "goal": f.goal, "met": f.met} for f in lines}
    finish(args, facts, {"sections": sections, "figures": values})


if __name__ == "__main__":
    main()
