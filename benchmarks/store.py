"""Every figure of the storage engine in one run: a table, JSON and a picture.

Sections: reads (cold random reads against the device and other stores), packing (rows per I/O), mixed (reads with write-backs
and cleaning), writes (write amplification), checkpoints (what an epoch writes, stalls), open, memory (native bytes a row). Each
says in its module, ``benchmarks/_store_<section>.py``, how it measures; docs/benchmarks.md says what the figures mean.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from torchrec_mtrains.planner.perf_model import QUEUE_DEPTH

import _store_checkpoints
import _store_memory
import _store_mixed
import _store_open
import _store_packing
import _store_picture
import _store_reads
import _store_writes
from _common import Figure, finish, options, print_figures, print_machine

MODULES: dict[str, Any] = {
    "reads": _store_reads,
    "packing": _store_packing,
    "mixed": _store_mixed,
    "writes": _store_writes,
    "checkpoints": _store_checkpoints,
    "open": _store_open,
    "memory": _store_memory,
}


def sizes(args: Any) -> dict[str, dict[str, Any]]:
    """The arguments of each section's ``measure``."""
    scale = args.scale
    if args.quick:
        return {
            "reads": dict(rows=20_000, record_bytes=260, batch=1_000, depth=32, seconds=0.02, rounds=1, peers=tuple(_store_reads.PEERS)),
            "packing": dict(rows=20_000, record_bytes=260, steps=20),
            "mixed": dict(rows=60_000, record_bytes=1000, batch=500, seconds=0.02, rounds=1, churn=0.5, fills=(0.7, 0.85)),
            "writes": dict(rows=60_000, record_bytes=1000, churn=0.3, measured=0.2, checkpoints=4, steps_between=20),
            "checkpoints": dict(
                epoch=dict(rows=20_000, record_bytes=260),
                steps=dict(tables=2, rows=5_000, dim=8, batch=64, pooling=2, steps=4, pairs=1),
            ),
            "open": dict(rows=50_000),
            "memory": dict(rows=200_000, record_bytes=8),
        }
    return {
        "reads": dict(
            rows=int(2_000_000 * scale),
            record_bytes=260,
            batch=20_000,
            depth=args.depth,
            seconds=args.seconds,
            rounds=args.rounds,
            peers=tuple(_store_reads.PEERS),
        ),
        "packing": dict(rows=int(200_000 * scale), record_bytes=260, steps=300),
        "mixed": dict(
            rows=int(1_000_000 * scale),
            record_bytes=260,
            batch=10_000,
            seconds=args.seconds,
            rounds=args.rounds,
            churn=1.0,
            fills=(0.7, 0.85),
        ),
        "writes": dict(rows=int(350_000 * scale), record_bytes=1000, churn=3.0, measured=2.0, checkpoints=8, steps_between=500),
        "checkpoints": dict(
            epoch=dict(rows=int(300_000 * scale), record_bytes=260),
            steps=dict(tables=4, rows=int(500_000 * scale), dim=64, batch=1024, pooling=4, steps=100, pairs=3),
        ),
        "open": dict(rows=args.open_rows),
        "memory": dict(rows=int(5_000_000 * scale), record_bytes=8),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--path", type=Path, default=Path.cwd(), help="a folder on the disk to measure")
    parser.add_argument("--only", nargs="+", choices=MODULES, default=list(MODULES), help="sections to run")
    parser.add_argument("--scale", type=float, default=1.0, help="of the tables' rows")
    parser.add_argument("--open-rows", type=int, default=100_000_000, help="rows of the volume that is opened")
    parser.add_argument("--depth", type=int, default=QUEUE_DEPTH, help="reads in flight")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=4)
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
    assert len({f.name for f in lines}) == len(lines), "two figures of one name"
    print(f"== figures, after {perf_counter() - start:,.0f} s")
    print_figures(lines)
    if args.picture:
        _store_picture.draw(args.picture, sections, facts)
        print(f"drawn: {args.picture}")
    finish(args, facts, {"sections": sections, "figures": {f.name: {"value": f.value, "goal": f.goal, "met": f.met} for f in lines}})


if __name__ == "__main__":
    main()
