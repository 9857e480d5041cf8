"""What the planner's model predicts, against training: step times and miss ratios of DLRMs of many configurations, by the real kernel.

For each configuration:

    batches     drawn for it; their ids are profiled as ``mtrains profile`` does, all of them
    dense       forward, backward and optimizer of the model on constant pooled rows, timed alone: what a user would time
    prediction  ``PerfModel`` on the calibration, the curves and the dense time
    training    through ``TieredTrainPipeline``: batches with a tiny top until pools are full and full of changed rows, then with
                the top in question; the median step of those counted

Rows are in their homes before, as in a job that has seen all of them. The lookahead is fixed, so that the window is full when steps
are counted.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec_mtrains.planner import HardwareProfile, MissCurve, TableAccess
from torchrec_mtrains.planner.charges import records_per_block
from torchrec_mtrains.planner.neighbours import curve_over_ssd
from torchrec_mtrains.planner.perf_model import PerfModel, ShardUse

import torchrec_mtrains as mtrains
from _common import Figure, ZipfIds, median
from _train_dense import Tops
from _train_sides import DENSE_FEATURES, Batches, Processor, Shape, Side, fill_pools, put_every_row, tiered
from _train_traces import Trace
from torchrec_mtrains.data import TableShape
from torchrec_mtrains.job_model import ModelOptions, build_model, dense_optimizer
from torchrec_mtrains.process_group import process_group
from torchrec_mtrains.profiling import ProfileOptions, TableMeter

PREFETCHED = 2
WARM_TOP = "warm"
STATE_BYTES = 4  # of row-wise Adagrad, a row


@dataclass(frozen=True)
class Configuration:
    """``tables`` alike tables; pools of ``pool_share`` of the rows, caches on PMem of ``cache_share``; tops by name and width."""

    tables: int
    exponent: float
    batch_size: int
    pool_share: float
    cache_share: float = 0.0

    @property
    def name(self) -> str:
        cache = f" + {self.cache_share:.0%} cache" if self.cache_share else ""
        return f"{self.tables} × zipf {self.exponent}, batch {self.batch_size}, {self.pool_share:.0%}{cache}"


@dataclass(frozen=True)
class Size:
    """Of every configuration. ``warm_lookups``: of a table, before steps are counted, in ``most_warm`` batches at most."""

    rows: int
    dim: int
    pooling: int
    widths: dict[str, int]
    lookahead: int
    warm_lookups: int
    most_warm: int
    uncounted: int
    steps: int

    def shape(self, c: Configuration) -> Shape:
        return Shape((self.rows,) * c.tables, self.dim, c.batch_size, self.pooling)

    def warm(self, c: Configuration) -> int:
        """Batches; the window must be full."""
        return max(self.lookahead + PREFETCHED + 1, min(self.most_warm, self.warm_lookups // (c.batch_size * self.pooling)))


CONFIGURATIONS = (
    *(
        Configuration(tables, exponent, batch, share)
        for exponent in (0.9, 1.05, 1.2)
        for tables, batch, share in ((8, 256, 0.02), (8, 256, 0.1), (4, 1024, 0.1), (4, 1024, 0.5), (2, 4096, 0.4))
    ),
    Configuration(4, 1.05, 1024, 1.0),
    *(Configuration(4, exponent, 1024, 0.1, 0.3) for exponent in (0.9, 1.05)),
)
FULL = Size(
    rows=150_000, dim=64, pooling=4, widths={"small top": 16, "large top": 512}, lookahead=8, warm_lookups=800_000, most_warm=300,
    uncounted=6, steps=20,
)  # fmt: skip
QUICK = Size(
    rows=5_000, dim=16, pooling=2, widths={"small top": 16}, lookahead=2, warm_lookups=10_000, most_warm=80, uncounted=2, steps=4
)  # fmt: skip


def _traces(c: Configuration, size: Size, batches: int) -> list[Trace]:
    made = []
    for table in range(c.tables):
        ids = ZipfIds(size.rows, c.exponent, torch.Generator().manual_seed(table))
        lookups = c.batch_size * size.pooling
        made.append(Trace(f"t{table}", size.rows, ids.draw(batches * lookups).view(batches, lookups).numpy()))
    return made


def _profiled(traces: Sequence[Trace], batch_size: int) -> list[TableAccess]:
    found = []
    for trace in traces:
        meter = TableMeter(
            TableShape(trace.name, trace.name, trace.rows), batch_size, len(trace.ids), ProfileOptions(prefetch_depth=PREFETCHED)
        )
        for ids in trace.ids:
            meter.push(np.ascontiguousarray(ids))
        found.append(meter.access(ended=True))
    return found


class _ConstantRows(nn.Module):
    """Pooled rows of every table that no table was asked for. Shape (batch, tables, dim)."""

    def __init__(self, batch_size: int, tables: int, dim: int) -> None:
        super().__init__()
        self.rows = torch.rand(batch_size, tables, dim).requires_grad_()

    def forward(self, _features: Any) -> torch.Tensor:
        return self.rows * 1.0


def dense_ms(shape: Shape, width: int, batches: Batches, steps: int) -> float:
    """A training step of the model without its tables."""
    options: ModelOptions = shape.model_options
    model = build_model(shape.tables, DENSE_FEATURES, options)
    model.model.over_arch = Tops(shape.top_inputs, {"top": width})
    model.model.sparse_arch = _ConstantRows(shape.batch_size, len(shape.rows), shape.dim)
    optimizer = dense_optimizer(model, options)  # type: ignore[arg-type]
    times = []
    batch = next(batches.from_number(0))
    for _ in range(steps):
        start = perf_counter()
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        optimizer.step()
        times.append(perf_counter() - start)
    return 1e3 * median(times[steps // 4 :])


@dataclass(frozen=True)
class _Predicted:
    step_ms: float
    miss_ratio: float
    bottleneck: str
    busy_ms: list[float]


def _curve(table: TableAccess, batch_size: int, record_bytes: int, pool_rows: int, cache_rows: int, lookahead: int) -> MissCurve:
    """The profile's, less what neighbours spare of the rows that are read from the SSD: those that neither pool nor cache has."""
    spared = curve_over_ssd(table, batch_size, records_per_block(record_bytes), lookahead)
    if not cache_rows:
        return spared
    alone = table.miss_curve_for(batch_size, lookahead)
    most = alone.misses(pool_rows + cache_rows) - spared.misses(pool_rows + cache_rows)
    misses = zip(alone.misses_per_batch, spared.misses_per_batch, strict=True)
    return replace(spared, misses_per_batch=tuple(max(without - most, with_) for without, with_ in misses))


def predict(
    hardware: HardwareProfile,
    access: Sequence[TableAccess],
    shape: Shape,
    pool: Sequence[int],
    cache_rows: int,
    lookahead: int,
    dense: float,
) -> _Predicted:
    """The model's step of one rank, and the misses of its pools ÷ unique rows."""
    model = PerfModel(hardware, dense_ms=dense)
    busy, missed, unique = model.base_ms.copy(), 0.0, 0.0
    for table, pool_rows in zip(access, pool, strict=True):
        weights = 4 * shape.dim
        curve = _curve(table, shape.batch_size, weights + STATE_BYTES, pool_rows, cache_rows, lookahead)
        use = ShardUse(
            rows=table.rows,
            lookups=table.lookups_per_batch,
            unique_rows=table.unique_rows_per_batch,
            weight_bytes=weights,
            record_bytes=weights + STATE_BYTES,
            curve=curve,
            table_rows=table.rows,
        )
        busy += model.tiered(use, pool_rows, cache_rows)[0]
        missed += float(use.misses(pool_rows))
        unique += table.unique_rows_per_batch
    step = model.predict(busy[None])
    return _Predicted(step.step_ms, missed / unique, step.bottleneck, step.busy_ms[0].tolist())


def _trained(side: Side, batches: Batches, size: Size, warm: int, processor: Processor) -> dict[str, dict[str, float]]:
    side.run(batches, WARM_TOP, 0, warm, processor)
    found = {}
    for top in size.widths:
        done = side.run(batches, top, size.steps, size.uncounted, processor)
        per_step = {name: value / size.steps for name, value in done.counters.items()}
        ratio = per_step["misses"] / per_step["unique_rows"]
        found[top] = {"step_ms": 1e3 * statistics.median(done.seconds), "miss_ratio": ratio, **per_step}
    return found


def _of_configuration(c: Configuration, size: Size, hardware: HardwareProfile, root: Path, pmem: Path) -> list[dict[str, Any]]:
    shape, warm = size.shape(c), size.warm(c)
    counted = warm + len(size.widths) * (size.uncounted + size.steps)
    traces = _traces(c, size, counted + size.lookahead + PREFETCHED + 2)
    access = _profiled(traces, c.batch_size)
    batches = Batches(shape)
    batches.append(traces)
    batches.make(0, len(batches))
    pool, cache_rows = shape.pool_rows(c.pool_share), round(c.cache_share * size.rows)
    caches = (lambda table: (mtrains.PmemCache(str(pmem), cache_rows),)) if cache_rows else (lambda table: ())
    widths = {WARM_TOP: 16, **size.widths}
    side = tiered("tiered", shape, widths, pool, root / "home", PREFETCHED, size.lookahead, caches)
    put_every_row(side)
    if c.pool_share == 1:
        fill_pools(side)
    trained = _trained(side, batches, size, warm, Processor())
    side.close()
    lines = []
    for top, measured in trained.items():
        dense = dense_ms(shape, size.widths[top], batches, size.steps)
        p = predict(hardware, access, shape, pool, cache_rows, size.lookahead, dense)
        lines.append(
            {"configuration": c.name, "top": top, "pool_rows": pool[0], "dense_ms": dense, "measured": measured}
            | {"predicted": {"step_ms": p.step_ms, "miss_ratio": p.miss_ratio}, "bottleneck": p.bottleneck, "busy_ms": p.busy_ms}
        )
    return lines


def measure(root: Path, pmem: Path, hardware: HardwareProfile, configurations: Sequence[Configuration], size: Size) -> dict[str, Any]:
    """``root``: a folder on the disk. ``pmem``: on memory or PMem. ``hardware``: of this machine, with both."""
    print(f"{'':<57}{'step ms':>9}{'predicted':>10}{'ratio':>6}{'missed':>9}{'predicted':>10}")
    lines: list[dict[str, Any]] = []
    with process_group():
        for c in configurations:
            with tempfile.TemporaryDirectory(dir=root) as folder:
                of_configuration = _of_configuration(c, size, hardware, Path(folder), pmem)
            for line in of_configuration:
                print(_line(line), flush=True)
            lines += of_configuration
    return {"hardware": hardware.machine, "rows": size.rows, "dim": size.dim, "lines": lines}


def _line(line: dict[str, Any]) -> str:
    measured, predicted = line["measured"], line["predicted"]
    ratio = predicted["step_ms"] / measured["step_ms"]
    return (
        f"{line['configuration']:<46}{line['top']:<11}{measured['step_ms']:>9.2f}{predicted['step_ms']:>9.2f}{ratio:>7.2f}"
        f"{measured['miss_ratio']:>9.3f}{predicted['miss_ratio']:>8.3f}  {line['bottleneck']}"
    )


def figures(f: dict[str, Any]) -> list[Figure]:
    """Errors over all lines."""
    steps = [abs(line["predicted"]["step_ms"] / line["measured"]["step_ms"] - 1) for line in f["lines"]]
    ratios = [abs(line["predicted"]["miss_ratio"] - line["measured"]["miss_ratio"]) for line in f["lines"]]
    return [
        Figure("predictions: configurations", len(steps), "≥ 30", digits=0),
        Figure("predictions: step, median error", median(steps), "≤ 0.15", digits=3),
        Figure("predictions: step, worst error", max(steps), "≤ 0.40", digits=3),
        Figure("predictions: miss ratio, mean absolute error", statistics.mean(ratios), "≤ 0.02", digits=4),
        Figure("predictions: miss ratio, worst error", max(ratios), digits=4),
    ]
