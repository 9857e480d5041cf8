"""What caches between the slot pools and an SSD bring, and what they cost: hit ratios, SSD traffic and time of a training step.

Chains of one run train the same batches, interleaved, over tables that were written once. A step's ids are bounded Zipf.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torchrec_mtrains.kernels import durability
from torchrec_mtrains.kernels.tiered_tbe import TieredTable, TieredTBE

from _common import ZipfIds, finish, median, options, print_machine
from torchrec_mtrains.tiers import Cache, DdrCache, PmemCache, SsdHome, TierChain

DIM = 64


def chains(pmem: str, rows: int) -> dict[str, tuple[Cache, ...]]:
    """Every chain has room for the same number of rows between pool and SSD, or for none."""
    half = rows // 2
    return {"none": (), "ddr": (DdrCache(rows),), "pmem": (PmemCache(pmem, rows),), "ddr+pmem": (DdrCache(half), PmemCache(pmem, half))}


def group(tables: int, rows: int, pool_rows: int, chain: tuple[Cache, ...], folder: str) -> TieredTBE:
    home = SsdHome((folder,), capacity_bytes=4 * tables * rows * (DIM * 4 + 32) + (256 << 20))
    tbe = TieredTBE(
        [TieredTable(f"t{i}", rows, DIM, TierChain(pool_rows, (*chain, home))) for i in range(tables)],
        list(range(tables)), PoolingMode.SUM, SparseType.FP32, EmbOptimType.EXACT_ROWWISE_ADAGRAD, rank=0, learning_rate=0.01,
    )  # fmt: skip
    for t in range(tables):
        for first in range(0, rows, 65536):
            tbe.write_rows(t, first, [torch.zeros(min(65536, rows - first), DIM), None])
    tbe.flush()
    return tbe


def step(tbe: TieredTBE, indices: torch.Tensor, offsets: torch.Tensor) -> float:
    """Seconds of one training step, nothing prefetched."""
    start = perf_counter()
    tbe(indices, offsets).sum().backward()
    return perf_counter() - start


def counters(tbe: TieredTBE) -> dict[str, float]:
    """Sums over tables of what the pools and the caches answered, and the SSD's counters."""
    sums: dict[str, float] = {}
    for tiers in tbe.tier_stats():
        for tier in tiers[:-1]:
            kind = "pool" if tier["tier"] == "pool" else "cache"
            for name in ("hits", "misses", "write_backs"):
                sums[f"{kind}_{name}"] = sums.get(f"{kind}_{name}", 0) + tier[name]
        sums["home_reads"] = sums.get("home_reads", 0) + tiers[-1]["hits"]
    (volume,) = tbe.volume_stats()
    return {**sums, "home_writes": volume["put_rows"], "write_bytes": volume["write_bytes"]}


def measure(exponent: float, tables: int, rows: int, lookups: int, warm: int, steps: int, scratch: Path, pmem: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    total = warm + steps
    ids = [ZipfIds(rows, exponent, generator).draw(lookups * total).view(total, lookups) for _ in range(tables)]
    offsets = torch.arange(0, tables * lookups + 1)
    groups = {}
    for name, chain in chains(pmem, rows // 10).items():
        (scratch / name).mkdir()
        groups[name] = group(tables, rows, rows // 50, chain, str(scratch / name))
    times: dict[str, list[float]] = {name: [] for name in groups}
    before: dict[str, dict[str, float]] = {}
    for i in range(total):
        if i == warm:
            before = {name: counters(tbe) for name, tbe in groups.items()}
        for name, tbe in groups.items():
            seconds = step(tbe, torch.cat([t[i] for t in ids]), offsets)
            if i >= warm:
                times[name].append(seconds)
    figures = {}
    for name, tbe in groups.items():
        moved = {key: value - before[name][key] for key, value in counters(tbe).items()}
        below_pool = moved["pool_misses"]
        figures[name] = {
            "pool_miss_ratio": moved["pool_misses"] / (moved["pool_hits"] + moved["pool_misses"]),
            "cache_hit_ratio": 1 - moved["home_reads"] / below_pool,
            "ssd_rows_read_per_step": moved["home_reads"] / steps,
            "ssd_rows_written_per_step": moved["home_writes"] / steps,
            "step_ms_p50": median(times[name]) * 1e3,
            "step_ms_mean": sum(times[name]) / steps * 1e3,
        }
    durability.close(list(groups.values()))
    return figures


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--pmem", default="/dev/shm", help="a folder of a byte-addressable device")
    parser.add_argument("--tables", type=int, default=1)
    parser.add_argument("--rows", type=int, default=2_000_000, help="of a table")
    parser.add_argument("--lookups", type=int, default=4096, help="of a table a step")
    parser.add_argument("--warm", type=int, default=300, help="steps before measuring")
    parser.add_argument("--steps", type=int, default=100, help="steps measured")
    args = parser.parse_args()
    if args.quick:
        args.tables, args.rows, args.lookups, args.warm, args.steps = 1, 20_000, 256, 20, 20
    facts = print_machine()
    print(f"{args.tables} tables × {args.rows} rows × {DIM} fp32, row-wise Adagrad, {args.lookups} lookups a table; pool 2%, caches 10%")
    all_figures = {}
    for exponent in (1.05, 0.9):
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
            figures = measure(exponent, args.tables, args.rows, args.lookups, args.warm, args.steps, Path(scratch), args.pmem)
        all_figures[f"zipf_{exponent}"] = figures
        print(f"\nZipf {exponent}: share of the pool's misses that the caches answered; rows a step from and to the SSD; ms a step")
        print(f"{'chain':10} {'pool misses':>11} {'cache hits':>10} {'read':>8} {'written':>8} {'p50 ms':>8} {'mean ms':>8}")
        for name, f in figures.items():
            print(
                f"{name:10} {f['pool_miss_ratio']:11.3f} {f['cache_hit_ratio']:10.3f} {f['ssd_rows_read_per_step']:8.0f} "
                f"{f['ssd_rows_written_per_step']:8.0f} {f['step_ms_p50']:8.2f} {f['step_ms_mean']:8.2f}"
            )
    finish(args, facts, all_figures)


if __name__ == "__main__":
    main()
