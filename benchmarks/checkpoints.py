"""What checkpoints cost a job: the stall of each, what trickling saves of it and writes for it, and a warm restart against a cold one.

One job, a checkpoint every ``--every`` steps; in the last so many before it, rows trickle out that were not used in the last few.
A stall is the wall time of ``save_checkpoint``; its share is that time ÷ the time of the steps between two checkpoints.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torchrec_mtrains.kernels import durability

from _common import finish, options, print_machine
from torchrec_mtrains import show, train
from torchrec_mtrains.data import SyntheticConfig, SyntheticSource
from torchrec_mtrains.job_model import ModelOptions
from torchrec_mtrains.placement import PlacementOptions
from torchrec_mtrains.process_group import process_group


def run(source: SyntheticSource, job: train.TrainOptions, steps: int, min_age: int, pg: Any) -> train.TrainResult:
    """One job whose rows trickle out in ``steps`` steps before a checkpoint."""
    durability.TRICKLE_STEPS, durability.TRICKLE_MIN_AGE = steps, min_age
    return train.train(source, job, pg)


def figures_of(done: train.TrainResult) -> dict[str, float]:
    """The middle of the job: the first interval fills the pools."""
    every = done.options.checkpoint_every
    assert every is not None
    due = [c for c in done.checkpoints if not c.wanted][1:]
    # A trickled step does its writing after the step: time between checkpoints is the run's, less the stalls.
    step_ms = 1e3 * (done.train_seconds - sum(c.seconds for c in done.checkpoints)) / len(done.steps)
    stall_ms = [1e3 * c.seconds for c in due]
    total = {name: sum(t[name] for t in done.tables) for name in ("write_backs", "flushed_rows", "trickled_rows")}
    return {
        "step_ms": step_ms,
        "stall_ms_median": statistics.median(stall_ms),
        "stall_ms_max": max(stall_ms),
        "stall_share": statistics.mean(stall_ms) / (every * step_ms),
        "flushed_rows_per_checkpoint": total["flushed_rows"] / len(done.checkpoints),
        **total,
        "rows_put": sum(total.values()),
        "written_mib": sum(v["write_bytes"] for v in done.volumes) / 2**20,
        "wanted": sum(c.wanted for c in done.checkpoints),
    }


def restart(source: SyntheticSource, job: train.TrainOptions, warm: bool, steps: int, pg: Any) -> dict[str, float]:
    """The first steps after a resume."""
    checkpoint, ssd = Path(str(job.checkpoint)), Path(job.placement.ssd[0])
    copies = [Path(tempfile.mkdtemp(dir=path.parent)) for path in (checkpoint, ssd)]
    for path, copy in zip((checkpoint, ssd), copies, strict=True):
        shutil.copytree(path, copy, dirs_exist_ok=True)
    placement = dataclasses.replace(job.placement, ssd=(str(copies[1]),))
    assert job.steps is not None
    resumed = dataclasses.replace(
        job, placement=placement, checkpoint=str(copies[0]), checkpoint_every=None, resume=True, warm_restart=warm, steps=job.steps + steps
    )
    made = train.Job(source, resumed, pg)
    found: list[train.StepRecord] = []
    seconds = train.time.perf_counter()
    made.train(resumed.steps, found.append)
    seconds = train.time.perf_counter() - seconds
    made.close()
    for copy in copies:
        shutil.rmtree(copy)
    total: dict[str, float] = {}
    for step in found:
        for name, value in step.tiers.items():
            total[name] = total.get(name, 0) + value
    return {
        "hit_ratio_of_lookups": 1 - total["misses"] / total["lookups"],
        "hit_ratio_of_unique_rows": 1 - total["misses"] / total["unique_rows"],
        "steps_per_s": len(found) / seconds,
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--ssd", default=None, help="folder on an SSD")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pool-share", type=float, default=0.1)
    parser.add_argument("--trickle", nargs="*", default=["0,1", "4,2", "8,1", "8,2", "8,4", "16,2", "32,2"], help="steps,min_age; 0,1: off")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.every, args.rows, args.trickle = 24, 8, 2000, ["0,1", "4,1"]
    show.quiet()
    torch.set_num_threads(args.threads)
    facts = print_machine()
    source = SyntheticSource(SyntheticConfig(table_count=4, rows=args.rows, pooling=8), 128 if args.quick else 1024)
    figures: dict[str, Any] = {"trickle": {}, "restart": {}}
    with process_group() as pg, tempfile.TemporaryDirectory(dir=args.ssd) as root:
        for trickle in args.trickle:
            steps, min_age = map(int, trickle.split(","))
            folder = Path(root) / trickle
            (folder / "ssd").mkdir(parents=True)
            job = train.TrainOptions(
                model=ModelOptions(embedding_dim=64),
                placement=PlacementOptions(
                    ssd=(str(folder / "ssd"),), pool_rows=max(1024, int(args.rows * args.pool_share)), ssd_capacity_bytes=4 << 30
                ),
                steps=args.steps,
                checkpoint=str(folder / "checkpoint"),
                checkpoint_every=args.every,
            )
            f = figures["trickle"][trickle] = figures_of(run(source, job, steps, min_age, pg))
            name = f"{steps} steps, age {min_age}" if steps else "off"
            print(
                f"trickle {name:>15}: step {f['step_ms']:.2f} ms, stall median {f['stall_ms_median']:.1f} ms, "
                f"longest {f['stall_ms_max']:.1f} ms, {f['stall_share']:.2%} of the steps; "
                f"rows flushed by a commit {f['flushed_rows_per_checkpoint']:,.0f}; rows put {f['rows_put']:,} "
                f"(evicted {f['write_backs']:,}, trickled {f['trickled_rows']:,}, flushed {f['flushed_rows']:,}); "
                f"written {f['written_mib']:,.0f} MiB; wanted {f['wanted']}"
            )
        first = args.every // 2
        for warm in (True, False):
            f = figures["restart"]["warm" if warm else "cold"] = restart(source, job, warm, first, pg)
            print(
                f"{'warm' if warm else 'cold'} restart, first {first} steps: hit ratio of lookups {f['hit_ratio_of_lookups']:.4f}, "
                f"of distinct rows {f['hit_ratio_of_unique_rows']:.4f}, {f['steps_per_s']:.1f} steps/s"
            )
    finish(args, facts, figures)


if __name__ == "__main__":
    main()
