"""What the planner's model says of the steps that ``_gpu_steps`` timed: of this GPU, calibrated, with the misses that were counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torchrec_mtrains.planner import HardwareProfile, MissCurve, hardware_profiles
from torchrec_mtrains.planner.gpu_perf_model import GpuPerfModel
from torchrec_mtrains.planner.perf_model import Floats, ShardUse

from _gpu_groups import Shape
from torchrec_mtrains.calibration import gpu
from torchrec_mtrains.calibration.effort import FULL, QUICK

ELEMENT_BYTES = 4


def calibrated(quick: bool) -> HardwareProfile:
    """This GPU and its link, as ``mtrains calibrate`` measures them; the rest is of the profile that planners have built in."""
    effort = QUICK if quick else FULL
    return replace(hardware_profiles()["h200"], hbm=gpu.memory(effort, print), pcie=gpu.link(effort, print))


def predicted_ms(hardware: HardwareProfile, shape: Shape, footprint_share: float, of: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Of one optimizer's figures ``of``: by name, milliseconds of a step as predicted and as measured.

    Those of stock tables in HBM are measured with their launches hidden: the host may take longer for them than the device does.
    """
    tables = len(shape.dims)
    shares = {name: float(name.split()[1]) for name in of if name.startswith("ours")}
    pools = {share: round(share * footprint_share * shape.rows) for share in shares.values()}
    missed = {pools[share]: of[name]["misses_per_step"] / tables for name, share in shares.items()}
    some = of[next(iter(shares))]
    unique = some["unique_rows_per_step"] / tables
    sizes = {0: unique, **dict(sorted(missed.items())), shape.rows: 0.0}
    curve = MissCurve(tuple(sizes), tuple(sizes.values()), tuple(sizes.values()), shape.bags)
    weight_bytes, record_bytes = ELEMENT_BYTES * shape.dims[0], some["record_bytes"]
    use = ShardUse(shape.rows, shape.lookups / tables, unique, weight_bytes, record_bytes, curve, shape.rows)
    model = GpuPerfModel(hardware)

    def step(busy: Floats, tiered: bool) -> float:
        return model.predict((model.base_of(tiered=tiered) + tables * busy)[None]).step_ms

    result: dict[str, tuple[float, float]] = {}
    for name, figure in of.items():
        rows = pools[float(name.split()[1])] if name[-1].isdigit() else shape.rows
        if name == "hbm":
            ms = step(model.in_memory(use), False)
        elif name.startswith("uvm"):
            ms = step(model.uvm_cached(use, rows, record_bytes - weight_bytes)[0], False)
        else:
            ms = step(model.over_ddr(use, rows)[0], True)
        result[name] = ms, figure["ms_of_device" if name == "hbm" else "ms"]
    return result
