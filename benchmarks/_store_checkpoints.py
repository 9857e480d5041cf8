"""Checkpoints: what an epoch writes, and what a commit costs the steps around it.

epoch bytes   a slot pool of a tenth of the rows; an epoch that trained every row once against one that trained 1% of them.
              Bytes are the kernel's count for this process: segments, manifests, whatever else the commit writes.
stall         a TieredTBE trains batches, prefetched one ahead; stretches of 100 steps that end in a commit of all volumes
              (``durability.checkpoint``) take turns with stretches that do not.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torchrec_mtrains.kernels import SsdVolume, durability
from torchrec_mtrains.kernels.tiered_tbe import TieredTable, TieredTBE

from _common import Figure, ZipfIds, median, own_io_bytes
from _store_writes import PooledTable
from torchrec_mtrains import SsdHome, TierChain

# -- epoch bytes


def epoch_bytes(folder: Path, *, rows: int, record_bytes: int) -> dict[str, float]:
    """Bytes written for an epoch, by the share of the rows that it trained. Commits included."""
    folder.mkdir()
    volume = SsdVolume((str(folder),), rows * (record_bytes + 64) * 8 + (64 << 20))
    pooled = PooledTable(volume, rows, record_bytes, rows // 10)
    batch = max(1, rows // 100)

    def epoch(number: int, count: int) -> int:
        before = own_io_bytes()[1]
        touched = torch.randperm(rows, generator=torch.Generator().manual_seed(number))[:count]
        for ids in touched.split(batch):
            pooled.train(ids.contiguous())
        pooled.checkpoint(number)
        return own_io_bytes()[1] - before

    epoch(1, rows)
    everything = epoch(2, rows)
    hundredth = epoch(3, rows // 100)
    volume.close()
    return {"all_rows_bytes": everything, "hundredth_bytes": hundredth, "hundredth_over_all": hundredth / everything}


# -- stall


def stall(folder: Path, *, tables: int, rows: int, dim: int, batch: int, pooling: int, steps: int, pairs: int) -> dict[str, Any]:
    """``steps`` of each stretch; ``pairs`` of stretches, with and without a commit at the end."""
    folder.mkdir()
    capacity = tables * rows * (dim * 4 + 64) * 4 + (256 << 20)
    chain = TierChain(rows // 10, (SsdHome((str(folder),), capacity),))
    tbe = TieredTBE(
        [TieredTable(f"t{i}", rows, dim, chain) for i in range(tables)],
        list(range(tables)),
        PoolingMode.SUM,
        SparseType.FP32,
        EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        rank=0,
        learning_rate=0.01,
    )
    generator = torch.Generator().manual_seed(4)
    zipf = [ZipfIds(rows, 1.05, generator) for _ in range(tables)]
    offsets = torch.arange(0, tables * batch * pooling + 1, pooling)
    gradient = torch.randn(batch, tables * dim, generator=generator)
    coming: list[torch.Tensor] = []

    def draw(count: int) -> None:
        coming.extend(torch.stack([z.draw(count * batch * pooling).reshape(count, -1) for z in zipf], 1).reshape(count, -1).unbind(0))

    def stretch(epoch: int | None) -> tuple[list[float], float]:
        """Seconds of each step, and of the commit."""
        draw(steps + 1 - len(coming))
        seconds = []
        for step in range(steps):
            start = perf_counter()
            ids = coming.pop(0)
            if coming:
                tbe.prefetch(coming[0], offsets)
            tbe(ids, offsets).backward(gradient)
            if epoch is not None:
                durability.trickle([tbe], steps - step - 1)
            seconds.append(perf_counter() - start)
        start = perf_counter()
        if epoch is not None:
            durability.checkpoint([tbe], epoch)
        return seconds, perf_counter() - start

    stretch(None)
    stretch(0)
    plain, committed, commits, slowest = [], [], [], []
    for epoch in range(1, pairs + 1):
        seconds, _ = stretch(None)
        plain.append(sum(seconds) / steps)
        with_commit, commit = stretch(epoch)
        after, _ = stretch(None)  # what a commit leaves to do falls into the steps behind it
        committed.append((sum(with_commit) + commit) / steps)
        commits.append(commit)
        slowest.append(max(after))
    misses = [t["misses"] / t["unique_rows"] for t in tbe.stats()]
    durability.close([tbe])
    step_s = median(plain)
    return {
        "tables": tables,
        "rows": rows,
        "lookups_per_step": tables * batch * pooling,
        "miss_ratio": float(np.mean(misses)),
        "step_ms": step_s * 1e3,
        "stall_share": median(commits) / steps / step_s,
        "slowdown": median([c / p for c, p in zip(committed, plain, strict=True)]) - 1,
        "longest_stall_ms": max(commits) * 1e3,
        "longest_stall_steps": max(commits) / step_s,
        "slowest_step_after_ms": max(slowest) * 1e3,
    }


def measure(root: Path, *, epoch: dict[str, Any], steps: dict[str, Any]) -> dict[str, Any]:
    return {
        "epoch_bytes": epoch_bytes(root / "epochs", **epoch),
        "stall": stall(root / "stall", **steps),
    }


def show(f: dict[str, Any]) -> None:
    e, s = f["epoch_bytes"], f["stall"]
    print(f"an epoch of every row writes {e['all_rows_bytes'] / 1e6:,.1f} MB, one of 1% of them {e['hundredth_bytes'] / 1e6:,.1f} MB")
    print(
        f"{s['tables']} tables × {s['rows']:,} rows, {s['lookups_per_step']:,} lookups a step, miss ratio {s['miss_ratio']:.2f}: step "
        f"{s['step_ms']:.2f} ms, longest stall {s['longest_stall_ms']:.0f} ms, slowest step after one {s['slowest_step_after_ms']:.1f} ms"
    )


def figures(f: dict[str, Any]) -> list[Figure]:
    s = f["stall"]
    return [
        Figure("epoch bytes: 1% of the rows ÷ all rows", f["epoch_bytes"]["hundredth_over_all"], "≤ 0.03", 4),
        Figure("checkpoint every 100 steps: stall ÷ step time", s["stall_share"], "≤ 0.02", 4),
        Figure("… slowdown of the stretch that has it", s["slowdown"], digits=4),
        Figure("longest stall, ms", s["longest_stall_ms"], digits=1),
    ]
