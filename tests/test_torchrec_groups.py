"""Tiered tables make as many TBEs as FUSED ones, and what they cannot do is refused by name when a model is wrapped."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mtrains as mtrains
from dmp_twins import Job, Table, assert_same_state, batch, initial_values, plan, sharded
from torchrec_mtrains import DdrHome, TierChain
from torchrec_mtrains.errors import ConfigurationError, IdOutOfRangeError, UnsupportedError

pytestmark = pytest.mark.usefixtures("one_rank")


def kernels_of(dmp: DistributedModelParallel) -> list[nn.Module]:
    return [kernel for lookup in dmp.module._lookups for kernel in lookup._emb_modules]


def ids(**features: list[int]) -> KeyedJaggedTensor:
    """One bag a feature."""
    return KeyedJaggedTensor(
        keys=list(features),
        values=torch.tensor([i for bag in features.values() for i in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in features.values()]),
    )


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_twenty_six_chains_make_as_many_tbes_as_fused(sharding: str) -> None:
    pooling = [PoolingType.SUM, PoolingType.MEAN]
    job = Job([Table(30 + i, 8, [f"f{i}"], pool_rows=4 + i, sharding=sharding, pooling=pooling[i % 2]) for i in range(26)])
    ours, theirs = sharded(job, True), sharded(job, False)
    assert len(kernels_of(ours)) == len(kernels_of(theirs)) == 2
    groups = mtrains.tiered_groups(ours)
    assert [kernel.emb_module for kernel in kernels_of(ours)] == groups
    assert {t.name: t.chain.pool_rows for g in groups for t in g.tables} == {f"t{i}": 4 + i for i in range(26)}
    assert mtrains.tiered_groups(theirs) == []


def test_groups_are_found_once_in_the_order_of_the_plan() -> None:
    job = Job([Table(9, 4, ["a"], 4, sharding="row_wise"), Table(9, 8, ["b"], 4), Table(9, 8, ["c"], 4, tiered=False)])
    model = nn.Sequential(sharded(job, True), sharded(job, True))
    groups = mtrains.tiered_groups(model)
    assert [[t.name for t in g.tables] for g in groups] == [["t0"], ["t1"], ["t0"], ["t1"]]
    assert len({id(g) for g in groups}) == 4


def test_data_parallel_and_fused_tables_train_beside_tiered_ones() -> None:
    job = Job([Table(20, 8, ["a"], 6), Table(20, 8, ["b"], 6, tiered=False), Table(20, 8, ["c"], 6, tiered=False)])
    whole = plan(job, True)
    whole.plan[""]["t2"] = ParameterSharding(sharding_type="data_parallel", compute_kernel="dense", ranks=[0])
    model = EmbeddingBagCollection(tables=job.configs(), device=torch.device("meta"))
    dmp = DistributedModelParallel(model, plan=whole, sharders=mtrains.sharders(job.fused_params()))
    before = {k: v.local_shards()[0].tensor.cpu().clone() for k, v in dmp.state_dict().items() if "t2" not in k}
    dmp(ids(a=[1], b=[2], c=[3])).values().sum().backward()
    for key, row in (("embedding_bags.t0.weight", 1), ("embedding_bags.t1.weight", 2)):
        after = dmp.state_dict()[key].local_shards()[0].tensor.cpu()
        assert (after != before[key]).any(dim=1).nonzero().flatten().tolist() == [row]
    assert dict(dmp.named_parameters())["embedding_bags.t2.weight"].grad.any(dim=1).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_forward_finds_the_batch_that_torchrecs_lookup_prefetched(dtype: torch.dtype) -> None:
    job = Job([Table(20, 8, ["a"], 6), Table(20, 8, ["b"], 6)])
    dmp = sharded(job, True)
    (group,) = mtrains.tiered_groups(dmp)
    batch = ids(a=[1, 2], b=[3])
    batch._values = batch.values().to(dtype)
    context = dmp.module.create_context()
    distributed = dmp.module.input_dist(context, batch).wait().wait()
    dmp.module._lookups[0].prefetch(distributed[0])
    group._pool.check()  # after what was prefetched
    assert [s["misses"] for s in group.stats()] == [2, 1]
    assert group._pool.outstanding == 1
    dmp.module.compute_and_output_dist(context, distributed).wait().values().sum().backward()
    assert [s["misses"] for s in group.stats()] == [2, 1]
    assert [s["lookups"] for s in group.stats()] == [2, 1]
    assert group._pool.outstanding == 0


def test_an_optimizer_of_apply_optimizer_in_backward_reaches_the_rows() -> None:
    job = Job([Table(20, 8, ["a"], 6)])
    model = EmbeddingBagCollection(tables=job.configs(), device=torch.device("meta"))
    apply_optimizer_in_backward(RowWiseAdagrad, model.parameters(), {"lr": 0.25, "eps": 1e-3})
    dmp = DistributedModelParallel(model, plan=plan(job, True), sharders=mtrains.sharders())
    (group,) = mtrains.tiered_groups(dmp)
    assert group.state_names == ["momentum1"]
    assert group.tbe.get_learning_rate() == 0.25


def test_without_an_optimizer_tables_train_with_torchrecs_default() -> None:
    job = Job([Table(20, 8, ["a"], 6)])
    model = EmbeddingBagCollection(tables=job.configs(), device=torch.device("meta"))
    dmp = DistributedModelParallel(model, plan=plan(job, True), sharders=mtrains.sharders())
    assert mtrains.tiered_groups(dmp)[0].tbe.optimizer is EmbOptimType.EXACT_SGD


def test_an_id_out_of_range_is_refused_and_changes_nothing() -> None:
    job = Job([Table(20, 8, ["a"], 6), Table(20, 8, ["b"], 6, sharding="row_wise")])
    dmp = sharded(job, True)
    for bad in (ids(a=[20], b=[0]), ids(a=[0], b=[20]), ids(a=[-1], b=[0]), ids(a=[0], b=[-1])):
        with pytest.raises(IdOutOfRangeError):
            dmp(bad)
    dmp(ids(a=[19], b=[19]))


def test_bounds_check_mode_is_honoured() -> None:
    dmp = sharded(Job([Table(20, 8, ["a"], 6)]), True, bounds_check_mode=BoundsCheckMode.IGNORE)
    assert torch.equal(dmp(ids(a=[25])).values(), dmp(ids(a=[0])).values())


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"optimizer": EmbOptimType.ADAM}, "optimizer ADAM is not supported"),
        ({"optimizer": EmbOptimType.EMAINPLACE_ROWWISE_ADAGRAD}, "is not supported"),
        ({"learning_rat": 0.1}, r"\['learning_rat'\] are not supported"),
        ({"weight_decay_mode": WeightDecayMode.COUNTER}, "weight_decay_mode .*COUNTER.* is not supported"),
        ({"max_norm": 1.0}, r"\['max_norm'\] are not supported"),
    ],
)
def test_options_that_a_tiered_table_cannot_honour_are_refused(option: dict[str, object], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        sharded(Job([Table(20, 8, ["a"], 6)]), True, **option)


@pytest.mark.parametrize("dim", [6, 7])
def test_a_dimension_that_fbgemm_does_not_have_is_refused(dim: int) -> None:
    with pytest.raises(ConfigurationError, match=f"'t0': embedding_dim, .* must be a multiple of 4, got {dim}"):
        sharded(Job([Table(20, dim, ["a"], 6)]), True)


@pytest.mark.parametrize(
    "option",
    [
        {"weight_decay": 0.1, "weight_decay_mode": WeightDecayMode.L2},
        {"weight_decay": 0.1, "weight_decay_mode": WeightDecayMode.DECOUPLE},
        {"gradient_clipping": True, "max_gradient": 0.01},
    ],
)
def test_options_that_act_on_rows_of_the_batch_train_like_fused(option: dict[str, object]) -> None:
    job = Job([Table(40, 8, ["a"], pool_rows=8, pooling=PoolingType.MEAN)], steps=6)
    results = []
    for tiered, options in ((True, option), (False, option), (False, {})):
        dmp, generator = sharded(job, tiered, **options), torch.Generator().manual_seed(0)
        dmp.load_state_dict(initial_values(job))
        for _ in range(job.steps):
            dmp(batch(job, generator)).values().sum().backward()
        results.append(dmp)
    assert_same_state(results[0], results[1])
    if "weight_decay" not in option:  # which FBGEMM takes and its CPU kernels do nothing with
        with pytest.raises(AssertionError):
            assert_same_state(results[1], results[2])


def test_resharding_in_place_is_refused() -> None:
    dmp = sharded(Job([Table(20, 8, ["a"], 6)]), True)
    with pytest.raises(UnsupportedError, match="resharding in place is not supported with tiered tables; save a checkpoint"):
        dmp.module.update_shards({}, dmp._env, torch.device("cpu"))  # what DistributedModelParallel.reshard calls


def test_options_for_the_tables_beside_a_tiered_one_are_accepted() -> None:
    sharded(Job([Table(20, 8, ["a"], 6)]), True, cache_load_factor=0.1, prefetch_pipeline=True)


def test_data_parallel_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="data_parallel"):
        mtrains.TieredParameterSharding(sharding_type="data_parallel", tiers=TierChain(4, (DdrHome(),)))


def test_a_tiered_sharding_has_a_chain_and_no_other_kernel() -> None:
    with pytest.raises(ConfigurationError, match="tiers must be a TierChain, got None"):
        mtrains.TieredParameterSharding("table_wise")
    with pytest.raises(ConfigurationError, match="got 'fused'"):
        mtrains.TieredParameterSharding("table_wise", "fused", tiers=TierChain(4, (DdrHome(),)))


def test_a_customized_kernel_without_tiers_is_refused() -> None:
    job = Job([Table(20, 8, ["a"], 6)])
    module = EmbeddingModuleShardingPlan(
        {name: dataclasses.replace(s, compute_kernel="customized_kernel") for name, s in plan(job, False).plan[""].items()}
    )
    model = EmbeddingBagCollection(tables=job.configs(), device=torch.device("meta"))
    with pytest.raises(ConfigurationError, match="'t0' has compute_kernel='customized_kernel' but no tiers"):
        DistributedModelParallel(model, plan=ShardingPlan({"": module}), sharders=mtrains.sharders())


def test_other_data_types_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="FP32 or FP16"):
        sharded(Job([Table(20, 8, ["a"], 6)], data_type=DataType.BF16), True)


def test_groups_of_one_lookup_share_a_variable_batch() -> None:
    """Stock FUSED cannot on a CPU, so each table is compared with the model that has it alone."""
    tables = [Table(20, 8, ["a", "b"], 12), Table(30, 16, ["c"], 12, pooling=PoolingType.MEAN), Table(25, 4, ["d"], 12)]
    job = Job(tables, batch_size=3, variable=True)
    both, generator = sharded(job, True), torch.Generator().manual_seed(1)
    alone = [sharded(Job([t], batch_size=3, variable=True), True) for t in tables]
    for i, dmp in enumerate(alone):
        values = mtrains.uniform_init_fn(f"t{i}", tables[i].rows, tables[i].dim)(torch.empty(tables[i].rows, tables[i].dim))
        dmp.load_state_dict({"embedding_bags.t0.weight": values})
    assert len(mtrains.tiered_groups(both)) == 2
    for _ in range(5):
        features = batch(job, generator)
        together = both(features).to_dict()
        by_feature = dict(zip(features.keys(), features.split([1] * len(features.keys())), strict=True))
        outputs = []
        for table, dmp in zip(tables, alone, strict=True):
            keys = table.features
            rows = [features.inverse_indices()[0].index(k) for k in keys]
            mine = KeyedJaggedTensor(
                keys=keys,
                values=torch.cat([by_feature[k].values() for k in keys]),
                lengths=torch.cat([by_feature[k].lengths() for k in keys]),
                stride_per_key_per_rank=[features.stride_per_key_per_rank()[features.keys().index(k)] for k in keys],
                inverse_indices=(keys, features.inverse_indices()[1][rows]),
            )
            outputs.append(dmp(mine).to_dict())
        for one in outputs:
            for key in one:
                assert torch.equal(one[key], together[key])
        torch.cat(list(together.values()), dim=1).sum().backward()
        for one in outputs:
            torch.cat(list(one.values()), dim=1).sum().backward()
