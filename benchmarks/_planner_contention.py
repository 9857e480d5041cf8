"""Ranks that share one SSD: the step that the planner predicts, against training by as many gloo ranks.

Alone, a rank trains two tables above the SSD. Together, each of two ranks trains two such tables, of batches half as large: as many rows of
each table a step, on each rank the same work, and twice as much for the device. Whatever the device cannot do twice shows in the step.

Plans are those of ``TieredShardingPlanner`` by a profile of batches that are not trained; rows are in their homes before, pools full when
steps are counted. Every rank has one thread of torch. Steps are predicted with the SSD as it was calibrated, which plans are made with, and
as it reads the homes in place before training (``_device_reads.py``).
"""

from __future__ import annotations

import multiprocessing
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrec_mtrains.planner import CheckpointSchedule, HardwareProfile, TieredParameterConstraints, TieredShardingPlanner, TieredTopology

import torchrec_mtrains as mtrains
from _common import Figure
from _device_reads import as_read, calibrated_reads, read_in_place
from _planner_jobs import PREFETCHED, Job, JobTable, MixedBatches, predicted_by, steady_ms
from _train_dense import Tops
from _train_sides import DENSE_FEATURES, Side, put_every_row
from torchrec_mtrains.job_model import build_model, fused_params

TABLES_PER_RANK = 2
WIDTH = 16


@dataclass(frozen=True)
class Size:
    """Of a table, and of the batches of all ranks together. ``pool_share``: of the tables' bytes that a rank has in memory."""

    rows: int
    dim: int
    samples: int
    pooling: int
    exponent: float
    pool_share: float
    uncounted: int
    steps: int


FULL = Size(rows=400_000, dim=64, samples=1024, pooling=4, exponent=0.9, pool_share=0.12, uncounted=60, steps=40)
QUICK = Size(rows=5_000, dim=16, samples=64, pooling=2, exponent=0.9, pool_share=0.9, uncounted=6, steps=4)


def _job(size: Size, ranks: int) -> Job:
    return Job((JobTable(size.rows, size.exponent, size.pooling),) * (TABLES_PER_RANK * ranks), size.dim, size.samples // ranks)


def _planner(size: Size, ranks: int, folder: str, hardware: HardwareProfile, dense_ms: float) -> TieredShardingPlanner:
    job = _job(size, ranks)
    of_profile = _job(size, 1)  # batches of all ranks together
    access = Job(job.tables, job.dim, of_profile.batch_size)
    budget = round(size.pool_share * TABLES_PER_RANK * size.rows * job.record_bytes) + TABLES_PER_RANK * size.rows * 20
    topology = TieredTopology(ranks, ddr_budget_bytes=budget, ssd=mtrains.SsdHome((folder,), 8 << 30), local_world_size=ranks)
    constraints = {
        t.name: TieredParameterConstraints(
            compute_kernels=["customized_kernel"], sharding_types=["table_wise"], pooling_factors=[float(t.pooling)]
        )
        for t in job.shape.tables
    }
    return TieredShardingPlanner(
        topology,
        batch_size=job.batch_size,
        constraints=constraints,
        hardware=hardware,
        access=access.profile(access.traces(2 * size.uncounted, stream=9)),
        dense_ms=dense_ms,
        checkpoints=CheckpointSchedule(keep=0),
    )


def _train(rank: int, ranks: int, size: Size, store: str, folder: str, hardware_file: str, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    job = _job(size, ranks)
    traces = job.traces(size.uncounted + size.steps + 70, stream=rank)
    batches = MixedBatches(job.shape, traces)
    batches.make(0, len(batches))
    dense_ms = job.dense_ms(WIDTH, batches.made[0], size.steps)
    hardware = HardwareProfile.load(hardware_file)
    planner = _planner(size, ranks, folder, hardware, dense_ms)
    model = build_model(job.shape.tables, DENSE_FEATURES, job.shape.model_options)
    model.model.over_arch = Tops(job.shape.top_inputs, {"top": WIDTH})
    sharders = mtrains.sharders(fused_params=fused_params(job.shape.model_options))
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    side = Side("tiered", job.shape, {"top": WIDTH}, plan, sharders, PREFETCHED, None)
    put_every_row(side)
    dist.barrier()
    device = read_in_place(Path(folder)) if rank == 0 else None
    dist.barrier()
    done = side.run(batches, "top", size.steps, size.uncounted)
    dist.barrier()
    if device is not None:
        options = planner._best_plan
        assert options is not None
        model = replace(planner._model, hardware=as_read(hardware, device.reads_per_s))
        in_place = predicted_by(model, options, ranks)
        answers.put(
            {"measured_ms": steady_ms(done.seconds), "predicted_ms": in_place.step_ms, "bottleneck": in_place.bottleneck}
            | {"predicted_as_calibrated_ms": planner.summary(plan).step_ms, "dense_ms": dense_ms}
            | {"reads_a_step": done.counters["read_ios"] / size.steps, "calibrated": calibrated_reads(hardware)}
            | {"before": asdict(device), "after": asdict(read_in_place(Path(folder)))}
        )
    side.close()
    dist.destroy_process_group()


def _together(ranks: int, size: Size, root: Path, hardware_file: Path) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory(dir=root) as folder:
        arguments = (ranks, size, str(Path(folder) / "store"), folder, str(hardware_file), answers)
        processes = [context.Process(target=_train, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        found: dict[str, Any] = answers.get(timeout=300)
        for process in processes:
            process.join()
            assert process.exitcode == 0, f"a rank ended with {process.exitcode}"
    return found


def measure(root: Path, hardware: HardwareProfile, size: Size) -> dict[str, Any]:
    """``root``: a folder on the disk. ``hardware``: of this machine."""
    hardware.save(root / "hardware.json")
    print(f"4 KiB reads a second by the calibration: {calibrated_reads(hardware):,.0f}")
    print(
        f"{'ranks':<7}{'step ms':>9}{'predicted':>11}{'ratio':>7}{'as calibrated':>15}{'ratio':>7}{'reads a step':>14}"
        f"{'reads/s: before':>17}{'after':>9}  bottleneck"
    )
    lines = {}
    for ranks in (1, 2):
        line = _together(ranks, size, root, root / "hardware.json")
        measured, predicted, calibrated = (line[name] for name in ("measured_ms", "predicted_ms", "predicted_as_calibrated_ms"))
        steps = f"{measured:>9.2f}{predicted:>11.2f}{predicted / measured:>7.2f}{calibrated:>15.2f}{calibrated / measured:>7.2f}"
        reads = f"{line['reads_a_step']:>14,.0f}{line['before']['reads_per_s']:>17,.0f}{line['after']['reads_per_s']:>9,.0f}"
        print(f"{ranks:<7}{steps}{reads}  {line['bottleneck']}", flush=True)
        lines[str(ranks)] = line
    return {"size": asdict(size), "ranks": lines}


def figures(f: dict[str, Any]) -> list[Figure]:
    """How right the step of two ranks is, with the device as read in place and as calibrated, and what sharing costs."""
    one, two = f["ranks"]["1"], f["ranks"]["2"]
    as_calibrated = two["predicted_as_calibrated_ms"] / two["measured_ms"]
    return [
        Figure("contention: step of one rank, predicted ÷ measured", one["predicted_ms"] / one["measured_ms"], digits=2),
        Figure("contention: step of two ranks on one SSD, predicted ÷ measured", two["predicted_ms"] / two["measured_ms"], digits=2),
        Figure("contention, as calibrated: step of two ranks on one SSD, predicted ÷ measured", as_calibrated, digits=2),
        Figure("contention: step of two ranks ÷ one, measured", two["measured_ms"] / one["measured_ms"], digits=2),
        Figure("contention: step of two ranks ÷ one, predicted", two["predicted_ms"] / one["predicted_ms"], digits=2),
    ]
