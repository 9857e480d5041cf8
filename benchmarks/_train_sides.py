"""Sides of a comparison: one DLRM with its tables in memory (stock FUSED) or in tiers. All begin alike and train the same batches.

Rows of a tiered side's home are put before training, so that a row that is missed is read from the device and nothing is generated.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer
from torchrec_mtrains.kernels import durability
from torchrec_mtrains.kernels.spans import span
from torchrec_mtrains.kernels.tiered_tbe import TieredTBE

import torchrec_mtrains as mtrains
from _train_dense import Tops
from _train_traces import Trace
from torchrec_mtrains.data import TableShape
from torchrec_mtrains.data.source import make_batch
from torchrec_mtrains.groups import tiered_groups
from torchrec_mtrains.job_model import EBC_PATH, ModelOptions, build_model, dense_optimizer, fused_params

DENSE_FEATURES = 13
ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Shape:
    """Tables by their rows; samples of a batch; lookups of a sample in each table."""

    rows: tuple[int, ...]
    dim: int
    batch_size: int
    pooling: int

    @property
    def tables(self) -> list[TableShape]:
        return [TableShape(f"t{i}", f"f{i}", rows, self.pooling) for i, rows in enumerate(self.rows)]

    @property
    def lookups(self) -> int:
        """Of a table in a batch."""
        return self.batch_size * self.pooling

    @property
    def model_options(self) -> ModelOptions:
        return ModelOptions(embedding_dim=self.dim, learning_rate=0.01, dense_learning_rate=0.001)

    @property
    def top_inputs(self) -> int:
        """Of the top MLP: a dense embedding, and the product of each pair of features."""
        features = len(self.rows) + 1
        return self.dim + features * (features - 1) // 2

    def pool_rows(self, share: float) -> list[int]:
        """Of each table, but never fewer than a batch may need."""
        return [min(rows, max(int(rows * share), 2 * self.lookups)) for rows in self.rows]


class Batches:
    """Batches by their number: those of one trace after those of another. Made ahead of use, so that steps do not wait for them."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.ids = shape, [np.empty((0, shape.lookups), np.int64) for _ in shape.rows]
        self.made: dict[int, Batch] = {}

    def append(self, traces: Sequence[Trace], first: int = 0) -> None:
        """One trace a table, from its batch ``first`` on."""
        self.ids = [np.concatenate([old, trace.ids[first:]]) for old, trace in zip(self.ids, traces, strict=True)]

    def __len__(self) -> int:
        return len(self.ids[0])

    def make(self, first: int, last: int) -> None:
        """Makes these; forgets those before."""
        self.made = {n: self.made[n] if n in self.made else self._batch(n) for n in range(first, min(last, len(self)))}

    def _batch(self, number: int) -> Batch:
        generator, size = torch.Generator().manual_seed(number), self.shape.batch_size
        return make_batch(
            [t.feature for t in self.shape.tables],
            np.concatenate([ids[number] for ids in self.ids]),
            np.full(len(self.ids) * size, self.shape.pooling, np.int32),
            torch.rand(size, DENSE_FEATURES, generator=generator).numpy(),
            torch.randint(2, (size,), generator=generator).float().numpy(),
        )

    def from_number(self, first: int) -> Iterator[Batch]:
        for number in itertools.count(first):
            if number >= len(self):
                return
            yield self.made[number] if number in self.made else self._batch(number)


def processor_seconds() -> dict[str, float]:
    """Processor time by who spent it: the main thread, native threads (by their names), torch's workers and what else there is.

    Since the threads began; those that have ended are forgotten."""
    spent = {"main": 0.0, "workers": 0.0, "native": 0.0}
    for thread in Path("/proc/self/task").iterdir():
        name = (thread / "comm").read_text()
        who = "main" if thread.name == str(os.getpid()) else "native" if name.startswith("mtrains-") else "workers"
        spent[who] += int((thread / "schedstat").read_text().split()[0]) * 1e-9
    return spent


def until_native_threads_rest() -> None:
    """For a tenth of a second, in which they spend less than a millisecond. After ten seconds it is an error: they have no such work."""
    until = perf_counter() + 10
    while perf_counter() < until:
        before = processor_seconds()["native"]
        sleep(0.1)
        if processor_seconds()["native"] - before < 1e-3:
            return
    raise RuntimeError("native threads did not rest for 10 s after a side's turn")


@dataclass
class Steps:
    """What a side did in a stretch of steps. Counters are of the whole stretch; a side in memory has none."""

    losses: torch.Tensor
    seconds: list[float]
    cpu_seconds: dict[str, float]
    counters: dict[str, int]


def plan_of(shape: Shape, sharding: Callable[[int, dict[str, Any]], ParameterSharding]) -> ShardingPlan:
    """Every table whole on rank 0, sharded as ``sharding`` says of its number and where it is."""
    plan = EmbeddingModuleShardingPlan()
    for i, table in enumerate(shape.tables):
        shard = ShardMetadata(shard_offsets=[0, 0], shard_sizes=[table.rows, shape.dim], placement="rank:0/cpu")
        plan[table.name] = sharding(i, {"sharding_type": "table_wise", "ranks": [0], "sharding_spec": EnumerableShardingSpec([shard])})
    return ShardingPlan({EBC_PATH: plan})


class Side:
    """A model and how it is stepped: by a plain loop, or by ``TieredTrainPipeline`` where there is anything to look ahead to."""

    def __init__(
        self,
        name: str,
        shape: Shape,
        widths: dict[str, int],
        plan: ShardingPlan,
        sharders: list[Any],
        prefetch_depth: int,
        lookahead: int | None,
        zeros: bool = False,
    ) -> None:
        """``zeros``: what tables begin with instead of the values that are made for each row, which takes a while for all of them."""
        self.name, self.shape = name, shape
        model = build_model(shape.tables, DENSE_FEATURES, shape.model_options)
        if zeros:
            for config in model.model.sparse_arch.embedding_bag_collection.embedding_bag_configs():
                config.init_fn = nn.init.zeros_
        model.model.over_arch = self.tops = Tops(shape.top_inputs, widths)
        self.dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders, init_data_parallel=False)
        self.optimizer = CombinedOptimizer([self.dmp.fused_optimizer, dense_optimizer(self.dmp, shape.model_options)])
        self.groups: list[TieredTBE] = tiered_groups(self.dmp)
        self.pipeline: Any = None
        self.source: Iterator[Batch] | None = None
        if prefetch_depth:
            self.pipeline = mtrains.TieredTrainPipeline(
                self.dmp, self.optimizer, torch.device("cpu"), prefetch_depth=prefetch_depth, lookahead=lookahead
            )

    def _plain_step(self, batches: Iterator[Batch]) -> torch.Tensor:
        self.optimizer.zero_grad()
        with span("forward"):
            loss, (detached, _logits, _labels) = self.dmp(next(batches))
        with span("backward"):
            loss.backward()
        with span("optimizer"):
            self.optimizer.step()
        return detached

    def step(self) -> torch.Tensor:
        """The loss of the next batch."""
        assert self.source is not None
        return self.pipeline.progress(self.source)[0] if self.pipeline else self._plain_step(self.source)

    def run(self, batches: Batches, top: str, steps: int, uncounted: int) -> Steps:
        """Trains the next batches; the first ``uncounted`` of them are left out of times and counters.

        Returns when native threads rest: what this side reads ahead is not to run beside the next one."""
        self.source = self.source or batches.from_number(0)
        self.tops.current = top
        losses, times = [self.step() for _ in range(uncounted)], []
        before, cpu = self.counters(), processor_seconds()
        for _ in range(steps):
            start = perf_counter()
            losses.append(self.step())
            times.append(perf_counter() - start)
        spent = {who: now - cpu[who] for who, now in processor_seconds().items()}
        counted = {k: v - before[k] for k, v in self.counters().items()}
        until_native_threads_rest()
        return Steps(torch.stack(losses), times, spent, counted)

    def counters(self) -> dict[str, int]:
        """Sums over tables and volumes."""
        if not self.groups:
            return {}
        of_tables = [t for g in self.groups for t in g.stats()]
        of_volumes = [v for g in self.groups for v in g.volume_stats()]
        names = ("lookups", "unique_rows", "misses", "admitted_rows", "refetched_rows", "write_backs")
        of_pools = {name: sum(t[name] for t in of_tables) for name in names}
        return of_pools | {name: sum(int(v[name]) for v in of_volumes) for name in ("read_ios", "neighbour_rows", "write_bytes")}

    def close(self) -> None:
        """Lets go of the volumes; batches in flight are forgotten."""
        if self.pipeline:
            self.pipeline.reset()
            self.pipeline.detach()
        durability.close(self.groups)

    def table(self, number: int) -> torch.Tensor:
        """The weights of a table in memory."""
        (shard,) = self.dmp.state_dict()[f"{EBC_PATH}.embedding_bags.{self.shape.tables[number].name}.weight"].local_shards()
        return shard.tensor

    def warm(self, batches: Sequence[Batch]) -> None:
        """Has the pools see batches without training."""
        with torch.no_grad():
            for batch in batches:
                self.dmp(batch)


def in_memory(shape: Shape, widths: dict[str, int], values_of: Side) -> Side:
    """Stock FUSED, with the rows that another side has now."""
    plan = plan_of(shape, lambda _, where: ParameterSharding(**where, compute_kernel="fused"))
    side = Side(
        "memory", shape, widths, plan, [EmbeddingBagCollectionSharder(fused_params=fused_params(shape.model_options))], 0, 0, zeros=True
    )
    (group,) = values_of.groups
    for i, table in enumerate(shape.tables):
        weights = side.table(i)
        for first in range(0, table.rows, ROWS_AT_ONCE):
            rows = weights[first : first + ROWS_AT_ONCE]
            rows.copy_(group.read_rows(i, first, len(rows))[0])
    return side


def tiered(
    name: str,
    shape: Shape,
    widths: dict[str, int],
    pool_rows: list[int],
    folder: Path,
    prefetch_depth: int,
    lookahead: int | None,
    caches: Callable[[int], tuple[mtrains.PmemCache, ...]] = lambda table: (),
) -> Side:
    """Tables in pools over an SSD, nothing put yet. ``caches``: of each table, between its pool and the SSD."""
    folder.mkdir()
    record_bytes = shape.dim * 4 + 4
    home = mtrains.SsdHome((str(folder),), capacity_bytes=2 * sum(shape.rows) * (record_bytes + 36) + (256 << 20))
    plan = plan_of(
        shape, lambda i, where: mtrains.TieredParameterSharding(**where, tiers=mtrains.TierChain(pool_rows[i], (*caches(i), home)))
    )
    sharders: list[nn.Module] = mtrains.sharders(fused_params(shape.model_options))
    return Side(name, shape, widths, plan, sharders, prefetch_depth, lookahead)


def put_every_row(*sides: Side) -> None:
    """Every row is in its home, as it is, in an order of its own: what lies in one block has nothing to do with use. Sides take turns, as
    some devices read what was written last faster."""
    for _ in itertools.zip_longest(*map(_putting, sides)):
        pass


def _putting(side: Side) -> Iterator[None]:
    for group in side.groups:
        group.flush()
        for home in group._home_tables:
            out = torch.empty(ROWS_AT_ONCE, home.record_bytes, dtype=torch.uint8)
            for ids in torch.arange(home.row_count).split(ROWS_AT_ONCE):
                home.get(ids, out[: len(ids)])
                home.put(ids, out[: len(ids)])
                yield


def fill_pools(side: Side) -> None:
    """Every row is in its pool."""
    for group in side.groups:
        for i, table in enumerate(group.tables):
            group.warm(i, np.arange(table.rows, dtype=np.int64))
