"""Jobs of uneven tables: a DLRM, its batches, and what a profile and a stopwatch say of them before it trains.

A table's ids follow Zipf's law over its rows, scattered by a permutation; every table and every stream of batches has a seed of its own,
so that a job is profiled on batches that it does not train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.planner.types import ShardingOption
from torchrec.sparse.jagged_tensor import KeyedTensor
from torchrec_mtrains.planner import AccessProfile
from torchrec_mtrains.planner.alike_shards import copied
from torchrec_mtrains.planner.perf_model import PerfModel, StepPrediction
from torchrec_mtrains.planner.search import predicted
from torchrec_mtrains.planner.sharding_options import TieredShardingOption

from _common import ZipfIds, median
from _train_dense import Tops
from _train_sides import DENSE_FEATURES, Batches, Shape
from _train_traces import Trace
from torchrec_mtrains.data import TableShape
from torchrec_mtrains.data.source import make_batch
from torchrec_mtrains.job_model import ModelOptions, build_model, dense_optimizer
from torchrec_mtrains.profiling import ProfileOptions, TableMeter

PREFETCHED = 2
STATE_BYTES = 4  # of row-wise Adagrad, a row
_DENSE_ROUNDS = 6
_STRETCH = 4  # steps


@dataclass(frozen=True)
class JobTable:
    """``pooling``: lookups of a sample."""

    rows: int
    exponent: float
    pooling: int


@dataclass(frozen=True)
class MixedShape(Shape):
    """A shape whose tables have poolings of their own; ``pooling`` is the largest."""

    poolings: tuple[int, ...] = ()

    @property
    def tables(self) -> list[TableShape]:
        return [TableShape(f"t{i}", f"f{i}", rows, of) for i, (rows, of) in enumerate(zip(self.rows, self.poolings, strict=True))]


class MixedBatches(Batches):
    """Batches of a mixed shape."""

    def __init__(self, shape: MixedShape, traces: Sequence[Trace]) -> None:
        super().__init__(shape)
        self._poolings, self.ids = shape.poolings, [trace.ids for trace in traces]

    def _batch(self, number: int) -> Batch:
        generator, size = torch.Generator().manual_seed(number), self.shape.batch_size
        return make_batch(
            [t.feature for t in self.shape.tables],
            np.concatenate([ids[number] for ids in self.ids]),
            np.repeat(np.array(self._poolings, np.int32), size),
            torch.rand(size, DENSE_FEATURES, generator=generator).numpy(),
            torch.randint(2, (size,), generator=generator).float().numpy(),
        )


@dataclass(frozen=True)
class Job:
    """Tables of one dimension under a DLRM."""

    tables: tuple[JobTable, ...]
    dim: int
    batch_size: int

    @property
    def shape(self) -> MixedShape:
        poolings = tuple(t.pooling for t in self.tables)
        return MixedShape(tuple(t.rows for t in self.tables), self.dim, self.batch_size, max(poolings), poolings)

    @property
    def record_bytes(self) -> int:
        return 4 * self.dim + STATE_BYTES

    @property
    def bytes(self) -> int:
        return sum(t.rows for t in self.tables) * self.record_bytes

    def traces(self, batches: int, stream: int = 0) -> list[Trace]:
        """One a table. Another ``stream``: other lookups of the same law, over the same rows."""
        made = []
        for i, table in enumerate(self.tables):
            zipf = ZipfIds(table.rows, table.exponent, torch.Generator().manual_seed(i))
            zipf.generator = torch.Generator().manual_seed(1_000 * (stream + 1) + i)
            lookups = self.batch_size * table.pooling
            made.append(Trace(f"t{i}", table.rows, zipf.draw(batches * lookups).view(batches, lookups).numpy()))
        return made

    def profile(self, traces: Sequence[Trace]) -> AccessProfile:
        """As ``mtrains profile`` makes it."""
        tables = {}
        for table, trace in zip(self.shape.tables, traces, strict=True):
            meter = TableMeter(table, self.batch_size, len(trace.ids), ProfileOptions(prefetch_depth=PREFETCHED))
            for ids in trace.ids:
                meter.push(np.ascontiguousarray(ids))
            tables[table.name] = meter.access(ended=True)
        return AccessProfile(tables, "zipf", "")

    def dense_ms(self, width: int, batch: Batch, steps: int) -> float:
        """A training step of the model around its tables, which give constant pooled rows, timed alone: what a user would time. The least
        of ``_DENSE_ROUNDS`` medians: what else runs on the machine is not the model's."""
        options: ModelOptions = self.shape.model_options
        model = build_model(self.shape.tables, DENSE_FEATURES, options)
        model.model.over_arch = Tops(self.shape.top_inputs, {"top": width})
        model.model.sparse_arch.embedding_bag_collection = _ConstantRows(self.batch_size, [t.feature for t in self.shape.tables], self.dim)
        optimizer = dense_optimizer(model, options)  # type: ignore[arg-type]
        medians = []
        for _ in range(_DENSE_ROUNDS):
            times = []
            for _ in range(steps):
                start = perf_counter()
                optimizer.zero_grad()
                loss, _ = model(batch)
                loss.backward()
                optimizer.step()
                times.append(perf_counter() - start)
            medians.append(median(times))
        return 1e3 * min(medians)


def steady_ms(seconds: Sequence[float]) -> float:
    """Milliseconds a step: the median of what stretches of ``_STRETCH`` steps took on average. Not of steps: where some batches
    find their rows and others wait for theirs, steps are long and short in turn."""
    stretches = [seconds[i : i + _STRETCH] for i in range(0, len(seconds) - len(seconds) % _STRETCH, _STRETCH)]
    return 1e3 * median([sum(s) / len(s) for s in stretches or [seconds]])


def predicted_by(model: PerfModel, options: Sequence[ShardingOption], world_size: int = 1) -> StepPrediction:
    """The step of a placed plan by another model than the one that it was made with."""
    moved = [copied(o) for o in options]
    for option in moved:
        if isinstance(option, TieredShardingOption):
            option.model = model
    return predicted(moved, model, world_size)


class _ConstantRows(nn.Module):
    """Pooled rows of every table that no table was asked for: (batch, tables × dim)."""

    def __init__(self, batch_size: int, features: list[str], dim: int) -> None:
        super().__init__()
        self.features, self.dim = features, dim
        self.rows = torch.rand(batch_size, len(features) * dim).requires_grad_()

    def forward(self, _features: Any) -> KeyedTensor:
        return KeyedTensor(self.features, [self.dim] * len(self.features), self.rows * 1.0)
