"""What the planner's model predicts, against training: step times and miss ratios of DLRMs of many configurations, by the real kernel.

For each configuration:

    batches     drawn for it; their ids are profiled as ``mtrains profile`` does, all of them
    dense       forward, backward and optimizer of the model on constant pooled rows, timed alone: what a user would time. Just before
                the steps that the prediction is held against, as the machine's processors are not equally fast all the time
    prediction  ``PerfModel`` on the calibration, the curves and the dense time
    device      rows are put into the home, and its files read at random until that has settled (``_device_reads.py``): the prediction
                is also made of the calibration with the SSD at that rate, which is what errors are of. Once more after training,
                which says how far the device drifted meanwhile
    training    through ``TieredTrainPipeline``: batches with a tiny top until pools are full and full of changed rows, then with
                the top in question; of the counted steps what several in a row took on average, the median

Rows are in their homes before, as in a job that has seen all of them. The lookahead is fixed, so that the window is full when steps
are counted. Where a drawn job's batches use fewer rows than its pools and caches hold, these are not full: what is trained is no steady
state, and figures are also given without such jobs.

``CONFIGURATIONS`` are those that a constant of the model was fitted on. ``held_out`` draws others, over wider ranges, that none was.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torchrec_mtrains.planner import AccessProfile, HardwareProfile
from torchrec_mtrains.planner.charges import records_per_block
from torchrec_mtrains.planner.neighbours import curve_over_ssd
from torchrec_mtrains.planner.perf_model import IN_FLIGHT_BATCHES, PerfModel, ShardUse

import torchrec_mtrains as mtrains
from _common import Figure, median
from _device_reads import DRIFTED, as_read, calibrated_reads, read_in_place
from _planner_jobs import PREFETCHED, Job, JobTable, MixedBatches, steady_ms
from _train_sides import Batches, Side, fill_pools, put_every_row, tiered
from torchrec_mtrains.process_group import process_group

WARM_TOP = "warm"
HELD_OUT_SEED = 36
_MOST_BYTES = 800 << 20  # of a drawn job's tables
_MOST_LOOKUPS = 60_000  # of a drawn job's batch


@dataclass(frozen=True)
class Configuration:
    """Pools of ``pool_share`` of the rows, caches on PMem of ``cache_share``; tops by name and width."""

    job: Job
    pool_share: float
    cache_share: float
    widths: dict[str, int]

    @property
    def name(self) -> str:
        j, cache = self.job, f" + {self.cache_share:.0%} cache" if self.cache_share else ""
        exponents, rows = {t.exponent for t in j.tables}, sum(t.rows for t in j.tables)
        law = f"zipf {min(exponents)}" + (f"-{max(exponents)}" if len(exponents) > 1 else "")
        return f"{len(j.tables)} tables, {rows / 1e3:,.0f}K × {j.dim}, {law}, batch {j.batch_size}, {self.pool_share:.0%}{cache}"

    @property
    def pool_rows(self) -> list[int]:
        """Of each table, but never fewer than a batch may need."""
        return [min(t.rows, max(int(t.rows * self.pool_share), 2 * self.job.batch_size * t.pooling)) for t in self.job.tables]

    @property
    def cache_rows(self) -> list[int]:
        """Of each table: what the pool leaves out at most."""
        return [min(round(self.cache_share * t.rows), t.rows - pool) for t, pool in zip(self.job.tables, self.pool_rows, strict=True)]


@dataclass(frozen=True)
class Size:
    """Of every configuration. ``warm_lookups``: of its tables' mean, before steps are counted, in ``most_warm`` batches at most."""

    lookahead: int
    warm_lookups: int
    most_warm: int
    uncounted: int
    steps: int

    def warm(self, c: Configuration) -> int:
        """Batches; the window must be full."""
        lookups = c.job.batch_size * statistics.mean(t.pooling for t in c.job.tables)
        return max(self.lookahead + PREFETCHED + 1, min(self.most_warm, int(self.warm_lookups / lookups)))

    def trained(self, c: Configuration) -> int:
        """Batches, those whose steps are counted included."""
        return self.warm(c) + len(c.widths) * (self.uncounted + self.steps)


def _alike(tables: int, exponent: float, batch: int, pool: float, cache: float = 0.0) -> Configuration:
    job = Job((JobTable(150_000, exponent, 4),) * tables, 64, batch)
    return Configuration(job, pool, cache, {"small top": 16, "large top": 512})


CONFIGURATIONS = (
    *(
        _alike(tables, exponent, batch, share)
        for exponent in (0.9, 1.05, 1.2)
        for tables, batch, share in ((8, 256, 0.02), (8, 256, 0.1), (4, 1024, 0.1), (4, 1024, 0.5), (2, 4096, 0.4))
    ),
    _alike(4, 1.05, 1024, 1.0),
    *(_alike(4, exponent, 1024, 0.1, 0.3) for exponent in (0.9, 1.05)),
)
FULL = Size(lookahead=8, warm_lookups=800_000, most_warm=300, uncounted=6, steps=20)


def _tiny(exponent: float, pool: float, cache: float = 0.0) -> Configuration:
    return Configuration(Job((JobTable(5_000, exponent, 2),) * 2, 16, 64), pool, cache, {"small top": 16})


QUICK_CONFIGURATIONS = (_tiny(1.05, 0.1), _tiny(0.9, 1.0), _tiny(1.05, 0.1, 0.3))
QUICK = Size(lookahead=2, warm_lookups=10_000, most_warm=80, uncounted=2, steps=4)


def held_out(
    count: int,
    rows: tuple[int, int] = (50_000, 1_000_000),
    dims: Sequence[int] = (16, 32, 64, 128),
    batches: Sequence[int] = (128, 256, 512, 1024, 2048, 4096),
    widths: Sequence[int] = (16, 64, 128, 256, 512),
    seed: int = HELD_OUT_SEED,
) -> list[Configuration]:
    """Configurations of 1 to 12 tables of mixed sizes, lookups and skew, a third of them with caches. Jobs too large to be run in
    seconds are drawn anew."""
    rng = np.random.default_rng(seed)
    found: list[Configuration] = []
    while len(found) < count:
        tables = tuple(
            JobTable(round(math.exp(rng.uniform(*np.log(rows)))), round(rng.uniform(0.6, 1.3), 2), int(rng.integers(1, 11)))
            for _ in range(rng.integers(1, 13))
        )
        job = Job(tables, int(rng.choice(dims)), int(rng.choice(batches)))
        pool = round(math.exp(rng.uniform(math.log(0.02), math.log(0.8))), 3)
        cache = round(rng.uniform(0.05, 0.4), 2) if rng.random() < 1 / 3 else 0.0
        width = int(rng.choice(widths))
        if job.bytes <= _MOST_BYTES and job.batch_size * sum(t.pooling for t in tables) <= _MOST_LOOKUPS:
            found.append(Configuration(job, pool, cache, {f"top {width}": width}))
    return found


@dataclass(frozen=True)
class _Predicted:
    step_ms: float
    miss_ratio: float
    bottleneck: str
    busy_ms: list[float]


def predict(hardware: HardwareProfile, access: AccessProfile, c: Configuration, lookahead: int, dense_ms: float) -> _Predicted:
    """The model's step of one rank, and the misses of its pools, less those that neighbours spare, ÷ unique rows. Where so few batches
    use fewer rows than a pool or cache holds, what they miss is what they use for the first time."""
    model = PerfModel(hardware, dense_ms=dense_ms)
    busy, missed, unique = model.base_ms.copy(), 0.0, 0.0
    per_block = records_per_block(c.job.record_bytes)
    for table, pool_rows, cache_rows in zip(access.tables.values(), c.pool_rows, c.cache_rows, strict=True):
        use = ShardUse(
            rows=table.rows,
            lookups=table.lookups_per_batch,
            unique_rows=table.unique_rows_per_batch,
            weight_bytes=4 * c.job.dim,
            record_bytes=c.job.record_bytes,
            curve=table.miss_curve_for(c.job.batch_size, lookahead),
            ssd_curve=curve_over_ssd(table, c.job.batch_size, per_block, lookahead),
            table_rows=table.rows,
            in_flight=table.unique_rows(IN_FLIGHT_BATCHES * c.job.batch_size),
        )
        pool, behind = (rows if rows == table.rows else min(rows, table.used_rows) for rows in (pool_rows, pool_rows + cache_rows))
        busy += model.tiered(use, pool, behind - pool)[0]
        missed += float(use.misses(pool) - use.misses(behind) + use.reads(pool, behind - pool))
        unique += table.unique_rows_per_batch
    step = model.predict(busy[None])
    return _Predicted(step.step_ms, missed / unique, step.bottleneck, step.busy_ms[0].tolist())


def _trained(side: Side, batches: Batches, size: Size, c: Configuration, unique_rows: float) -> dict[str, dict[str, Any]]:
    """``unique_rows``: of a batch. What a batch that gave way asks for anew counts. The model around the tables is timed just before its
    steps are: the machine's processors are faster at one time and slower at another."""
    found: dict[str, dict[str, Any]] = {}
    first = min(size.warm(c), size.trained(c) // 2)
    side.run(batches, WARM_TOP, 0, first)
    missed = _missed(side.counters())
    if first < size.warm(c):
        side.run(batches, WARM_TOP, 0, size.warm(c) - first)
    for top, width in c.widths.items():
        dense_ms = c.job.dense_ms(width, batches.made[0], size.steps)
        done = side.run(batches, top, size.steps, size.uncounted)
        per_step = {name: value / size.steps for name, value in done.counters.items()}
        steps = {"step_ms": steady_ms(done.seconds), "steps_ms": [1e3 * s for s in done.seconds]}
        found[top] = {"dense_ms": dense_ms, **steps, **per_step}
    ratio = (_missed(side.counters()) - missed) / (size.trained(c) - first) / unique_rows
    return {top: {"miss_ratio": ratio, **measured} for top, measured in found.items()}


def _missed(counters: dict[str, int]) -> int:
    return counters["misses"] + counters["refetched_rows"]


def _of_configuration(c: Configuration, size: Size, hardware: HardwareProfile, root: Path, pmem: Path) -> list[dict[str, Any]]:
    shape = c.job.shape
    traces = c.job.traces(size.trained(c) + size.lookahead + PREFETCHED + 2)
    access = c.job.profile(traces)
    batches = MixedBatches(shape, traces)
    batches.make(0, len(batches))
    pool, cache = c.pool_rows, c.cache_rows
    side = tiered(
        "tiered",
        shape,
        {WARM_TOP: 16, **c.widths},
        pool,
        root / "home",
        PREFETCHED,
        size.lookahead,
        lambda table: (mtrains.PmemCache(str(pmem), cache[table]),) if cache[table] else (),
    )
    put_every_row(side)
    if c.pool_share == 1:
        fill_pools(side)
    before = read_in_place(root / "home")
    machines = {"predicted": as_read(hardware, before.reads_per_s), "predicted_as_calibrated": hardware}
    trained = _trained(side, batches, size, c, sum(t.unique_rows_per_batch for t in access.tables.values()))
    after = read_in_place(root / "home")
    side.close()
    device = {"calibrated": calibrated_reads(hardware), "before": asdict(before), "after": asdict(after)}
    lines = []
    held = zip(access.tables.values(), pool, cache, strict=True)
    full = all(p + below <= t.used_rows or p == t.rows for t, p, below in held)
    for top, measured in trained.items():
        dense_ms = measured.pop("dense_ms")
        predicted = {name: predict(machine, access, c, size.lookahead, dense_ms) for name, machine in machines.items()}
        lines.append(
            {"configuration": c.name, "top": top, "pool_rows": pool, "dense_ms": dense_ms, "measured": measured, "device": device}
            | {name: asdict(p) for name, p in predicted.items()}
            | {"pools_full": full, "tables": [vars(t) for t in c.job.tables], "dim": c.job.dim, "batch_size": c.job.batch_size}
        )
    return lines


def measure(
    root: Path, pmem: Path, hardware: HardwareProfile, configurations: Sequence[Configuration], size: Size = FULL
) -> dict[str, Any]:
    """``root``: a folder on the disk. ``pmem``: on memory or PMem. ``hardware``: of this machine, with both."""
    print(
        f"4 KiB reads a second by the calibration: {calibrated_reads(hardware):,.0f}; 'before' and 'after': of each job's home, in place, "
        "around its training"
    )
    print(
        f"{'':<75}{'step ms':>9}{'predicted':>10}{'ratio':>6}{'as calibrated':>14}{'ratio':>6}{'missed':>9}{'predicted':>10}"
        f"{'reads/s: before':>17}{'after':>9}"
    )
    lines: list[dict[str, Any]] = []
    with process_group():
        for c in configurations:
            with tempfile.TemporaryDirectory(dir=root) as folder:
                of_configuration = _of_configuration(c, size, hardware, Path(folder), pmem)
            for line in of_configuration:
                print(_line(line), flush=True)
            lines += of_configuration
    return {"hardware": hardware.machine, "lines": lines}


def _line(line: dict[str, Any]) -> str:
    measured, predicted, calibrated, device = (line[name] for name in ("measured", "predicted", "predicted_as_calibrated", "device"))
    restless = "" if device["before"]["settled"] and device["after"]["settled"] else " (not settled)"
    ratio, as_calibrated = (p["step_ms"] / measured["step_ms"] for p in (predicted, calibrated))
    return (
        f"{line['configuration']:<64}{line['top']:<11}{measured['step_ms']:>9.2f}{predicted['step_ms']:>10.2f}{ratio:>6.2f}"
        f"{calibrated['step_ms']:>14.2f}{as_calibrated:>6.2f}"
        f"{measured['miss_ratio']:>9.3f}{predicted['miss_ratio']:>10.3f}"
        f"{device['before']['reads_per_s']:>17,.0f}{device['after']['reads_per_s']:>9,.0f}  {predicted['bottleneck']}{restless}"
    )


def _drift(line: dict[str, Any]) -> float:
    """Faster ÷ slower of what the device read before and after the job."""
    before, after = (line["device"][when]["reads_per_s"] for when in ("before", "after"))
    return float(max(before, after) / min(before, after))


def figures(f: dict[str, Any], of: str, least: int) -> list[Figure]:
    """Errors over all lines, of which there are to be at least so many, with the device as it was read in place, and of steps as it was
    calibrated; and over those whose pools were full, and those whose device was the same after the job."""
    lines = f["lines"]
    made = [Figure(f"{of}: configurations", len(lines), f"≥ {least}", digits=0), *_errors(of, lines)]
    as_calibrated = _step_errors(lines, "predicted_as_calibrated")
    made.append(Figure(f"{of}, as calibrated: step, median error", median(as_calibrated), digits=3))
    made.append(Figure(f"{of}, as calibrated: step, worst error", max(as_calibrated), digits=3))
    full, steady = [line for line in lines if line["pools_full"]], [line for line in lines if _drift(line) <= DRIFTED]
    made.append(Figure(f"{of}: configurations whose device drifted by more than {DRIFTED} times", len(lines) - len(steady), digits=0))
    for kind, some in (("with full pools", full), ("whose device did not drift", steady)):
        if len(some) not in (0, len(lines)):
            made += _errors(f"{of}, {len(some)} {kind}", some)
    return made


def _step_errors(lines: Sequence[dict[str, Any]], prediction: str) -> list[float]:
    return [abs(line[prediction]["step_ms"] / line["measured"]["step_ms"] - 1) for line in lines]


def _errors(of: str, lines: Sequence[dict[str, Any]]) -> list[Figure]:
    steps = _step_errors(lines, "predicted")
    ratios = [abs(line["predicted"]["miss_ratio"] - line["measured"]["miss_ratio"]) for line in lines]
    return [
        Figure(f"{of}: step, median error", median(steps), "≤ 0.15", digits=3),
        Figure(f"{of}: step, worst error", max(steps), "≤ 0.40", digits=3),
        Figure(f"{of}: miss ratio, mean absolute error", statistics.mean(ratios), "≤ 0.02", digits=4),
        Figure(f"{of}: miss ratio, worst error", max(ratios), digits=4),
    ]
