"""Tiered tables on one GPU: the machine, the bits, and the time of a step against all-HBM tables, UVM caching and the bus.

One call does all; docs/gpu.md says what is measured and how to read it. Needs a CUDA device, FBGEMM's and TorchRec's CUDA wheels,
about 30 GB of its memory, 40 GB of host memory and 30 GB of disk.
"""

from __future__ import annotations

from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec_mtrains.kernels.device_directory import DeviceDirectory
from torchrec_mtrains.planner import HardwareProfile

from _common import Figure, finish, options, print_figures, print_machine
from _gpu_bits import all_optimizers
from _gpu_bus import rows_and_bus
from _gpu_groups import Batches, Shape
from _gpu_machine import GB, memory_and_bus, ssd_reads
from _gpu_predicted import calibrated, predicted_ms
from _gpu_steps import footprint, of_stock, of_tiered, on_ssd
from torchrec_mtrains.tiers import DdrHome

SHAPE = Shape(rows=1_000_000, dims=(128,) * 10, bags=4096, length=26)
QUICK = Shape(rows=20_000, dims=(128,) * 4, bags=256, length=8)
SHARES = (0.8, 0.1)
SGD, ADAM = EmbOptimType.EXACT_SGD, EmbOptimType.ADAM
PARTS = ("machine", "bits", "steps", "ssd")


def steps(shape: Shape, batches: Batches, footprint_share: float, warm_up: int, count: int, hardware: HardwareProfile) -> dict[str, Any]:
    """Everything that is timed with host memory below the pools, by optimizer."""
    result: dict[str, Any] = {}
    for optimizer in (SGD, ADAM):
        of: dict[str, Any] = {"hbm": of_stock(shape, optimizer, batches, warm_up, count)}
        of["all in the pool"] = of_tiered(shape, optimizer, batches, warm_up, count, 1.0, DdrHome())
        for share in SHARES:
            rows = share * footprint_share
            of[f"ours {share}"] = of_tiered(shape, optimizer, batches, warm_up, count, rows, DdrHome())
            of[f"uvm {share}"] = of_stock(shape, optimizer, batches, warm_up, count, rows)
        result[optimizer.name] = of
        for name, figure in of.items():
            print(
                f"{optimizer.name}, {name}: {figure['ms']:.2f} ms",
                {k: v for k, v in figure.items() if k.endswith(("threaded", "_step", "_device", "_hbm_ms"))},
                flush=True,
            )
        of["predicted"] = predicted_ms(hardware, shape, footprint_share, of)
    return result


def bus_ms(of: dict[str, Any], machine: dict[str, float], what: str = "pcie_both_ways_gb_per_s") -> float:
    """What the bus needs for the misses and the victims of a step, at the rate that both directions have at once: of copies, which no
    scattered row gets, or of what kernels do for those."""
    rows = of["misses_per_step"] + of["evictions_per_step"]
    return rows * of["record_bytes"] / (machine[what] * GB) * 1e3


def table(results: dict[str, Any]) -> list[Figure]:
    """The figures of the results that there are."""
    figures: list[Figure] = []
    if "bits" in results:
        equal = [r["equal"] for r in results["bits"].values()]
        figures.append(Figure(f"optimizers and homes with equal bits, of {len(equal)}", sum(equal), f"≥ {len(equal)}", 0))
    for optimizer, of in results.get("steps", {}).items():
        machine = results["machine"]
        figures.append(Figure(f"{optimizer}: all-HBM step, ms", of["hbm"]["ms"]))
        whole = of["all in the pool"]
        figures.append(Figure(f"{optimizer}: every row in the pool ÷ all-HBM", whole["ms"] / whole["all_hbm_ms"], "≤ 1.10"))
        figures.append(Figure("    prefetched by a thread of its own", whole["ms_threaded"] / whole["all_hbm_ms_threaded"]))
        figures.append(Figure("    of the device, launches hidden", whole["ms_of_device"] / of["hbm"]["ms_of_device"]))
        for share in SHARES:
            ours, uvm = of[f"ours {share}"], of[f"uvm {share}"]
            bus = bus_ms(ours, machine)
            figures.append(Figure(f"{optimizer}: pool {share:.0%} ÷ max(all-HBM, bus)", ours["ms"] / max(ours["all_hbm_ms"], bus), "≤ 1.2"))
            by_rows = bus_ms(ours, machine, "pcie_rows_both_ways_gb_per_s")
            figures.append(Figure("    ÷ max(all-HBM, bus at the rate of scattered rows)", ours["ms"] / max(ours["all_hbm_ms"], by_rows)))
            threaded = ours["ms_threaded"] / max(ours["all_hbm_ms_threaded"], bus)
            figures.append(Figure("    prefetched by a thread of its own", threaded))
            figures.append(
                Figure(
                    f"{optimizer}: pool {share:.0%} ÷ UVM caching", ours["ms"] / uvm["ms"], "≤ 1.0" if optimizer == SGD.name else "≤ 0.6"
                )
            )
        for name, (predicted, measured) in of["predicted"].items():
            figures.append(Figure(f"{optimizer}: {name}: predicted ÷ {measured:.2f} ms", predicted / measured))
    if "ssd" in results:
        of, reads = results["ssd"], results["machine"]["ssd"]
        io_ms = of["read_ios_per_step"] / max(v for k, v in reads.items() if k != "backend") * 1e3
        ms = sum(of["ms_of_rounds"]) / len(of["ms_of_rounds"])  # of all rounds, as the reads are: later batches read less
        figures.append(Figure("SGD: pool 10%, DDR 20%, SSD behind ÷ reads at the device's rate", ms / io_ms, "≤ 1.2"))
        figures.append(Figure("    ms a step", ms))
    figures.append(Figure("HBM bytes a row that is in no place", DeviceDirectory.BYTES_PER_ROW, "≤ 4", 0))
    figures.append(Figure("HBM bytes a slot or host place, beside the slot's record", DeviceDirectory.BYTES_PER_PLACE, "", 0))
    return figures


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--folder", default=".", help="on the SSD to measure")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure; machine always is")
    args = parser.parse_args()
    shape, warm_up, count = (QUICK, 5, 5) if args.quick else (SHAPE, 100, 50)
    facts = {**print_machine(), "gpu": torch.cuda.get_device_name(0)}
    print(f"gpu: {facts['gpu']}", flush=True)
    start, host_rows = perf_counter(), 100_000 if args.quick else 10_000_000
    bus = rows_and_bus(host_rows, host_rows // 80)
    results = {"machine": {**memory_and_bus(64 if args.quick else 1024), **bus, "ssd": ssd_reads(args.folder)}}
    print(results["machine"], flush=True)
    if "bits" in args.parts:
        results["bits"] = all_optimizers()
        print(results["bits"], flush=True)
    batches = Batches(shape, 20 if args.quick else 200)
    share = footprint(shape, batches)
    print(f"{shape.lookups} lookups a step; all batches use {share:.1%} of the rows", flush=True)
    if "steps" in args.parts:
        hardware = calibrated(args.quick)
        results["machine"] |= {"calibrated_hbm": asdict(hardware.hbm), "calibrated_pcie": asdict(hardware.pcie)}
        results["steps"] = steps(shape, batches, share, warm_up, count, hardware)
    if "ssd" in args.parts:
        results["ssd"] = on_ssd(shape, SGD, batches, 8, 2, args.folder)
        print(results["ssd"], flush=True)
    print_figures(table(results))
    print(f"took {perf_counter() - start:.0f} s")
    finish(args, facts, results)


if __name__ == "__main__":
    main()
