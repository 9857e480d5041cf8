"""Training from tiers in one run: misses, step times against the same model in memory, a table, JSON and a picture.

Sections: misses (our eviction against LRU and an optimum), bound (what eviction can do without knowing the future), directory (what
announced batches cost), steps (8 alike tables), criteo (26 tables of Criteo's cardinalities). ``benchmarks/_train_misses.py``,
``_train_bound.py``, ``_train_directory.py`` and ``_train_steps.py`` say how they measure; docs/benchmarks.md says what the figures mean.
"""

from __future__ import annotations

# ruff: noqa: E402
from torchrec_mtrains.spinning import spin_briefly

spin_briefly()  # before torch comes in

import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import _train_bound
import _train_directory
import _train_misses
import _train_picture
import _train_steps
from _common import Figure, finish, options, print_figures, print_machine
from _train_sides import Shape
from _train_steps import Dense, Part, Turns
from _train_traces import COPIES, Stretch, zipf_trace
from torchrec_mtrains.data.fetch import fetch_ml_100k

MODULES: dict[str, Any] = {
    "misses": _train_misses,
    "bound": _train_bound,
    "directory": _train_directory,
    "steps": _train_steps,
    "criteo": _train_steps,
}

CRITEO_ROWS = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652, 2173, 4, 7046547,
    18, 15, 286181, 105, 142572,
)  # fmt: skip
"""Distinct values of Criteo's 26 categories in the Kaggle set (facebookresearch/dlrm, README: 33,762,577 rows in all)."""

SPARE_CORE = "120 ms, one core to spare"


def criteo_rows(total: int) -> tuple[int, ...]:
    """Tables in proportion to Criteo's, of so many rows together; those of a batch's size or less keep theirs."""
    share = total / sum(CRITEO_ROWS)
    return tuple(rows if rows <= 4096 else max(4096, round(rows * share)) for rows in CRITEO_ROWS)


def sizes(args: Any) -> dict[str, dict[str, Any]]:
    """The arguments of each section's ``measure``."""
    cores = torch.get_num_threads()
    movielens = None if args.no_movielens else fetch_ml_100k(args.movielens)
    if args.quick:
        misses = dict(rows=20_000, lookups=64, stretch=Stretch(40, 20, 20), pools=(0.02, 0.1), copies=2)
        bound = dict(rows=2_000, lookups=32, stretch=Stretch(40, 20, 0), pools=(0.1,))
        shapes = {"steps": Shape((20_000,) * 2, 16, 32, 2), "criteo": Shape((3, 40, 5_000, 10_000), 16, 32, 2)}
        dense = (Dense("1 ms", 1.0, cores, 3), Dense("1 ms on 1 thread", 1.0, 1, 3))
        parts = (Part("zipf 1.05", 20, ("1 ms", "1 ms on 1 thread")), Part("zipf 0.9, drifting", 10, ("1 ms",)))
        turns = Turns(rounds=2, uncounted=1, probe_seconds=0.02)
        of_section = {"steps": dict(dense=dense, parts=parts), "criteo": dict(dense=dense[:1], parts=(Part("zipf 1.05", 20, ("1 ms",)),))}
    else:
        misses = dict(rows=args.rows, lookups=4096, stretch=Stretch(*args.miss_batches), pools=(0.02, 0.05, 0.1), copies=COPIES)
        warm, measured, _ = args.miss_batches
        bound = dict(rows=args.rows // 8, lookups=4096 // 8, stretch=Stretch(warm, measured, 0), pools=(0.05, 0.1))
        shapes = {"steps": Shape((args.rows,) * 8, 64, 1024, 4), "criteo": Shape(criteo_rows(6 * args.rows), 64, 1024, 4)}
        steps, spare = args.steps, max(1, cores - 1)
        dense = (
            Dense("5 ms", 5, cores, 4 * steps),
            Dense("40 ms", 40, cores, steps),
            Dense("120 ms", 120, cores, steps),
            Dense(SPARE_CORE, 120, spare, steps),
        )
        still = Part("zipf 1.05", args.warm, tuple(d.name for d in dense))
        others = {"zipf 1.05, drifting": ("40 ms",), "zipf 0.9": ("40 ms", "120 ms"), "zipf 0.9, drifting": ("40 ms", "120 ms")}
        parts = (still, *(Part(name, args.warm // 4, tops) for name, tops in others.items()))
        turns = Turns(args.rounds, uncounted=2, probe_seconds=0.5)
        of_section = {
            "steps": dict(dense=dense, parts=parts),
            "criteo": dict(dense=dense[1:3], parts=(Part("zipf 1.05", args.warm, ("40 ms", "120 ms")),)),
        }
    trained = {name: dict(shape=shape, share=0.1, turns=turns, trace=zipf_trace, **of_section[name]) for name, shape in shapes.items()}
    small = dict(rows=20_000, dim=16, batch_size=32, batches=80, rounds=1)
    directory = dict(tables=8, pooling=4, **(small if args.quick else dict(rows=args.rows, dim=64, batch_size=1024, batches=160, rounds=4)))
    misses |= dict(tables=1 if args.quick else args.miss_tables, movielens=movielens, only=args.traces)
    return {"misses": misses, "bound": bound, "directory": directory, **trained}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--path", type=Path, default=Path.cwd(), help="a folder on the disk to measure")
    parser.add_argument("--only", nargs="+", choices=MODULES, default=list(MODULES), help="sections to run")
    parser.add_argument("--rows", type=int, default=2_000_000, help="of a table")
    parser.add_argument("--miss-tables", type=int, default=1, help="of the 8 alike tables those whose misses are counted")
    parser.add_argument("--miss-batches", nargs=3, type=int, default=[2000, 600, 400], help="before those counted, these, after them")
    parser.add_argument("--warm", type=int, default=400, help="batches that pools see before training; a quarter before each later trace")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8, help="of each side's turn; four times as many under 5 ms")
    parser.add_argument("--traces", nargs="+", help="traces whose misses are counted; all without")
    parser.add_argument("--movielens", type=Path, default=Path(".cache/movielens"), help="where ml-100k is, or is downloaded to")
    parser.add_argument("--no-movielens", action="store_true", help="leave the real trace out")
    parser.add_argument("--picture", type=Path, help="also draw the figures into this PNG")
    args = parser.parse_args()
    facts = print_machine()
    sections: dict[str, Any] = {}
    lines: list[Figure] = []
    start = perf_counter()
    for name in args.only:
        print(f"== {name}", flush=True)
        with tempfile.TemporaryDirectory(dir=args.path) as root:
            sections[name] = MODULES[name].measure(Path(root), **sizes(args)[name])
        MODULES[name].show(sections[name])
        lines += [replace(f, goal="") if args.quick else f for f in MODULES[name].figures(sections[name])]
    print(f"== figures, after {perf_counter() - start:,.0f} s")
    print_figures(lines)
    assert len({f.name for f in lines}) == len(lines), "two figures of one name"
    if args.picture:
        _train_picture.draw(args.picture, sections, facts)
        print(f"drawn: {args.picture}")
    finish(args, facts, {"sections": sections, "figures": {f.name: {"value": f.value, "goal": f.goal, "met": f.met} for f in lines}})


if __name__ == "__main__":
    main()
