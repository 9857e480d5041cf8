"""What the slot directory costs when every row is in the pool, against the stock TBE's forward and backward.

8 tables × 2M rows × 64 fp32, batch 1024 × pooling 4, bounded Zipf 1.05 with shuffled ids, row-wise Adagrad. The
directory runs on one thread between TBE steps, as it does in training, so that its memory is as cold as in training;
no run is repeated on the batch before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torchrec_mtrains.kernels.tiered_tbe import TieredTable, TieredTBE

from _common import ZipfIds, finish, median, options, print_machine, seconds
from torchrec_mtrains import DdrHome, TierChain

OPTIMIZER = EmbOptimType.EXACT_ROWWISE_ADAGRAD


def stock(tables: int, rows: int, dim: int) -> SplitTableBatchedEmbeddingBagsCodegen:
    return SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * tables,
        optimizer=OPTIMIZER,
        learning_rate=0.01,
        bounds_check_mode=BoundsCheckMode.FATAL,
        device=torch.device("cpu"),
    )


def tiered(tables: int, rows: int, dim: int, pool_rows: int) -> TieredTBE:
    return TieredTBE(
        [TieredTable(f"t{i}", rows, dim, TierChain(pool_rows, (DdrHome(),))) for i in range(tables)],
        list(range(tables)),
        PoolingMode.SUM,
        SparseType.FP32,
        OPTIMIZER,
        rank=0,
        learning_rate=0.01,
    )


def step(module: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], gradient: torch.Tensor) -> None:
    module(*batch).backward(gradient)


def bookkeeping(tbe: TieredTBE, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """What a TieredTBE adds to a stock step whose rows are resident: lookup, ticket, release."""
    ticket = tbe._begin(*batch, None, dirty=True)
    tbe._pool.wait(ticket.seq)
    tbe._pool.release(ticket.seq)


def slots_of(tbe: TieredTBE, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    ticket = tbe._begin(*batch, None, dirty=False)
    tbe._pool.wait(ticket.seq)
    tbe._pool.release(ticket.seq)
    return ticket.slots


def measure(args: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tables, rows, dim, batch_size, pooling = args.tables, args.rows, args.dim, args.batch_size, args.pooling
    per_table = batch_size * pooling * args.batches
    print(f"drawing {args.batches} batches ...", flush=True)
    ids = torch.stack([ZipfIds(rows, 1.05, generator).draw(per_table) for _ in range(tables)]).reshape(tables, args.batches, -1)
    offsets = torch.arange(0, tables * batch_size * pooling + 1, pooling)
    batches = [(ids[:, b].reshape(-1).contiguous(), offsets) for b in range(args.batches)]
    gradient = torch.randn(batch_size, tables * dim, generator=generator)
    lookups = batches[0][0].numel()
    unique = median([float(sum(ids[t, b].unique().numel() for t in range(tables))) for b in range(min(4, args.batches))])
    figures: dict[str, Any] = {"lookups_per_step": lookups, "unique_rows_per_step": unique}
    pool_rows = max(rows // 10, int(max(ids[t].unique().numel() for t in range(tables))))

    def paired(pool: int) -> dict[str, float]:
        full, ours = stock(tables, rows, dim), tiered(tables, rows, dim, pool)
        for b in batches:  # every row that the run touches becomes resident
            step(ours, b, gradient)
            step(full, b, gradient)
        misses = sum(t["misses"] for t in ours.stats())
        slots = [(slots_of(ours, b), b[1]) for b in batches]  # no row moves from here on

        def ours_in_parts(i: int) -> dict[str, float]:
            return {
                "bookkeeping": seconds(lambda: bookkeeping(ours, batches[i])),
                "pool_tbe_step": seconds(lambda: step(ours.tbe, slots[i], gradient)),
            }

        trainers: list[Callable[[int], dict[str, float]]] = [
            lambda i: {"stock_step": seconds(lambda: step(full, batches[i], gradient))},
            lambda i: {"our_step": seconds(lambda: step(ours, batches[i], gradient))},
            ours_in_parts,
        ]
        times: dict[str, list[float]] = {"stock_step": [], "pool_tbe_step": [], "our_step": [], "bookkeeping": []}
        # Each trainer runs a stretch of steps, as in training, in turn with the others; the first steps of a stretch, on
        # caches that another trainer left, are not counted.
        for stretch in range(args.rounds * len(trainers)):
            for i in range(len(batches)):
                for name, t in trainers[stretch % len(trainers)](i).items():
                    if i >= args.warmup:
                        times[name].append(t)
        assert misses == sum(t["misses"] for t in ours.stats()), "a row was missing: this is no hit path"
        return {k: median(v) * 1e3 for k, v in times.items()}

    print(f"pool of {pool_rows} rows a table ...", flush=True)
    tenth = paired(pool_rows)
    print("every row in the pool ...", flush=True)
    whole = paired(rows)
    figures |= {
        "pool_rows": pool_rows,
        "pool_10_ms": tenth,
        "pool_all_ms": whole,
        "ns_per_id_pool_10": tenth["bookkeeping"] * 1e6 / lookups,
        "ns_per_id_pool_all": whole["bookkeeping"] * 1e6 / lookups,
        "bookkeeping_over_full_table_tbe": tenth["bookkeeping"] / tenth["stock_step"],
        "bookkeeping_over_pool_tbe": tenth["bookkeeping"] / tenth["pool_tbe_step"],
        "step_over_stock_all_rows_in_pool": whole["our_step"] / whole["stock_step"],
        "step_over_stock_pool_10_all_hits": tenth["our_step"] / tenth["stock_step"],
    }
    return figures


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--tables", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--pooling", type=int, default=4)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=5, help="steps of each stretch that are not counted")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    if args.quick:
        args.rows, args.batches, args.warmup, args.rounds = 20_000, 4, 1, 2
    facts = print_machine()
    f = measure(args)
    print(
        f"{args.tables} tables × {args.rows} rows × {args.dim} fp32, batch {args.batch_size} × pooling {args.pooling}: "
        f"{f['lookups_per_step']} lookups, {f['unique_rows_per_step']:.0f} unique rows a step"
    )
    print(f"{'median ms':<34}{'pool 10%':>12}{'pool 100%':>12}")
    for key in ("stock_step", "pool_tbe_step", "our_step", "bookkeeping"):
        print(f"{key:<34}{f['pool_10_ms'][key]:>12.3f}{f['pool_all_ms'][key]:>12.3f}")
    goals = {
        "bookkeeping_over_full_table_tbe": 0.12,
        "bookkeeping_over_pool_tbe": 0.15,
        "ns_per_id_pool_10": 6.0,
        "ns_per_id_pool_all": 6.0,
        "step_over_stock_all_rows_in_pool": 1.05,
        "step_over_stock_pool_10_all_hits": 1.05,
    }
    print(f"{'figure':<40}{'measured':>10}{'goal ≤':>10}")
    for key, goal in goals.items():
        print(f"{key:<40}{f[key]:>10.3f}{goal:>10.2f}")
    finish(args, facts, f)


if __name__ == "__main__":
    main()
