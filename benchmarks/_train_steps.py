"""Step times of a DLRM from tiers against the same model on stock FUSED in memory, in turns, on the same batches.

Sides, each with tables of its own:

    memory    stock FUSED, stepped by a plain loop
    all       every row in a pool, through ``TieredTrainPipeline``
    pools     ``share`` of the rows in pools, through ``TieredTrainPipeline``
    no look   the same without prefetch and lookahead, stepped by a plain loop: every read waits in its step

They take turns: in a round each trains the same batches with the same top MLP, after steps that are not counted. A turn ends when what the
side has read ahead is there. Which side comes first changes from round to round, and each round ends with the bare device's rate of
random reads, at a volume's depth. Losses must be equal bit for bit.
Figures are medians over rounds of what a round's mean step took; ratios are of one round.

A step cannot be faster than either of

    compute + misses × CPU a miss   the step in memory, and per miss: what native threads spend, and the main thread beyond that side's
    blocks ÷ IOPS                   what was read of the SSD, ÷ what the device does with nothing above it

Rows that came are misses and the block neighbours admitted with them, which would have been misses later: the CPU is theirs, too.
Figures are held against the larger of the two. Torch's workers are left out of CPU a miss: they spin where the main thread waits. Reads go
around the page cache (O_DIRECT).
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torchrec_mtrains.kernels import _core
from torchrec_mtrains.planner.perf_model import QUEUE_DEPTH

from _common import Figure
from _train_dense import calibrated_width
from _train_sides import Batches, Shape, Side, Steps, fill_pools, in_memory, put_every_row, tiered
from _train_traces import Stretch, Trace
from torchrec_mtrains.calibration.block_device import PAGE_BYTES, write_noise
from torchrec_mtrains.calibration.settling import until_settled
from torchrec_mtrains.process_group import process_group
from torchrec_mtrains.twins import TwinsDifferError

UNREST = 1.15
"""Longest ÷ shortest round of a side that misses nothing, beyond which something else ran on the machine. A guess."""

IN_FLIGHT = 80
"""Batches beyond the one that trains that a pipeline may ask for."""


@dataclass(frozen=True)
class Dense:
    """A top MLP: about so many milliseconds forward and backward on so many threads. ``steps``: of a side's turn under it."""

    name: str
    target_ms: float
    threads: int
    steps: int


@dataclass(frozen=True)
class Part:
    """A kind of trace, batches of it that pools see before the first is trained, and the top MLPs that are measured on it."""

    trace: str
    warm: int
    tops: tuple[str, ...]


@dataclass(frozen=True)
class Turns:
    """How often each side's turn comes, and what goes before the steps that are counted."""

    rounds: int
    uncounted: int
    probe_seconds: float

    def batches(self, tops: list[Dense]) -> int:
        return sum(self.rounds * (top.steps + self.uncounted) for top in tops)


def _sides(root: Path, shape: Shape, share: float, widths: dict[str, int], warm: Batches) -> list[Side]:
    pools = tiered("pools", shape, widths, shape.pool_rows(share), root / "pools", 2, None)
    memory = in_memory(shape, widths, pools)
    whole = tiered("all", shape, widths, list(shape.rows), root / "all", 2, None)
    fill_pools(whole)
    off = tiered("no look", shape, widths, shape.pool_rows(share), root / "off", 0, 0)
    for side in (pools, off):
        side.warm(list(warm.from_number(0)))
        put_every_row(side)
    return [memory, whole, pools, off]


def _same(steps: dict[str, Steps], where: str) -> None:
    for name, of_side in steps.items():
        if not torch.equal(of_side.losses, steps["memory"].losses):
            first = int((of_side.losses != steps["memory"].losses).nonzero()[0])
            raise TwinsDifferError(f"{where}: side {name!r} has another loss than stock FUSED at step {first} of the round")


def measure(
    root: Path,
    *,
    shape: Shape,
    share: float,
    dense: tuple[Dense, ...],
    parts: tuple[Part, ...],
    turns: Turns,
    trace: Callable[[str, int, int, Stretch, int], Trace],
) -> dict[str, Any]:
    """``share``: of a table's rows in its pool. ``trace``: as ``zipf_trace``."""
    tops = {d.name: d for d in dense}
    calibrated = {d.name: calibrated_width(shape.top_inputs, shape.batch_size, d.target_ms, d.threads) for d in dense}
    for name, c in calibrated.items():
        print(f"top {name}: 3 × {c['width']} wide, {c['dense_ms']:.1f} ms on {c['threads']} threads", flush=True)
    batches, warms = Batches(shape), []
    for part in parts:
        stretch = Stretch(part.warm, turns.batches([tops[top] for top in part.tops]), IN_FLIGHT if part is parts[-1] else 0)
        made = [trace(part.trace, rows, shape.lookups, stretch, t) for t, rows in enumerate(shape.rows)]
        warms.append(Batches(shape))
        warms[-1].append([Trace(m.name, m.rows, m.ids[: part.warm]) for m in made])
        batches.append(made, first=part.warm)
    f: dict[str, Any] = {
        "shape": asdict(shape),
        "pool_rows": shape.pool_rows(share),
        "tops": calibrated,
        "turns": asdict(turns) | {"steps": {d.name: d.steps for d in dense}},
        "cores": os.cpu_count(),
        "steps_compared": 0,
        "parts": [],
    }
    with process_group():
        start = perf_counter()
        torch.set_num_threads(max(d.threads for d in dense))
        sides = _sides(root, shape, share, {name: c["width"] for name, c in calibrated.items()}, warms[0])
        raw = root / "raw"
        write_noise(raw, max(1 << 20, min(4 << 30, sum(shape.rows) * shape.dim * 4)))
        print(f"tables made, pools warm after {perf_counter() - start:.0f} s", flush=True)

        def bare_reads(seed: int) -> Any:
            return _core.random_io([str(raw)], PAGE_BYTES, QUEUE_DEPTH, 1.0, turns.probe_seconds, _backend(sides), seed)

        _settle(lambda seed: float(bare_reads(seed).operations_per_s))
        number = 0
        for part, warm in zip(parts, warms, strict=True):
            if part is not parts[0]:
                for side in sides[2:]:
                    side.warm(list(warm.from_number(0)))
            for top in part.tops:
                torch.set_num_threads(tops[top].threads)
                rounds: list[dict[str, Steps]] = []
                bare: list[Any] = []
                steps = tops[top].steps
                for round_ in range(turns.rounds):
                    batches.make(number, number + steps + turns.uncounted + IN_FLIGHT)
                    turn = {}
                    for k in range(len(sides)):
                        side = sides[(round_ + k) % len(sides)]
                        turn[side.name] = side.run(batches, top, steps, turns.uncounted)
                    _same(turn, f"{part.trace}, top {top}, round {round_}")
                    number += steps + turns.uncounted
                    rounds.append(turn)
                    bare.append(bare_reads(round_))
                f["parts"].append(summary(part.trace, top, calibrated[top]["threads"], rounds, bare))
                print_part(f["parts"][-1])
        f["steps_compared"] = number
        for side in sides:
            side.close()
    return f


def _settle(iops_now: Callable[[int], float]) -> None:
    """Waits while the device is busy with what was written before: its reads are slower then."""
    seen = until_settled(iops_now)
    print(f"the device's reads a second, probe by probe until it settled: {', '.join(f'{rate:,.0f}' for rate in seen)}", flush=True)


def _backend(sides: list[Side]) -> str:
    return str(sides[1].groups[0].volumes()[0].backend)


def summary(trace: str, top: str, threads: int, rounds: list[dict[str, Steps]], bare: list[Any]) -> dict[str, Any]:
    """Medians over the rounds. ``bare``: what ``random_io`` found after each."""
    iops = [probe.operations_per_s for probe in bare]

    def over_rounds(of_round: Callable[[dict[str, Steps], float], float]) -> float:
        return statistics.median(of_round(r, rate) for r, rate in zip(rounds, iops, strict=True))

    def step(side: str) -> Callable[[dict[str, Steps]], float]:
        return lambda r: statistics.mean(r[side].seconds)

    def cpu(r: dict[str, Steps]) -> float:
        pools, memory = r["pools"].cpu_seconds, r["memory"].cpu_seconds
        return pools["native"] + pools["main"] - memory["main"]

    def cpu_per_miss(r: dict[str, Steps]) -> float:
        return cpu(r) / max(1, r["pools"].counters["misses"])

    def cpu_per_row_that_came(r: dict[str, Steps]) -> float:
        return cpu(r) / max(1, r["pools"].counters["misses"] + r["pools"].counters["admitted_rows"])

    def native_per_miss(r: dict[str, Steps]) -> float:
        return r["pools"].cpu_seconds["native"] / max(1, r["pools"].counters["misses"])

    def workers_per_miss(r: dict[str, Steps]) -> float:
        return (r["pools"].cpu_seconds["workers"] - r["memory"].cpu_seconds["workers"]) / max(1, r["pools"].counters["misses"])

    def per_step(r: dict[str, Steps], counter: str) -> float:
        return r["pools"].counters[counter] / len(r["pools"].seconds)

    def compute_bound(r: dict[str, Steps]) -> float:
        return step("memory")(r) + per_step(r, "misses") * cpu_per_miss(r)

    def device_bound(r: dict[str, Steps], rate: float) -> float:
        return per_step(r, "read_ios") / rate

    f = {
        "trace": trace,
        "top": top,
        "threads": threads,
        "step_ms": {side: 1e3 * over_rounds(lambda r, _, s=side: step(s)(r)) for side in rounds[0]},
        "step_ms_of_rounds": {side: [1e3 * step(side)(r) for r in rounds] for side in rounds[0]},
        "all_over_memory": over_rounds(lambda r, _: step("all")(r) / step("memory")(r)),
        "pools_over_memory": over_rounds(lambda r, _: step("pools")(r) / step("memory")(r)),
        "speed_up": over_rounds(lambda r, _: step("no look")(r) / step("pools")(r)),
        "unique_rows_per_step": over_rounds(lambda r, _: per_step(r, "unique_rows")),
        "misses_per_step": over_rounds(lambda r, _: per_step(r, "misses")),
        "misses_without_look": over_rounds(lambda r, _: r["no look"].counters["misses"] / len(r["no look"].seconds)),
        "blocks_per_step": over_rounds(lambda r, _: per_step(r, "read_ios")),
        "neighbours_per_step": over_rounds(lambda r, _: per_step(r, "admitted_rows")),
        "cpu_us_per_miss": 1e6 * over_rounds(lambda r, _: cpu_per_miss(r)),
        "cpu_us_per_row_that_came": 1e6 * over_rounds(lambda r, _: cpu_per_row_that_came(r)),
        "native_us_per_miss": 1e6 * over_rounds(lambda r, _: native_per_miss(r)),
        "bare_us_per_read": 1e6 * statistics.median(probe.cpu_seconds / probe.operations for probe in bare),
        "workers_us_per_miss": 1e6 * over_rounds(lambda r, _: workers_per_miss(r)),
        "unrest": max(max(map(step(s), rounds)) / min(map(step(s), rounds)) for s in ("memory", "all")),
        "iops": statistics.median(iops),
        "compute_bound_ms": 1e3 * over_rounds(lambda r, _: compute_bound(r)),
        "device_bound_ms": 1e3 * over_rounds(device_bound),
        "over_compute_bound": over_rounds(lambda r, _: step("pools")(r) / compute_bound(r)),
        "over_device_bound": over_rounds(lambda r, rate: step("pools")(r) / max(1e-9, device_bound(r, rate))),
    }
    return f | {"bound_by": "device" if f["device_bound_ms"] > f["compute_bound_ms"] else "compute"}


def print_part(p: dict[str, Any]) -> None:
    ms = ", ".join(f"{name} {x:.1f}" for name, x in p["step_ms"].items())
    print(
        f"{p['trace']}, top {p['top']}: ms a step: {ms}; {p['unique_rows_per_step']:,.0f} unique, {p['misses_per_step']:,.0f} missing "
        f"({p['misses_without_look']:,.0f} without look), {p['blocks_per_step']:,.0f} blocks, {p['neighbours_per_step']:,.0f} neighbours "
        f"admitted; CPU a miss {p['cpu_us_per_miss']:.2f} µs, a row that came {p['cpu_us_per_row_that_came']:.2f} "
        f"(a miss {p['native_us_per_miss']:.2f} on native threads; torch's workers {p['workers_us_per_miss']:.2f} besides; "
        f"a bare read {p['bare_us_per_read']:.2f}); "
        f"bounds: compute {p['compute_bound_ms']:.1f}, device {p['device_bound_ms']:.1f} ({p['iops']:,.0f} IOPS); all ÷ memory "
        f"{p['all_over_memory']:.3f}, pools ÷ memory {p['pools_over_memory']:.3f}, no look ÷ pools {p['speed_up']:.2f}",
        flush=True,
    )
    if p["unrest"] > UNREST:
        print(f"… the machine was not idle: rounds without misses differ by {p['unrest'] - 1:.0%}, so these say little", flush=True)


def show(f: dict[str, Any]) -> None:
    """Printed as it is measured."""
    print(f"losses equal bit for bit on all sides: {f['steps_compared']} steps")


def figures(f: dict[str, Any]) -> list[Figure]:
    """Goals as they are meant: for a device that is busy, for a processor that is, and where torch leaves a core to the reads."""
    lines = []
    for p in f["parts"]:
        where = f"{len(f['shape']['rows'])} tables, {p['trace']}, top {p['top']}"
        spare = p["threads"] < f["cores"]
        by_device = p["bound_by"] == "device"
        lines.append(Figure(f"step ÷ in memory, all rows in the pool: {where}", p["all_over_memory"], "≤ 1.03", 3))
        lines.append(Figure(f"step ÷ in memory, pools: {where}", p["pools_over_memory"], "≤ 1.05" if spare and not by_device else "", 3))
        if by_device:
            lines.append(Figure(f"step ÷ (blocks ÷ IOPS): {where}", p["over_device_bound"], "≤ 1.08", 3))
        else:
            lines.append(Figure(f"step ÷ (compute + misses × CPU a miss): {where}", p["over_compute_bound"], "" if spare else "≤ 1.05", 3))
            lines.append(Figure(f"CPU a miss, µs: {where}", p["cpu_us_per_miss"], "" if spare else "≤ 3.5"))
            lines.append(Figure(f"CPU a row that came, µs: {where}", p["cpu_us_per_row_that_came"]))
        lines.append(Figure(f"speed-up over prefetch off: {where}", p["speed_up"]))
    return lines
