"""Processes that read one device at once, as the ranks of a node do: what each gets of it, by how many reads it keeps in flight."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

from torchrec_mtrains.kernels import _core

from _common import finish, options, print_machine

BLOCK_BYTES = 4096
DEPTHS = ([128], [128] * 2, [64] * 2, [128] * 4, [32] * 4, [128, 32, 32, 32])


def _reader(start: Barrier, answers: Queue, file: str, depth: int, seconds: float, seed: int) -> None:
    start.wait()
    answers.put(_core.random_io([file], BLOCK_BYTES, depth, 1.0, seconds, "", seed).operations_per_s)


def together(file: str, depths: list[int], seconds: float) -> list[float]:
    """Reads per second of processes that begin at once, in the order of ``depths``."""
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(len(depths))
    queues = [context.Queue() for _ in depths]
    readers = [
        context.Process(target=_reader, args=(start, answers, file, depth, seconds, seed))
        for seed, (depth, answers) in enumerate(zip(depths, queues, strict=True))
    ]
    for reader in readers:
        reader.start()
    rates = [answers.get(timeout=seconds + 120) for answers in queues]
    for reader in readers:
        reader.join()
    return rates


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--path", default=None, help="folder on the device; a temporary one if left out")
    parser.add_argument("--file-mib", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=4.0)
    args = parser.parse_args()
    if args.quick:
        args.file_mib, args.seconds = 8, 0.1
    facts, figures = print_machine(), {}
    with tempfile.TemporaryDirectory(dir=args.path) as folder:
        file = Path(folder) / "pages"
        with file.open("wb") as f:
            for _ in range(args.file_mib):
                f.write(os.urandom(1 << 20))
            os.fsync(f.fileno())
        print(f"{'reads in flight':<22}{'reads/s':>10}{'mean ms':>10}{'smallest share':>16}{'largest':>9}")
        for depths in DEPTHS[1:2] if args.quick else DEPTHS:
            rates = together(str(file), depths, args.seconds)
            total, fair = sum(rates), sum(rates) / len(rates)
            name = " + ".join(map(str, depths))
            figures[name] = {"reads_per_s": rates, "mean_ms": sum(depths) / total * 1e3}
            smallest, largest = min(rates) / fair, max(rates) / fair
            print(f"{name:<22}{total:>10,.0f}{figures[name]['mean_ms']:>10.2f}{smallest:>16.2f}{largest:>9.2f}")
    finish(args, facts, figures)


if __name__ == "__main__":
    main()
