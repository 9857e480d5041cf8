"""``register`` makes tiered tables available where no sharders are passed, and ``unregister`` takes them away again."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torchrec.distributed.sharding_plan as sharding_plan
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.shard import shard
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.itep_embedding_modules import ITEPEmbeddingBagCollection, ITEPEmbeddingCollection

import torchrec_mtrains as mtrains
from dmp_twins import Job, Table, batch, collection, in_order, plan
from test_collections import with_managed_collisions, with_weights_by_position

pytestmark = pytest.mark.usefixtures("one_rank")

JOB = Job([Table(20, 8, ["a"], 6)])
WRAPPED = Job([Table(20, 8, ["a"], 6, sharding="row_wise")])


@pytest.fixture(autouse=True)
def _undo() -> Iterator[None]:
    yield
    mtrains.unregister()


def model() -> EmbeddingBagCollection:
    return EmbeddingBagCollection(tables=JOB.configs(), device=torch.device("meta"))


def default_sharder() -> object:
    return next(s for s in sharding_plan.get_default_sharders() if s.module_type is EmbeddingBagCollection)


def test_register_reaches_distributed_model_parallel_and_shard() -> None:
    mtrains.register()
    assert len(mtrains.tiered_groups(DistributedModelParallel(model(), plan=plan(JOB, True)))) == 1
    assert len(mtrains.tiered_groups(shard(model(), plan(JOB, True).plan[""]))) == 1


@pytest.mark.parametrize("made", [with_weights_by_position, with_managed_collisions])
@pytest.mark.parametrize("sequence", [False, True])
def test_register_reaches_collections_and_those_that_wrap_them(made: Callable[[Job], nn.Module], sequence: bool) -> None:
    if sequence and made is with_weights_by_position:
        made = collection  # TorchRec has no feature processors for sequences
    job = dataclasses.replace(WRAPPED, sequence=sequence, weighted=made is with_weights_by_position)
    with pytest.raises(ValueError, match="Compute kernel not supported"):
        DistributedModelParallel(made(job), plan=plan(job, True))
    mtrains.register()
    tiered, in_memory = (DistributedModelParallel(made(job), plan=plan(job, side)) for side in (True, False))
    assert len(mtrains.tiered_groups(tiered)) == 1
    assert mtrains.tiered_groups(in_memory) == []
    mtrains.unregister()
    stock = DistributedModelParallel(made(job), plan=plan(job, False))
    assert mtrains.tiered_groups(stock) == []
    ids = batch(job, torch.Generator().manual_seed(0))
    for dmp in (tiered, in_memory, stock):  # sharded modules keep working
        output = dmp(ids)
        in_order(output[0] if isinstance(output, tuple) else output).sum().backward()


def test_after_unregister_every_default_sharder_is_torchrecs_again() -> None:
    before = [type(s) for s in sharding_plan.get_default_sharders()]
    assert all(t.__module__.startswith("torchrec.") for t in before)
    mtrains.register()
    during = [type(s) for s in sharding_plan.get_default_sharders()]
    assert sum(t.__module__.startswith("torchrec_mtrains.") for t in during) == 6
    mtrains.unregister()
    assert [type(s) for s in sharding_plan.get_default_sharders()] == before


def test_register_leaves_the_stock_planner_its_plans() -> None:
    def made() -> ShardingPlan:
        planner = EmbeddingShardingPlanner(topology=Topology(world_size=1, compute_device="cpu"))
        return planner.plan(model(), sharding_plan.get_default_sharders())

    before = made()
    mtrains.register()
    assert made().plan == before.plan


def test_register_and_unregister_are_idempotent() -> None:
    for _ in range(2):
        mtrains.register()
        assert type(default_sharder()) is mtrains.TieredEmbeddingBagCollectionSharder
    for _ in range(2):
        mtrains.unregister()
        assert type(default_sharder()) is EmbeddingBagCollectionSharder


def test_sharders_are_torchrecs_with_ours_in_the_place_of_some_and_those_of_pruned_collections() -> None:
    stock = {s.module_type for s in sharding_plan.get_default_sharders()}
    pruned = {ITEPEmbeddingBagCollection, ITEPEmbeddingCollection}
    for registered in (False, True):
        if registered:
            mtrains.register()
        ours = mtrains.sharders({"learning_rate": 0.5})
        assert {s.module_type for s in ours} == stock | pruned
        assert len(ours) == len(stock) + len(pruned)
        assert [type(s) for s in ours if s.module_type is EmbeddingBagCollection] == [mtrains.TieredEmbeddingBagCollectionSharder]


def imported(statement: str) -> str:
    code = f"import sys\n{statement}\nprint(*(m for m in ('torchrec_mtrains.kernels._core', 'torchrec') if m in sys.modules))"
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_vocabulary_needs_no_torchrec_and_the_planner_no_native_core() -> None:
    assert imported("import torchrec_mtrains") == ""
    assert imported("import torchrec_mtrains as m; m.planner") == "torchrec"
    assert "torchrec_mtrains.kernels._core" in imported("import torchrec_mtrains as m; m.sharders()")


def test_every_public_name_is_there() -> None:
    for name in mtrains.__all__:
        assert getattr(mtrains, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mtrains.nothing  # noqa: B018


def test_our_planner_puts_tables_of_sequences_into_tiers_too(tmp_path: Path) -> None:
    job = Job([Table(2_000, 64, ["a", "b"], 0), Table(10, 64, ["c"], 0)], sequence=True, batch_size=4)
    wrapped = nn.ModuleDict({"sequences": collection(job)})
    home = mtrains.SsdHome((str(tmp_path),), 64 << 20)
    topology = mtrains.planner.TieredTopology(world_size=1, ddr_budget_bytes=200_000, ssd=home)
    sharders = mtrains.sharders(job.fused_params())
    planned = mtrains.planner.TieredShardingPlanner(topology, batch_size=4).plan(wrapped, sharders)
    dmp = DistributedModelParallel(wrapped, plan=planned, sharders=sharders)
    (group,) = mtrains.tiered_groups(dmp)
    assert [t.name for t in group.tables] == ["t0"]
    assert group.pool_rows[0] < 2_000
    assert planned.plan["sequences"]["t1"].compute_kernel == "fused"
    in_order(dmp.module["sequences"](batch(job, torch.Generator().manual_seed(0)))).sum().backward()
