"""What every rank does in a part of the benchmark of several GPUs. Each function runs on all ranks at once."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec_mtrains.kernels import durability

import torchrec_mtrains as mtrains
from _common import median
from _multi_job import Batches, Budget, Shape, Side, Tiers
from _multi_ranks import say
from torchrec_mtrains import DdrHome, SsdHome

PIPELINES = {"TieredTrainPipeline": mtrains.TieredTrainPipeline, "PrefetchTrainPipelineSparseDist": PrefetchTrainPipelineSparseDist}
ROUNDS = 3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def bits(rank: int, shape: Shape, shardings: tuple[str, ...], pool_share: float, folder: str, steps: int) -> dict[str, Any]:
    """Losses of every step and all rows at the end, beside stock FUSED on the same ranks, in deterministic mode; over DDR and an SSD."""
    torch.use_deterministic_algorithms(True)
    batches, found = Batches(shape, steps, rank), {}

    def train(pipeline: Any, sharding: str, tiers: Tiers | None) -> tuple[list[torch.Tensor], torch.Tensor, int]:
        side = Side(shape, rank, sharding, tiers, alike=True)
        loop, source = pipeline(side.dmp, side.optimizer, side.device), batches.stream(0, steps)
        losses = [loop.progress(source)[0].cpu() for _ in range(steps)]
        loop.detach()
        rows, misses = side.every_row(), side.counters()["misses"]
        durability.close(side.groups)
        return losses, rows, misses

    pipelines = [n for n in PIPELINES if n == "TieredTrainPipeline" or torch.cuda.is_available()]  # TorchRec's needs streams
    for sharding in shardings:
        theirs, their_rows, _ = train(TrainPipelineSparseDist, sharding, None)
        for name in pipelines:
            for home in ("DDR", "SSD"):
                ssd = Path(folder) / f"{sharding}_{name}"
                ssd.mkdir(exist_ok=True)
                below = DdrHome() if home == "DDR" else SsdHome((str(ssd),), capacity_bytes=2 << 30)
                losses, rows, misses = train(PIPELINES[name], sharding, Tiers(pool_share, (below,)))
                equal = sum(torch.equal(a, b) for a, b in zip(losses, theirs, strict=True))
                found[f"{sharding}, {home}, {name}"] = {
                    "equal_losses": equal,
                    "equal_rows": torch.equal(rows, their_rows),
                    "misses": misses,
                }
    return found


def steps(rank: int, shape: Shape, sharding: str, tiers: Tiers | Budget | None, warm_up: int, count: int, batches: int) -> dict[str, Any]:
    """Milliseconds a step, from all ranks' start to all ranks' end, what the planner said they would be, and what this rank counted."""
    side = Side(shape, rank, sharding, tiers)
    say("model sharded" if side.predicted_ms is None else f"model sharded; predicted: {side.predicted_ms:.2f} ms a step")
    side.put_every_row()
    say("rows put")
    made = Batches(shape, batches, rank)
    say("batches drawn")
    source = made.stream(0, warm_up + ROUNDS * count + 200)
    pipeline = mtrains.TieredTrainPipeline if tiers else TrainPipelineSparseDist
    loop = pipeline(side.dmp, side.optimizer, side.device)
    for done in range(warm_up):
        loop.progress(source)
        if done in (0, warm_up - 1):
            say(f"{done + 1} of {warm_up} steps to warm up")
    times, before = [], side.counters()
    for _ in range(ROUNDS):
        _synchronize(side.device)
        start = perf_counter()
        for _ in range(count):
            loop.progress(source)
        _synchronize(side.device)
        times.append((perf_counter() - start) / count * 1e3)
        say(f"{times[-1]:.2f} ms a step of {count}")
    after = side.counters()
    moved = {f"{k}_per_step": (after[k] - before[k]) / (ROUNDS * count) for k in before}
    if tiers:
        loop.reset()  # type: ignore[attr-defined]
        durability.close(side.groups)
    planned = {"predicted_ms": side.predicted_ms, "plan": side.rows} if side.predicted_ms is not None else {}
    return {"ms": median(times), "ms_of_rounds": times, **moved, **planned}


def job(rank: int, shape: Shape, sharding: str, tiers: Tiers, last: int, every: int, checkpoint: str) -> dict[int, str]:
    """Trains up to batch ``last``, from the checkpoint if there is one, and commits one ``every`` so many steps. Losses by step, in hex."""
    torch.use_deterministic_algorithms(True)
    side = Side(shape, rank, sharding, tiers, alike=True)
    first = 0
    if (Path(checkpoint) / "LATEST").exists():
        first = mtrains.load_checkpoint(side.dmp, checkpoint, dense_optimizer=side.dense).step
    loop = mtrains.TieredTrainPipeline(side.dmp, side.optimizer, side.device)
    source, losses = Batches(shape, last, rank).stream(first, last), {}
    for step in range(first + 1, last + 1):
        losses[step] = float(loop.progress(source)[0]).hex()
        if step % every == 0 and step < last:
            mtrains.save_checkpoint(side.dmp, checkpoint, step=step, dense_optimizer=side.dense)
    durability.close(side.groups)
    return losses
