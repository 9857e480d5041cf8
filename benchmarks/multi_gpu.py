"""Tiered tables on all GPUs of a host: bits beside stock FUSED by sharding, scaling, one SSD behind all ranks, kill and resume.

docs/gpu.md says what is measured and how to read it. Without GPUs the same code runs over ``--ranks`` processes and gloo: that shows
that it runs, and its bits; its times say nothing.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torchrec_mtrains.planner import BlockDeviceProfile, DevicePoint, HardwareProfile, hardware_profiles

from _common import Figure, finish, options, print_figures, print_machine
from _gpu_machine import ssd_reads, ssd_writes
from _multi_job import SHARDINGS, Budget, Shape, Tiers
from _multi_ranks import Ranks, once_there
from _multi_runs import bits, job, steps
from torchrec_mtrains import DdrHome, SsdHome
from torchrec_mtrains.calibration.block_device import LOG_WRITE_BYTES

SMALL = Shape(tables=5, rows=20_000, dim=64, batch_size=256, pooling=4, over=(64,))
LARGE = Shape(tables=17, rows=4_000_000, dim=128, batch_size=16_384, pooling=10, over=(1024, 1024, 512, 256))
ON_SSD = Shape(tables=17, rows=1_000_000, dim=128, batch_size=2048, pooling=12, over=(1024, 1024))
TINY = Shape(tables=3, rows=600, dim=8, batch_size=16, pooling=2, over=(8,))
POOL_SHARE = 0.1
PLANNED_SHARES, PLANNED_SHARES_OF_TINY = (0.15, 0.25), (1.6, 1.6)
"""Of the tables' bytes, that the planner has of HBM and of DDR. Of tiny tables, a batch uses most rows."""
PARTS = ("bits", "resume", "scaling", "ssd")
PROBE, QUICK_PROBE = {}, {"gigabytes": 1 / 64, "seconds": 0.05}
"""How the SSD is measured: at the sizes of ``_gpu_machine``, or just so that it runs."""


def same_bits(ranks: Ranks, shape: Shape, world: int, count: int, folder: str) -> dict[str, Any]:
    """By sharding, home and pipeline: on every rank, whether the bits were those of stock FUSED."""
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        by_rank = ranks.run(world, bits, shape, SHARDINGS, POOL_SHARE, inside, count, within_s=300)
    assert by_rank
    found: dict[str, Any] = {}
    for name in by_rank[0]:
        sides = [r[name] for r in by_rank]
        found[name] = {"equal": all(s["equal_losses"] == count and s["equal_rows"] for s in sides), "ranks": sides}
        print(f"bits, {name}: {'equal' if found[name]['equal'] else sides}", flush=True)
    return found


def kill_and_resume(ranks: Ranks, shape: Shape, world: int, count: int, folder: str, most_kills: int) -> dict[str, Any]:
    """A job killed at instants after its first checkpoint until it is done: its losses beside those of one that was not."""
    every, random_ = max(2, count // 6), random.Random(1)
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        ssds = [Path(inside) / name for name in ("undisturbed", "killed")]
        for ssd in ssds:
            ssd.mkdir()
        tiers = [Tiers(POOL_SHARE, (SsdHome((str(ssd),), capacity_bytes=2 << 30),)) for ssd in ssds]
        whole = ranks.run(world, job, shape, "row_wise", tiers[0], count, count + 1, f"{inside}/none", within_s=300)
        kills, done, checkpoint = 0, None, Path(inside) / "checkpoint"
        while done is None:
            kill = once_there(checkpoint / "LATEST", random_.random() * 2) if kills < most_kills else None
            with Ranks(world) as mortal:
                done = mortal.run(world, job, shape, "row_wise", tiers[1], count, every, str(checkpoint), within_s=300, kill_when=kill)
            kills += done is None
        assert whole
        equal = all(whole[r][step] == loss for r in range(world) for step, loss in done[r].items())
        compared = sum(len(losses) for losses in done)
        return {"kills": kills, "equal": equal, "losses_compared": compared, "resumed_at": min(min(losses) for losses in done)}


def scaling(ranks: Ranks, shape: Shape, world: int, warm_up: int, count: int, batches: int, found: dict[str, Any]) -> None:
    """Fills in steps of stock FUSED and of ours over DDR, on one GPU and on all."""
    for name, tiers in (("fused", None), ("ours", Tiers(POOL_SHARE, (DdrHome(),)))):
        for size in sorted({1, world}, reverse=True):  # all first: TorchRec tries collectives once a process, on every rank of the world
            print(f"{name}, {size} ranks:", flush=True)
            by_rank = ranks.run(size, steps, shape, "table_wise", tiers, warm_up, count, batches, within_s=90)
            assert by_rank
            found[f"{name} {size}"] = of = {"ms": max(r["ms"] for r in by_rank), "ranks": by_rank}
            print(f"{name}, {size} ranks: {of['ms']:.2f} ms a step of {size * shape.batch_size:,} samples", flush=True)


def device_of_machine(reads: dict[str, Any], writes_per_s: float, world: int) -> HardwareProfile:
    """The machine that planners take when nobody calibrated one, with the SSD that was measured."""
    points = [DevicePoint(4096, depth, 1.0, reads[f"reads_per_s_at_depth_{depth}"]) for depth in (1, 16, 64, 128, 256)]
    ssd = BlockDeviceProfile("measured", (*points, DevicePoint(LOG_WRITE_BYTES, 8, 0.0, writes_per_s)), "ssd_reads, ssd_writes")
    return replace(hardware_profiles()["h200"], cores=os.cpu_count() or world, ssd=ssd)


def on_ssd(ranks: Ranks, shape: Shape, world: int, warm_up: int, count: int, batches: int, folder: str) -> dict[str, Any]:
    """Ours with the host's SSD below the pools of all ranks, stock FUSED beside, and what that device can do."""
    probe = QUICK_PROBE if shape == TINY else PROBE
    reads = ssd_reads(folder, **probe)
    fused = ranks.run(world, steps, shape, "table_wise", None, warm_up, count, batches, within_s=90)
    assert fused
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        table_bytes = shape.tables * shape.rows * (4 * shape.dim + 4) // world  # of a rank
        home = SsdHome((inside,), capacity_bytes=3 * table_bytes + (256 << 20))
        by_rank = ranks.run(world, steps, shape, "table_wise", Tiers(POOL_SHARE, (home,)), warm_up, count, batches, within_s=150)
        assert by_rank
        hbm, ddr = (int(share * table_bytes) for share in (PLANNED_SHARES_OF_TINY if shape == TINY else PLANNED_SHARES))
        budget = Budget(hbm, ddr, home, device_of_machine(reads, ssd_writes(folder, **probe), world))
        planned = ranks.run(world, steps, shape, "", budget, warm_up, count, batches, within_s=150)
        assert planned
    ios = sum(r["read_ios_per_step"] for r in by_rank)
    most = max(v for k, v in reads.items() if k != "backend")
    found = {
        "ms": max(r["ms"] for r in by_rank),
        "fused_ms": max(r["ms"] for r in fused),
        "read_ios_per_step": ios,
        "io_ms": ios / most * 1e3,
        "reads": reads,
        "ranks": by_rank,
        "predicted_ms": planned[0]["predicted_ms"],
        "planned_ms": max(r["ms"] for r in planned),
        "planned": planned,
    }
    print(f"planned: {found['planned_ms']:.2f} ms a step, predicted before: {found['predicted_ms']:.2f}", flush=True)
    print(f"ours over an SSD, {world} ranks: {found['ms']:.2f} ms a step, of I/O {found['io_ms']:.2f} ms", flush=True)
    return found


def table(results: dict[str, Any], world: int) -> list[Figure]:
    """The figures of the results that there are."""
    figures: list[Figure] = []
    if of := results.get("bits"):
        equal = [r["equal"] for r in of.values()]
        figures.append(Figure(f"shardings, homes and pipelines with equal bits, of {len(equal)}", sum(equal), f"≥ {len(equal)}", 0))
    if of := results.get("resume"):
        figures.append(Figure(f"killed {of['kills']} times and resumed: losses equal, of {of['losses_compared']}",
                              of["losses_compared"] * of["equal"], f"≥ {of['losses_compared']}", 0))  # fmt: skip
    of = results.get("scaling", {})
    if f"ours {world}" in of:
        fused, ours = (of[f"{name} 1"]["ms"] / of[f"{name} {world}"]["ms"] for name in ("fused", "ours"))
        figures.append(Figure(f"stock FUSED: samples/s on {world} ÷ {world} × one", fused))
        figures.append(Figure(f"ours, pool {POOL_SHARE:.0%}, DDR: samples/s on {world} ÷ {world} × one", ours))
        figures.append(Figure("    ÷ stock FUSED's", ours / fused, "≥ 0.95"))
    if of := results.get("ssd"):
        bound = max(of["fused_ms"], of["io_ms"])
        figures.append(Figure(f"SSD behind {world} ranks: step ÷ max(stock FUSED, the device's I/O)", of["ms"] / bound, "≤ 1.2"))
        off = of["predicted_ms"] / of["planned_ms"]
        figures.append(Figure("the planner's plan: predicted step ÷ measured", off))
        figures.append(Figure("    off by", abs(off - 1), "≤ 0.2"))
    return figures


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--folder", default=".", help="on the SSD to measure")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2, help="GPUs to use, or processes where there are none")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to do")
    args = parser.parse_args()
    facts = {**print_machine(), "ranks": args.ranks, "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"}
    print(f"{args.ranks} ranks, gpu: {facts['gpu']}", flush=True)
    start, results = perf_counter(), {}
    try:
        measure(args, results)
    finally:  # what was measured before something failed is not lost
        if figures := table(results, args.ranks):
            print_figures(figures)
        print(f"took {perf_counter() - start:.0f} s")
        finish(args, facts, results)


def measure(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Fills in the results of every part that was asked for."""
    small, large = (TINY, TINY) if args.quick else (SMALL, LARGE)
    count, warm_up, timed, batches = (12, 5, 10, 10) if args.quick else (100, 100, 50, 100)
    with Ranks(args.ranks) as ranks:
        if "bits" in args.parts:
            results["bits"] = same_bits(ranks, small, args.ranks, count, args.folder)
        if "scaling" in args.parts:
            scaling(ranks, large, args.ranks, warm_up, timed, batches, results.setdefault("scaling", {}))
        if "ssd" in args.parts:
            results["ssd"] = on_ssd(ranks, TINY if args.quick else ON_SSD, args.ranks, warm_up // 5, timed // 10, batches, args.folder)
        if "resume" in args.parts:
            results["resume"] = kill_and_resume(ranks, small, args.ranks, 10 * count, args.folder, 1 if args.quick else 3)
            print(results["resume"], flush=True)


if __name__ == "__main__":
    main()
