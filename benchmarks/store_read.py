"""Cold random reads of `SsdVolume` against the device's own ceiling and RocksDB, in one run: the first figures of `store.py`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torchrec_mtrains.planner.perf_model import QUEUE_DEPTH

import _store_reads
from _common import finish, options, print_figures, print_machine


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--path", type=Path, default=Path.cwd(), help="a folder on the disk to measure")
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--record-bytes", type=int, default=260, help="64 fp32 weights and a row-wise state")
    parser.add_argument("--batch", type=int, default=20_000, help="unique rows a batch")
    parser.add_argument("--depth", type=int, default=QUEUE_DEPTH, help="reads in flight")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.quick:
        args.rows, args.batch, args.seconds, args.rounds = 50_000, 2_000, 0.1, 1
    facts = print_machine()
    with tempfile.TemporaryDirectory(dir=args.path) as root:
        f = _store_reads.measure(
            Path(root),
            rows=args.rows,
            record_bytes=args.record_bytes,
            batch=args.batch,
            depth=args.depth,
            seconds=args.seconds,
            rounds=args.rounds,
            peers=("rocksdb",),
        )
    _store_reads.show(f)
    if not args.quick:
        print_figures(_store_reads.figures(f))
    finish(args, facts, f)


if __name__ == "__main__":
    main()
