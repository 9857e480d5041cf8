"""Cold random reads of `SsdVolume` against the device's own ceiling and RocksDB, in one run.

One table of fixed-size records, batches of unique random rows. The ceiling is io_uring reading random blocks of the same
size at the same depth from a file of the same size on the same disk, with nothing above it. RocksDB is rocksdict's `MultiGet` on the
same rows, with direct reads and a block cache too small to matter, on 1 and on 16 threads. The subjects take turns of at
least a second, several rounds; figures are medians, ratios are of the same round.
"""

from __future__ import annotations

import resource
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torchrec_mtrains.kernels import SsdVolume, _core

from _common import finish, median, options, print_machine


def cpu_seconds() -> float:
    """Processor time of the whole process: its I/O threads are part of the cost."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def fill_volume(folder: str, rows: int, record_bytes: int, depth: int) -> tuple[SsdVolume, Any]:
    volume = SsdVolume((folder,), capacity_bytes=rows * (record_bytes + 64) * 2 + (256 << 20), depth=depth)
    table = volume.table("t", row_count=rows, record_bytes=record_bytes)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))  # rows of a block are no neighbours
    for part in order.split(50_000):
        table.put(part, (part[:, None] % 251).to(torch.uint8).expand(-1, record_bytes).contiguous())
    volume.flush()
    return volume, table


def fill_rocksdb(folder: str, rows: int, record_bytes: int) -> Any:
    from rocksdict import AccessType, BlockBasedOptions, Cache, Options, Rdict, WriteBatch

    table = BlockBasedOptions()
    table.set_block_cache(Cache(8 << 20))
    table.set_bloom_filter(10, False)
    settings = Options(raw_mode=True)
    settings.create_if_missing(True)
    settings.set_use_direct_reads(True)
    settings.set_use_direct_io_for_flush_and_compaction(True)
    settings.set_block_based_table_factory(table)
    database = Rdict(folder, settings, access_type=AccessType.read_write())
    for first in range(0, rows, 20_000):
        batch = WriteBatch(raw_mode=True)
        for row in range(first, min(rows, first + 20_000)):
            batch.put(row.to_bytes(8, "big"), bytes([row % 251]) * record_bytes)
        database.write(batch)
    database.flush()
    database.compact_range(None, None)
    return database


def measure(args: Any, root: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    print(f"writing {args.rows} records of {args.record_bytes} bytes ...", flush=True)
    (root / "volume").mkdir()
    volume, table = fill_volume(str(root / "volume"), args.rows, args.record_bytes, args.depth)
    print("writing the same into RocksDB ...", flush=True)
    database = fill_rocksdb(str(root / "rocksdb"), args.rows, args.record_bytes)
    raw = root / "raw"
    disk_bytes = volume.stats()["disk_bytes"]
    with raw.open("wb") as file:
        block = rng.bytes(1 << 20)
        for _ in range(disk_bytes >> 20):
            file.write(block)
    out = torch.empty(args.batch, args.record_bytes, dtype=torch.uint8)

    def for_a_while(step: Callable[[], int]) -> tuple[float, float]:
        """Rows a second and processor seconds a row."""
        rows, start, cpu = 0, perf_counter(), cpu_seconds()
        while (spent := perf_counter() - start) < args.seconds or rows == 0:
            rows += step()
        return rows / spent, (cpu_seconds() - cpu) / rows

    def batch() -> np.ndarray:
        return rng.choice(args.rows, args.batch, replace=False)

    ios = {"rows": 0, "reads": 0}

    def ours() -> int:
        rows = torch.from_numpy(batch())
        before = volume.stats()["read_ios"]
        table.get(rows, out)
        ios["reads"] += volume.stats()["read_ios"] - before
        ios["rows"] += len(rows)
        assert torch.equal(out[:, 0], (rows % 251).to(torch.uint8))
        return len(rows)

    def multi_get(rows: np.ndarray) -> int:
        values = database[[int(r).to_bytes(8, "big") for r in rows]]
        assert values[0][0] == rows[0] % 251
        return len(values)

    pool = ThreadPoolExecutor(16)

    def rocksdb_threads() -> int:
        return sum(pool.map(multi_get, np.array_split(batch(), 16)))

    figures: dict[str, list[float]] = {k: [] for k in ("ceiling", "ours", "ours_cpu_us", "ceiling_cpu_us", "rocksdb_1", "rocksdb_16")}
    page = 4096
    for round_ in range(args.rounds + 1):
        reads, seconds, cpu = _core.random_reads(str(raw), page, args.depth, args.seconds, volume.backend, round_)
        mine, mine_cpu = for_a_while(ours)
        one, _ = for_a_while(lambda: multi_get(batch()))
        many, _ = for_a_while(rocksdb_threads)
        if round_ == 0:  # the first turn also pays for what the subjects set up
            ios.update(rows=0, reads=0)
            continue
        for key, value in (
            ("ceiling", reads / seconds),
            ("ceiling_cpu_us", cpu / reads * 1e6),
            ("ours", mine),
            ("ours_cpu_us", mine_cpu * 1e6),
            ("rocksdb_1", one),
            ("rocksdb_16", many),
        ):
            figures[key].append(value)
        print(
            f"round {round_}: ceiling {reads / seconds:,.0f} reads/s, SsdVolume {mine:,.0f} rows/s, RocksDB {one:,.0f} / {many:,.0f}",
            flush=True,
        )
    rows_per_io = ios["rows"] / max(1, ios["reads"])
    return {
        "backend": volume.backend,
        "direct": volume._native.direct(),
        "depth": args.depth,
        "rows_per_io": rows_per_io,
        **{f"{k}_median": median(v) for k, v in figures.items()},
        "ios_over_ceiling": median([a / rows_per_io / b for a, b in zip(figures["ours"], figures["ceiling"], strict=True)]),
        "rows_over_ceiling": median([a / b for a, b in zip(figures["ours"], figures["ceiling"], strict=True)]),
        "rows_over_rocksdb_1": median([a / b for a, b in zip(figures["ours"], figures["rocksdb_1"], strict=True)]),
        "rows_over_rocksdb_16": median([a / b for a, b in zip(figures["ours"], figures["rocksdb_16"], strict=True)]),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--path", type=Path, default=Path.cwd(), help="a folder on the disk to measure")
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--record-bytes", type=int, default=260, help="64 fp32 weights and a row-wise state")
    parser.add_argument("--batch", type=int, default=20_000, help="unique rows a batch")
    parser.add_argument("--depth", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.quick:
        args.rows, args.batch, args.seconds, args.rounds = 50_000, 2_000, 0.1, 1
    facts = print_machine()
    root = Path(tempfile.mkdtemp(dir=args.path))
    try:
        f = measure(args, root)
    finally:
        shutil.rmtree(root)
    print(
        f"{args.rows} rows of {args.record_bytes} bytes, batches of {args.batch}, "
        f"{f['backend']} at depth {args.depth}, O_DIRECT {f['direct']}"
    )
    print(f"{'device ceiling':<28}{f['ceiling_median']:>12,.0f} reads/s  {f['ceiling_cpu_us_median']:>6.2f} µs CPU a read")
    print(
        f"{'SsdVolume':<28}{f['ours_median']:>12,.0f} rows/s   {f['ours_cpu_us_median']:>6.2f} µs CPU a row, "
        f"{f['rows_per_io']:.3f} rows a read"
    )
    print(f"{'RocksDB MultiGet, 1 thread':<28}{f['rocksdb_1_median']:>12,.0f} rows/s")
    print(f"{'RocksDB MultiGet, 16 threads':<28}{f['rocksdb_16_median']:>12,.0f} rows/s")
    print(f"{'figure':<44}{'measured':>10}{'goal ≥':>10}")
    print(f"{'reads/s ÷ ceiling':<44}{f['ios_over_ceiling']:>10.3f}{0.90:>10.2f}")
    print(f"{'rows/s ÷ ceiling':<44}{f['rows_over_ceiling']:>10.3f}{0.90:>10.2f}")
    print(f"{'rows/s ÷ RocksDB, 1 thread':<44}{f['rows_over_rocksdb_1']:>10.2f}")
    print(f"{'rows/s ÷ RocksDB, 16 threads':<44}{f['rows_over_rocksdb_16']:>10.2f}")
    finish(args, facts, f)


if __name__ == "__main__":
    main()
