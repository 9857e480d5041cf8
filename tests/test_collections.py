"""Collections that wrap tables: feature-processed and managed-collision ones train like stock FUSED, the others are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.fp_embeddingbag import FeatureProcessedEmbeddingBagCollectionSharder
from torchrec.distributed.mc_embedding import ManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ModuleSharder
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.feature_processor_ import PositionWeightedModule, PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.modules.itep_embedding_modules import ITEPEmbeddingBagCollection, ITEPEmbeddingCollection
from torchrec.modules.itep_modules import GenericITEPModule
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection, ManagedCollisionEmbeddingCollection
from torchrec.modules.mc_modules import DistanceLFU_EvictionPolicy, ManagedCollisionCollection, MCHManagedCollisionModule

import torchrec_mtrains as mtrains
from dmp_twins import Job, Table, batch, collection, in_order, plan, shards_of
from ranks import Ranks
from torchrec_mtrains.errors import IdOutOfRangeError, UnsupportedError

STEPS = 10
RAW_IDS = 400
"""Ids of a managed-collision collection before they are mapped to rows."""

Made = Callable[[Job], nn.Module]


def with_weights_by_position(job: Job) -> nn.Module:
    lengths = dict.fromkeys(job.features(), job.max_length)
    return FeatureProcessedEmbeddingBagCollection(collection(job), PositionWeightedModuleCollection(lengths))


def with_a_processor_for_each_feature(job: Job) -> nn.Module:
    return FeatureProcessedEmbeddingBagCollection(collection(job), {f: PositionWeightedModule(job.max_length) for f in job.features()})


def with_managed_collisions(job: Job) -> nn.Module:
    cpu = torch.device("cpu")
    modules = {
        f"t{i}": MCHManagedCollisionModule(t.rows, cpu, DistanceLFU_EvictionPolicy(), eviction_interval=2, input_hash_size=RAW_IDS)
        for i, t in enumerate(job.tables)
    }
    tables = collection(job)
    if isinstance(tables, EmbeddingCollection):
        managed = ManagedCollisionCollection(modules, tables.embedding_configs())
        return ManagedCollisionEmbeddingCollection(tables, managed, return_remapped_features=True)
    managed = ManagedCollisionCollection(modules, tables.embedding_bag_configs())
    return ManagedCollisionEmbeddingBagCollection(tables, managed, return_remapped_features=True)


def composed(job: Job) -> list[ModuleSharder[Any]]:
    """TorchRec's own wrapping sharders around ours."""
    bags = mtrains.TieredEmbeddingBagCollectionSharder(job.fused_params())
    sequences = mtrains.TieredEmbeddingCollectionSharder(job.fused_params())
    return [
        FeatureProcessedEmbeddingBagCollectionSharder(ebc_sharder=bags),
        ManagedCollisionEmbeddingBagCollectionSharder(ebc_sharder=bags),
        ManagedCollisionEmbeddingCollectionSharder(ec_sharder=sequences),
    ]


def sharded(job: Job, module: nn.Module, tiered: bool, sharders: list[ModuleSharder[Any]] | None = None) -> DistributedModelParallel:
    """One side, its tables starting with the values of the tiered side."""
    sharders = sharders or mtrains.sharders(job.fused_params())
    dmp = DistributedModelParallel(module, device=torch.device("cpu"), plan=plan(job, tiered), sharders=sharders)
    values = {f"t{i}.weight": mtrains.uniform_init_fn(f"t{i}", t.rows, t.dim)(torch.empty(t.rows, t.dim)) for i, t in enumerate(job.tables)}
    prefix = "_embedding_bag_collection" if isinstance(module, FeatureProcessedEmbeddingBagCollection) else "_embedding_module"
    missing = dmp.load_state_dict({f"{prefix}.{job.module}.{k}": v for k, v in values.items()}, strict=False)
    assert not missing.unexpected_keys
    return dmp


def state(dmp: DistributedModelParallel) -> dict[str, torch.Tensor]:
    """This rank's state of every kind: rows, their optimizer state, and what is beside the tables."""
    everything = dict(dmp.state_dict())
    for key, states in dmp.fused_optimizer.state_dict()["state"].items():
        everything |= {f"{key}/{name}": value for name, value in states.items()}
    result = {}
    for key, value in everything.items():
        if isinstance(value, ShardedTensor):
            result |= {f"{key}@{columns}": tensor for columns, tensor in shards_of(value).items()}
        else:
            result[key] = value.detach()
    return result


def train(job: Job, dmp: DistributedModelParallel, raw_ids: bool) -> list[torch.Tensor]:
    """Every output, and the mapped ids of a managed-collision collection."""
    torch.manual_seed(3)  # rows that are evicted get new random values
    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    dense = [p for n, p in dmp.named_parameters() if "_feature_processors" in n]
    optimizer, seen = torch.optim.SGD(dense, lr=0.1) if dense else None, []
    for _ in range(STEPS):
        ids = batch(job, generator)
        if raw_ids:
            ids._values = torch.randint(0, RAW_IDS, ids.values().shape, generator=generator)
        output = dmp(ids)
        mapped = None
        if isinstance(output, tuple):
            output, mapped = output
        flat = in_order(output)
        flat.backward(torch.randn(flat.shape, generator=generator))
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        seen.append(flat.detach())
        if mapped is not None:
            mapped = mapped.wait() if hasattr(mapped, "wait") else mapped
            seen.append(mapped.values())
    return seen


def assert_trains_like_fused(job: Job, made: Made, raw_ids: bool = False) -> None:
    """Under TorchRec's sharders around ours and under ``mtrains.sharders``; outputs at every step and all state at the end."""
    theirs = sharded(job, made(job), tiered=False)
    expected = train(job, theirs, raw_ids)
    assert len(expected) == STEPS * (2 if raw_ids else 1)
    for sharders in (composed(job), mtrains.sharders(job.fused_params())):
        ours = sharded(job, made(job), True, sharders)
        seen = train(job, ours, raw_ids)
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
        a, b = state(ours), state(theirs)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key].reshape(a[key].shape)), key
        groups = mtrains.tiered_groups(ours)
        assert groups
        assert sum(stats["evictions"] for group in groups for stats in group.stats()) > 0


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def processed(sharding: str, pool_rows: int = 24) -> Job:
    return Job(
        [
            Table(80, 8, ["a", "b"], pool_rows, PoolingType.SUM, sharding, shard_dim=4),
            Table(60, 8, ["c"], 12, PoolingType.SUM, sharding, rank=dist.get_world_size() - 1, shard_dim=4),
        ],
        weighted=True,
    )


def feature_processed(sharding: str) -> None:
    for made in (with_weights_by_position, with_a_processor_for_each_feature):
        assert_trains_like_fused(processed(sharding), made)


def managed_collisions(sequence: bool) -> None:
    for optimizer in (EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD):
        job = Job(
            [Table(60, 8, ["a", "b"], 24, sharding="row_wise"), Table(40, 8, ["c"], 12, sharding="row_wise")], optimizer, sequence=sequence
        )
        assert_trains_like_fused(job, with_managed_collisions, raw_ids=True)


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "column_wise", "table_column_wise"])
def test_feature_processed_collections_train_like_fused(one_rank: None, sharding: str) -> None:
    feature_processed(sharding)


@pytest.mark.parametrize("sequence", [False, True])
def test_managed_collision_collections_that_evict_train_like_fused(one_rank: None, sequence: bool) -> None:
    managed_collisions(sequence)


def test_feature_processed_collections_train_like_fused_on_two_ranks(two_ranks: Ranks) -> None:
    for sharding in ("row_wise", "column_wise", "table_row_wise"):
        two_ranks.run(feature_processed, sharding)


def test_managed_collision_collections_that_evict_train_like_fused_on_two_ranks(two_ranks: Ranks) -> None:
    for sequence in (False, True):
        two_ranks.run(managed_collisions, sequence)


def test_evicted_rows_get_their_initial_value_and_no_momentum(one_rank: None) -> None:
    """With row-wise Adagrad, which stock FUSED cannot reset on a CPU."""
    job = Job([Table(60, 8, ["a"], 12, sharding="row_wise"), Table(20, 8, ["b", "c"], 24, sharding="row_wise")], max_length=6)
    tables = EmbeddingBagCollection(tables=job.configs(), device=torch.device("meta"))
    for config in tables.embedding_bag_configs():
        config.init_fn = lambda rows: rows.fill_(0.25)
    managed = ManagedCollisionCollection(
        {
            f"t{i}": MCHManagedCollisionModule(t.rows, torch.device("cpu"), DistanceLFU_EvictionPolicy(), 1, input_hash_size=RAW_IDS)
            for i, t in enumerate(job.tables)
        },
        tables.embedding_bag_configs(),
    )
    dmp = DistributedModelParallel(
        ManagedCollisionEmbeddingBagCollection(tables, managed),
        device=torch.device("cpu"),
        plan=plan(job, True),
        sharders=mtrains.sharders(job.fused_params()),
    )
    generator, evicted_trained_rows = torch.Generator().manual_seed(0), 0
    for _ in range(STEPS):
        ids = batch(job, generator)
        ids._values = torch.randint(0, RAW_IDS, ids.values().shape, generator=generator)
        before = state(dmp)
        output = dmp(ids)[0]
        after = state(dmp)
        for i, table in enumerate(job.tables):
            evicted = dmp.module._managed_collision_collection._managed_collision_modules[f"t{i}"]._evicted_emb_indices
            key = f"_embedding_module.embedding_bags.t{i}.weight"
            weights, momentum = f"{key}@(0,)", f"{key}/t{i}.momentum1@()"
            mine = torch.zeros(table.rows, dtype=torch.bool)
            mine[evicted] = True
            assert torch.equal(after[weights][mine], torch.full((int(mine.sum()), 8), 0.25))
            assert torch.equal(after[momentum][mine], torch.zeros(int(mine.sum())))
            assert torch.equal(after[weights][~mine], before[weights][~mine])
            assert torch.equal(after[momentum][~mine], before[momentum][~mine])
            evicted_trained_rows += int((before[momentum][mine] > 0).sum())
        flat = in_order(output)
        flat.backward(torch.randn(flat.shape, generator=generator))
    assert evicted_trained_rows > 0


def pruned_in_training(job: Job) -> nn.Module:
    pruning, tables = GenericITEPModule({"t0": 2 * job.tables[0].rows}), collection(job)
    if isinstance(tables, EmbeddingCollection):
        return ITEPEmbeddingCollection(tables, pruning)
    return ITEPEmbeddingBagCollection(tables, pruning)


def with_a_fused_optimizer(job: Job) -> nn.Module:
    return FusedEmbeddingBagCollection(job.configs(), torch.optim.SGD, {"lr": 0.1}, device=torch.device("meta"))


@pytest.mark.parametrize(
    ("made", "sequence", "name"),
    [
        (pruned_in_training, False, "ITEPEmbeddingBagCollection"),
        (pruned_in_training, True, "ITEPEmbeddingCollection"),
        (with_a_fused_optimizer, False, "FusedEmbeddingBagCollection"),
    ],
)
def test_collections_that_cannot_have_tiered_tables_refuse_them_by_name(one_rank: None, made: Made, sequence: bool, name: str) -> None:
    job = Job([Table(20, 8, ["a"], 6)], sequence=sequence)
    with pytest.raises(UnsupportedError, match=rf"^tables \['t0'\] of {name} cannot live in tiers: .*Keep them in memory"):
        DistributedModelParallel(made(job), device=torch.device("cpu"), plan=plan(job, True), sharders=mtrains.sharders())


def test_a_collection_that_refuses_tiered_tables_takes_those_in_memory(one_rank: None) -> None:
    job = Job([Table(20, 8, ["a"], 6)])
    sides = [
        DistributedModelParallel(with_a_fused_optimizer(job), device=torch.device("cpu"), plan=plan(job, False), sharders=sharders)
        for sharders in (mtrains.sharders(), None)
    ]
    sides[0].load_state_dict(sides[1].state_dict())
    seen = [train(job, dmp, raw_ids=False) for dmp in sides]
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from([torch.int32, torch.int64]), st.booleans())
def test_rows_are_read_and_written_by_number(one_rank: None, data: st.DataObject, dtype: torch.dtype, negative: bool) -> None:
    """Eviction does it to parameters: two shards of columns here, as in a tensor in memory."""
    job = Job([Table(40, 8, ["a"], 6, sharding="column_wise", shard_dim=4)])
    dmp = DistributedModelParallel(collection(job), device=torch.device("cpu"), plan=plan(job, True), sharders=mtrains.sharders())
    weight = dmp.module.embedding_bags["t0"].weight
    expected = weight.detach().cpu()
    for _ in range(3):
        rows = torch.tensor(data.draw(st.lists(st.integers(0, 39), unique=True)), dtype=dtype)
        if negative:
            rows = rows - 40
        values = torch.rand(rows.numel(), 8)
        with torch.no_grad():
            weight[rows] = values
        weight.data[rows[:1]] = 0.5
        expected[rows.long()] = values
        expected[rows[:1].long()] = 0.5
        dmp(batch(job, torch.Generator().manual_seed(0)))  # moves rows in and out of the pool
        many = torch.tensor(data.draw(st.lists(st.integers(0, 39))), dtype=dtype)
        assert torch.equal(weight[many], expected[many.long()])
        assert torch.equal(weight.detach().cpu(), expected)


def test_other_indices_of_rows_are_refused(one_rank: None) -> None:
    job = Job([Table(40, 8, ["a"], 6)])
    dmp = DistributedModelParallel(collection(job), device=torch.device("cpu"), plan=plan(job, True), sharders=mtrains.sharders())
    weight = dmp.module.embedding_bags["t0"].weight.detach()
    for row in (-41, 40):
        with pytest.raises(IdOutOfRangeError, match=f"'t0': row {row} is not one of the 40 rows"):
            weight[torch.tensor([0, row])]
    with pytest.raises(UnsupportedError, match="would materialise or change them"):
        weight.index_put_((torch.tensor([1, 1]),), torch.ones(2, 8), accumulate=True)
    with pytest.raises(UnsupportedError, match="would materialise or change them"):
        weight[torch.ones(40, dtype=torch.bool)] = 0.0
