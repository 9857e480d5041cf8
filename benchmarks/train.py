"""Training from tiers in one run: misses, step times against the same model in memory, a table, JSON and a picture.

Sections: misses (our eviction against LRU and an optimum). Each says in its module, ``benchmarks/_train_<section>.py``, how it
measures; docs/benchmarks.md says what the figures mean.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import _train_misses
from _common import Figure, finish, options, print_figures, print_machine
from _train_traces import COPIES, Stretch
from torchrec_mtrains.data.fetch import fetch_ml_100k

MODULES: dict[str, Any] = {"misses": _train_misses}


def sizes(args: Any) -> dict[str, dict[str, Any]]:
    """The arguments of each section's ``measure``."""
    movielens = None if args.no_movielens else fetch_ml_100k(args.movielens)
    if args.quick:
        stretch = Stretch(40, 20, 20)
        return {
            "misses": dict(
                rows=20_000, lookups=64, tables=1, stretch=stretch, pools=(0.02, 0.1), movielens=movielens, copies=2, only=args.traces
            )
        }
    return {
        "misses": dict(
            rows=args.rows,
            lookups=4096,
            tables=args.miss_tables,
            stretch=Stretch(*args.miss_batches),
            pools=(0.02, 0.05, 0.1),
            movielens=movielens,
            copies=COPIES,
            only=args.traces,
        )
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--path", type=Path, default=Path.cwd(), help="a folder on the disk to measure")
    parser.add_argument("--only", nargs="+", choices=MODULES, default=list(MODULES), help="sections to run")
    parser.add_argument("--rows", type=int, default=2_000_000, help="of a table")
    parser.add_argument("--miss-tables", type=int, default=1, help="of the 8 alike tables those whose misses are counted")
    parser.add_argument("--miss-batches", nargs=3, type=int, default=[2000, 600, 400], help="before those counted, these, after them")
    parser.add_argument("--traces", nargs="+", help="traces whose misses are counted; all without")
    parser.add_argument("--movielens", type=Path, default=Path(".cache/movielens"), help="where ml-100k is, or is downloaded to")
    parser.add_argument("--no-movielens", action="store_true", help="leave the real trace out")
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
    finish(args, facts, {"sections": sections, "figures": {f.name: {"value": f.value, "goal": f.goal, "met": f.met} for f in lines}})


if __name__ == "__main__":
    main()
