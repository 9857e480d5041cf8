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
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torch.distributed.tensor import DTensor
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets
from torchrec.distributed.types import EmbeddingModuleShardingPlan, LazyAwaitable, ParameterSharding, ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

import torchrec_mtrains as mtrains
from torchrec_mtrains import DdrHome, SsdHome, TierChain


@dataclass
class Table:
    """One table of a job. ``rank`` is where its first shard lives; one that is not ``tiered`` is FUSED on both sides."""

    rows: int
    dim: int
    features: list[str]
    pool_rows: int
    pooling: PoolingType = PoolingType.SUM
    sharding: str = "table_wise"
    rank: int = 0
    tiered: bool = True
    shard_dim: int | None = None  # the width of a column-wise shard


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
    sequence: bool = False  # an EmbeddingCollection
    variable: bool = False  # each feature has a batch size of its own
    output_dtensor: bool = False  # the state is of DTensors

    @property
    def module(self) -> str:
        """What tables are below, in the keys of state dicts."""
        return "embeddings" if self.sequence else "embedding_bags"

    def fused_params(self) -> dict[str, object]:
        """Equal on both sides."""
        return {"optimizer": self.optimizer, "learning_rate": 0.1, "eps": 1e-3, "stochastic_rounding": False}

    def configs(self) -> list[EmbeddingBagConfig] | list[EmbeddingConfig]:
        """Names are t0, t1, …; initial values are TorchRec's default."""
        common = [
            {
                "name": f"t{i}",
                "embedding_dim": t.dim,
                "num_embeddings": t.rows,
                "feature_names": list(t.features),
                "data_type": self.data_type,
            }
            for i, t in enumerate(self.tables)
        ]
        if self.sequence:
            return [EmbeddingConfig(**c) for c in common]
        return [EmbeddingBagConfig(**c, pooling=t.pooling) for c, t in zip(common, self.tables, strict=True)]

    def features(self) -> dict[str, int]:
        """The rows that each feature's ids may name: those of the smallest table that has it."""
        rows: dict[str, int] = {}
        for table in self.tables:
            for feature in table.features:
                rows[feature] = min(rows.get(feature, table.rows), table.rows)
        return rows


SEQUENCE_SHARDINGS = ("table_wise", "row_wise", "column_wise")
VARIABLE_SHARDINGS = (*SEQUENCE_SHARDINGS, "table_column_wise", "table_row_wise")  # TorchRec's grid has no variable batch
SHARDINGS = (*VARIABLE_SHARDINGS, "grid_shard")


@st.composite
def jobs(draw: st.DrawFn, world_size: int) -> Job:
    """1-4 tables, pools from the smallest legal: what one batch of all ranks can touch at most."""
    count = draw(st.integers(1, 4))
    batch_size, max_length = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    shared = draw(st.booleans())
    sequence = draw(st.booleans())
    variable = not sequence and draw(st.booleans())
    optimizers = [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ROWWISE_ADAGRAD, *([] if variable else [EmbOptimType.EXACT_ADAGRAD])]
    pooling = draw(st.sampled_from([PoolingType.SUM, PoolingType.MEAN]))
    dim, shard_dim = draw(st.sampled_from([(4, 4), (8, 4), (8, 8), (16, 8), (24, 8)]))
    shardings = SEQUENCE_SHARDINGS if sequence else VARIABLE_SHARDINGS if variable else SHARDINGS
    if variable and (world_size > 1 or pooling is PoolingType.MEAN):
        # Where stock FUSED fails too: gloo gathers no gradients of different sizes, and TorchRec's division of means over
        # rows takes the batches of features in another order than it has them.
        shardings = tuple(s for s in shardings if "row_wise" not in s)
    tables = []
    for i in range(count):
        features = [f"f{i}_{k}" for k in range(draw(st.integers(1, 2)))]
        if shared and i:
            features.append("f0_0")
        tables.append(
            Table(
                # Stock FUSED needs a row on every rank of a row-wise table.
                rows=draw(st.integers(world_size, 60).filter(lambda rows: rows > -(-rows // world_size) * (world_size - 1))),
                dim=dim if sequence else draw(st.sampled_from([4, 8, 12, 16])),
                features=features,
                pool_rows=max(1, len(features) * batch_size * max_length * world_size) + draw(st.sampled_from([0, 0, 1, 5])),
                # Stock FUSED on a CPU has a variable batch for one group only.
                pooling=pooling if variable else draw(st.sampled_from([PoolingType.SUM, PoolingType.MEAN])),
                sharding=draw(st.sampled_from(shardings)),
                rank=draw(st.integers(0, world_size - 1)),
                tiered=variable or draw(st.sampled_from([True, True, True, False])),
                shard_dim=shard_dim if sequence else draw(st.sampled_from([4, 8])),
            )
        )
    for table in tables:
        if not sequence and table.dim % table.shard_dim:
            table.shard_dim = 4
    tables[draw(st.integers(0, count - 1))].tiered = True
    steps = draw(st.integers(1, 8))
    return Job(
        tables=tables,
        optimizer=draw(st.sampled_from(optimizers)),
        data_type=draw(st.sampled_from([DataType.FP32, DataType.FP16])),
        weighted=not sequence and draw(st.booleans()),
        batch_size=batch_size,
        max_length=max_length,
        steps=steps,
        prefetch_depths=draw(st.lists(st.integers(0, 3), min_size=steps, max_size=steps)),
        seed=draw(st.integers(0, 2**31)),
        on_ssd=draw(st.booleans()),
        id_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        sequence=sequence,
        variable=variable,
    )


def shards(table: Table, world_size: int) -> list[ShardMetadata]:
    """TorchRec's, over ranks that follow ``rank``."""
    sizes, offsets = calculate_shard_sizes_and_offsets(
        torch.empty(table.rows, table.dim, device="meta"), world_size, get_local_size(world_size), table.sharding, table.shard_dim
    )
    return [
        ShardMetadata(shard_offsets=offset, shard_sizes=size, placement=f"rank:{rank}/cpu")
        for size, offset, rank in zip(sizes, offsets, ranks_of(table, len(sizes), world_size), strict=True)
    ]


def ranks_of(table: Table, count: int, world_size: int) -> list[int]:
    """The rank of each shard."""
    local = get_local_size(world_size)
    node = table.rank // local
    match table.sharding:
        case "row_wise":
            return list(range(world_size))
        case "table_row_wise":
            return [node * local + r for r in range(local)]
        case "table_column_wise":
            return [node * local + (table.rank + i) % local for i in range(count)]
        case "grid_shard":  # column shard after column shard, each over the ranks of a node
            return [(node + i // local) % (world_size // local) * local + i % local for i in range(count)]
        case _:
            return [(table.rank + i) % world_size for i in range(count)]


def plan(job: Job, tiered: bool, home: SsdHome | DdrHome = DdrHome()) -> ShardingPlan:  # noqa: B008
    """The hand-written plan for either side."""
    world_size, result = dist.get_world_size(), EmbeddingModuleShardingPlan()
    for i, table in enumerate(job.tables):
        its_shards = shards(table, world_size)
        where = {
            "sharding_type": table.sharding,
            "ranks": ranks_of(table, len(its_shards), world_size),
            "sharding_spec": EnumerableShardingSpec(its_shards),
        }
        if tiered and table.tiered:
            result[f"t{i}"] = mtrains.TieredParameterSharding(**where, tiers=TierChain(table.pool_rows, (home,)))
        else:
            result[f"t{i}"] = ParameterSharding(**where, compute_kernel="fused")
    return ShardingPlan({"": result})


def collection(job: Job) -> EmbeddingBagCollection | EmbeddingCollection:
    """The unsharded module, without storage."""
    meta = torch.device("meta")
    if job.sequence:
        return EmbeddingCollection(tables=job.configs(), device=meta)
    return EmbeddingBagCollection(tables=job.configs(), is_weighted=job.weighted, device=meta)


def sharded(job: Job, tiered: bool, home: SsdHome | DdrHome = DdrHome(), **fused_params: object) -> DistributedModelParallel:  # noqa: B008
    """One side, with TorchRec's default initial values: a tiered table's are keyed by its name."""
    fused = {**job.fused_params(), **fused_params}
    assert dist.group.WORLD is not None
    return DistributedModelParallel(
        collection(job),
        env=ShardingEnv(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, job.output_dtensor),
        device=torch.device("cpu"),
        plan=plan(job, tiered, home),
        sharders=mtrains.sharders(fused),
    )


def initial_values(job: Job) -> dict[str, torch.Tensor]:
    """What every table starts with on the tiered side, as a state dict of whole tables."""
    dtype = torch.float16 if job.data_type is DataType.FP16 else torch.float32
    return {
        f"{job.module}.t{i}.weight": mtrains.uniform_init_fn(f"t{i}", t.rows, t.dim)(torch.empty(t.rows, t.dim, dtype=dtype))
        for i, t in enumerate(job.tables)
    }


def batch(job: Job, generator: torch.Generator) -> KeyedJaggedTensor:
    """This rank's batch; half of the ids come from a hot tenth. Of a variable one each feature has its own share of distinct samples."""
    lengths, ids, strides, inverse = [], [], [], []
    for rows in job.features().values():
        stride = int(torch.randint(1, job.batch_size + 1, (1,), generator=generator)) if job.variable else job.batch_size
        strides.append(stride)
        inverse.append(torch.randint(0, stride, (job.batch_size,), generator=generator))
        for _ in range(stride):
            n = int(torch.randint(0, job.max_length + 1, (1,), generator=generator))
            lengths.append(n)
            hot = torch.rand(n, generator=generator) < 0.5
            cold = torch.randint(0, rows, (n,), generator=generator)
            ids.append(torch.where(hot, cold % max(1, rows // 10), cold))
    values, keys = torch.cat(ids).to(job.id_dtype), list(job.features())
    variable = {"stride_per_key_per_rank": [[s] for s in strides], "inverse_indices": (keys, torch.stack(inverse))} if job.variable else {}
    return KeyedJaggedTensor(
        keys=keys,
        values=values,
        lengths=torch.tensor(lengths, dtype=job.id_dtype),
        weights=torch.rand(values.numel(), generator=generator) if job.weighted else None,
        **variable,
    )


Shards = dict[tuple[int, ...], torch.Tensor]
"""By column, and none for values without: consecutive rows."""


def local_state(dmp: DistributedModelParallel) -> dict[str, Shards]:
    """This rank's shards of every table: weights and optimizer states by their keys in the state dicts."""
    result = {key: shards_of(value) for key, value in dmp.state_dict().items()}
    for key, states in dmp.fused_optimizer.state_dict()["state"].items():
        result |= {f"{key}/{name}": shards_of(value) for name, value in states.items()}
    return {k: v for k, v in result.items() if v}


def local_blocks(state: ShardedTensor | DTensor) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """Offsets and values of what this rank has."""
    if isinstance(state, DTensor):
        local = state.to_local()
        return [(tuple(o), t.cpu()) for o, t in zip(local.local_offsets(), local.local_shards(), strict=False)]
    return [(tuple(s.metadata.shard_offsets), s.tensor.cpu()) for s in state.local_shards()]


def shards_of(state: ShardedTensor | DTensor) -> Shards:
    """The local ones that are not empty. A tiered table's come in blocks of rows."""
    blocks: dict[tuple[int, ...], list[tuple[int, torch.Tensor]]] = {}
    for (row, *columns), values in local_blocks(state):
        if values.numel():
            blocks.setdefault(tuple(columns), []).append((row, values))
    return {columns: torch.cat([t for _, t in sorted(of_column, key=lambda b: b[0])]) for columns, of_column in blocks.items()}


def assert_same_state(ours: DistributedModelParallel, theirs: DistributedModelParallel) -> None:
    """Weights and optimizer state are equal to the bit, key by key."""
    a, b = local_state(ours), local_state(theirs)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].keys() == b[key].keys(), key
        for offset in a[key]:
            assert torch.equal(a[key][offset], b[key][offset].reshape(a[key][offset].shape)), (key, offset)


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


def in_order(output: KeyedTensor | dict[str, JaggedTensor]) -> torch.Tensor:
    """Values in the order of keys: TorchRec orders them by sharding and group. Shapes: (batch, sum of all dimensions), or flat."""
    if isinstance(output, LazyAwaitable):
        output = output.wait()
    if isinstance(output, KeyedTensor):
        values = output.to_dict()
        return torch.cat([values[key] for key in sorted(values)], dim=1)
    return torch.cat([output[key].values().flatten() for key in sorted(output)])


def train_and_compare(job: Job) -> None:
    """Trains both sides on the same batches; outputs are equal at every step, state at the end. Runs on every rank."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder, one_folder(folder) as path:
        home = SsdHome(paths=(path,), capacity_bytes=64 << 20) if job.on_ssd else DdrHome()
        ours, theirs = sharded(job, True, home), sharded(job, False)
        values = initial_values(job)
        theirs.load_state_dict(values)
        in_memory = {f"{job.module}.t{i}.weight" for i, t in enumerate(job.tables) if not t.tiered}
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
