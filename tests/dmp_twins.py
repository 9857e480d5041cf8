"""Pairs of ``DistributedModelParallel`` models under one plan: tables in tiers, and the same tables in stock FUSED."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from hypothesis import strategies as st
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

import torchrec_mtrains as mtrains
from torchrec_mtrains import DdrHome, SsdHome, TierChain


@dataclass
class Table:
    """One table of a job. ``rank`` is where a table-wise one lives; one that is not ``tiered`` is FUSED on both sides."""

    rows: int
    dim: int
    features: list[str]
    pool_rows: int
    pooling: PoolingType = PoolingType.SUM
    sharding: str = "table_wise"
    rank: int = 0
    tiered: bool = True


@dataclass
class Job:
    """What both sides of an equality test are built from and trained on."""

    tables: list[Table]
    optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD
    data_type: DataType = DataType.FP32
    weighted: bool = False
    batch_size: int = 2
    max_length: int = 3
    steps: int = 3
    prefetch_depths: list[int] = field(default_factory=lambda: [0, 0, 0])
    seed: int = 0
    on_ssd: bool = False
    id_dtype: torch.dtype = torch.int64

    def fused_params(self) -> dict[str, object]:
        """Equal on both sides."""
        return {"optimizer": self.optimizer, "learning_rate": 0.1, "eps": 1e-3, "stochastic_rounding": False}

    def configs(self) -> list[EmbeddingBagConfig]:
        """Names are t0, t1, …; initial values are TorchRec's default."""
        return [
            EmbeddingBagConfig(
                name=f"t{i}",
                embedding_dim=t.dim,
                num_embeddings=t.rows,
                feature_names=list(t.features),
                pooling=t.pooling,
                data_type=self.data_type,
            )
            for i, t in enumerate(self.tables)
        ]

    def features(self) -> dict[str, int]:
        """The rows that each feature's ids may name: those of the smallest table that has it."""
        rows: dict[str, int] = {}
        for table in self.tables:
            for feature in table.features:
                rows[feature] = min(rows.get(feature, table.rows), table.rows)
        return rows


@st.composite
def jobs(draw: st.DrawFn, world_size: int) -> Job:
    """1-4 tables, pools from the smallest legal: what one batch of all ranks can touch at most."""
    count = draw(st.integers(1, 4))
    batch_size, max_length = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    shared = draw(st.booleans())
    tables = []
    for i in range(count):
        features = [f"f{i}_{k}" for k in range(draw(st.integers(1, 2)))]
        if shared and i:
            features.append("f0_0")
        tables.append(
            Table(
                rows=draw(st.integers(world_size, 60)),  # stock FUSED needs a row on every rank of a row-wise table
                dim=4 * draw(st.integers(1, 4)),
                features=features,
                pool_rows=max(1, len(features) * batch_size * max_length * world_size) + draw(st.sampled_from([0, 0, 1, 5])),
                pooling=draw(st.sampled_from([PoolingType.SUM, PoolingType.MEAN])),
                sharding=draw(st.sampled_from(["table_wise", "row_wise"])),
                rank=draw(st.integers(0, world_size - 1)),
                tiered=draw(st.sampled_from([True, True, True, False])),
            )
        )
    tables[draw(st.integers(0, count - 1))].tiered = True
    steps = draw(st.integers(1, 8))
    return Job(
        tables=tables,
        optimizer=draw(st.sampled_from([EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD])),
        data_type=draw(st.sampled_from([DataType.FP32, DataType.FP16])),
        weighted=draw(st.booleans()),
        batch_size=batch_size,
        max_length=max_length,
        steps=steps,
        prefetch_depths=draw(st.lists(st.integers(0, 3), min_size=steps, max_size=steps)),
        seed=draw(st.integers(0, 2**31)),
        on_ssd=draw(st.booleans()),
        id_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
    )


def shards(table: Table, world_size: int) -> list[ShardMetadata]:
    """TorchRec's: equal blocks of rows, the last ones shorter or empty; or the whole table on its rank."""
    if table.sharding == "table_wise":
        return [ShardMetadata(shard_offsets=[0, 0], shard_sizes=[table.rows, table.dim], placement=f"rank:{table.rank}/cpu")]
    block = -(-table.rows // world_size)
    starts = [min(table.rows, r * block) for r in range(world_size)]
    return [
        ShardMetadata(shard_offsets=[s, 0], shard_sizes=[min(block, table.rows - s), table.dim], placement=f"rank:{r}/cpu")
        for r, s in enumerate(starts)
    ]


def plan(job: Job, tiered: bool, home: SsdHome | DdrHome = DdrHome()) -> ShardingPlan:  # noqa: B008
    """The hand-written plan for either side."""
    world_size, result = dist.get_world_size(), EmbeddingModuleShardingPlan()
    for i, table in enumerate(job.tables):
        where = {
            "sharding_type": table.sharding,
            "ranks": [table.rank] if table.sharding == "table_wise" else list(range(world_size)),
            "sharding_spec": EnumerableShardingSpec(shards(table, world_size)),
        }
        if tiered and table.tiered:
            result[f"t{i}"] = mtrains.TieredParameterSharding(**where, tiers=TierChain(table.pool_rows, (home,)))
        else:
            result[f"t{i}"] = ParameterSharding(**where, compute_kernel="fused")
    return ShardingPlan({"": result})


def sharded(job: Job, tiered: bool, home: SsdHome | DdrHome = DdrHome(), **fused_params: object) -> DistributedModelParallel:  # noqa: B008
    """One side, with TorchRec's default initial values: a tiered table's are keyed by its name."""
    collection = EmbeddingBagCollection(tables=job.configs(), is_weighted=job.weighted, device=torch.device("meta"))
    return DistributedModelParallel(
        collection,
        device=torch.device("cpu"),
        plan=plan(job, tiered, home),
        sharders=mtrains.sharders({**job.fused_params(), **fused_params}),
    )


def initial_values(job: Job) -> dict[str, torch.Tensor]:
    """What every table starts with on the tiered side, as a state dict of whole tables."""
    dtype = torch.float16 if job.data_type is DataType.FP16 else torch.float32
    return {
        f"embedding_bags.t{i}.weight": mtrains.uniform_init_fn(f"t{i}", t.rows, t.dim)(torch.empty(t.rows, t.dim, dtype=dtype))
        for i, t in enumerate(job.tables)
    }


def batch(job: Job, generator: torch.Generator) -> KeyedJaggedTensor:
    """This rank's batch; half of the ids come from a hot tenth."""
    lengths, ids = [], []
    for rows in job.features().values():
        for _ in range(job.batch_size):
            n = int(torch.randint(0, job.max_length + 1, (1,), generator=generator))
            lengths.append(n)
            hot = torch.rand(n, generator=generator) < 0.5
            cold = torch.randint(0, rows, (n,), generator=generator)
            ids.append(torch.where(hot, cold % max(1, rows // 10), cold))
    values = torch.cat(ids).to(job.id_dtype)
    return KeyedJaggedTensor(
        keys=list(job.features()),
        values=values,
        lengths=torch.tensor(lengths, dtype=job.id_dtype),
        weights=torch.rand(values.numel(), generator=generator) if job.weighted else None,
    )


def local_state(dmp: DistributedModelParallel) -> dict[str, list[torch.Tensor]]:
    """This rank's rows of every table: weights and optimizer states by their keys in the state dicts."""
    result = {}
    for key, value in dmp.state_dict().items():
        result[key] = torch.cat([torch.empty(0), *(s.tensor.cpu().float() for s in value.local_shards())])
    for key, states in dmp.fused_optimizer.state_dict()["state"].items():
        for name, value in states.items():
            local = [s.tensor.cpu() for s in value.local_shards()]
            result[f"{key}/{name}"] = torch.cat(local) if local else torch.empty(0)
    return {k: v for k, v in result.items() if v.numel()}


def assert_same_state(ours: DistributedModelParallel, theirs: DistributedModelParallel) -> None:
    """Weights and optimizer state are equal to the bit, key by key."""
    a, b = local_state(ours), local_state(theirs)
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key].flatten(), b[key].flatten()), key


class Prefetching:
    """A sharded collection that is fed as a pipeline feeds it: batches are distributed, and prefetched, ahead of their forward."""

    def __init__(self, dmp: DistributedModelParallel, batches: list[KeyedJaggedTensor]) -> None:
        self.module, self.batches, self.waiting = dmp.module, batches, {}

    def prefetch(self, step: int) -> None:
        """Distributes a batch and starts bringing its rows into slots."""
        if step in self.waiting:
            return
        context = self.module.create_context()
        distributed = self.module.input_dist(context, self.batches[step]).wait().wait()
        self.waiting[step] = (context, distributed)
        for lookup, features in zip(self.module._lookups, distributed, strict=True):
            lookup.prefetch(features)

    def forward(self, step: int) -> torch.Tensor:
        """The batch's pooled embeddings."""
        if step not in self.waiting:
            return in_order(self.module(self.batches[step]))
        return in_order(self.module.compute_and_output_dist(*self.waiting.pop(step)).wait())


def in_order(pooled: KeyedTensor) -> torch.Tensor:
    """Values in the order of keys: TorchRec orders them by sharding and group. Shapes: (batch, sum of all dimensions)."""
    values = pooled.to_dict()
    return torch.cat([values[key] for key in sorted(values)], dim=1)


def train_and_compare(job: Job) -> None:
    """Trains both sides on the same batches; outputs are equal at every step, state at the end. Runs on every rank."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder, one_folder(folder) as path:
        home = SsdHome(paths=(path,), capacity_bytes=64 << 20) if job.on_ssd else DdrHome()
        ours, theirs = sharded(job, True, home), sharded(job, False)
        values = initial_values(job)
        theirs.load_state_dict(values)
        in_memory = {f"embedding_bags.t{i}.weight" for i, t in enumerate(job.tables) if not t.tiered}
        ours.load_state_dict({k: v for k, v in values.items() if k in in_memory}, strict=False)
        assert_same_state(ours, theirs)
        generator = torch.Generator().manual_seed(job.seed + dist.get_rank())
        batches = [batch(job, generator) for _ in range(job.steps)]
        feed = Prefetching(ours, batches)
        for step in range(job.steps):
            for ahead in range(step, min(job.steps, step + job.prefetch_depths[step])):
                feed.prefetch(ahead)
            a, b = feed.forward(step), in_order(theirs(batches[step]))
            assert torch.equal(a, b)
            gradient = torch.randn(a.shape, generator=generator)
            a.backward(gradient)
            b.backward(gradient)
            for group in mtrains.tiered_groups(ours):
                group._pool.check()
        del a, b
        assert not any(group._pool.outstanding for group in mtrains.tiered_groups(ours))
        assert_same_state(ours, theirs)


@contextmanager
def one_folder(mine: str) -> Iterator[str]:
    """Rank 0's folder on every rank, until all have left."""
    box = [mine]
    dist.broadcast_object_list(box)
    yield box[0]
    dist.barrier()
