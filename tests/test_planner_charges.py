"""What the planner charges is what the kernel and the volume take, and its plans train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec_mtrains.kernels import SsdVolume
from torchrec_mtrains.planner import TieredShardingPlanner, TieredTopology
from torchrec_mtrains.planner.charges import live_bytes

import torchrec_mtrains as mtrains
from planner_cases import PLENTY, Case, TableCase, tiered_tables
from ranks import Ranks


@pytest.mark.parametrize(("rows", "record_bytes"), [(1, 20), (20_000, 260), (20_000, 36), (3_000, 2_052), (50_000, 68)])
def test_ssd_bytes_are_those_that_the_volume_writes(rows: int, record_bytes: int, tmp_path: Path) -> None:
    volume = SsdVolume(paths=(str(tmp_path),), capacity_bytes=1 << 30)
    table = volume.table("t0", row_count=rows, record_bytes=record_bytes)
    table.put(torch.arange(rows), torch.ones(rows, record_bytes, dtype=torch.uint8))
    volume.flush()
    assert volume.stats()["write_bytes"] == live_bytes(rows, record_bytes)
    volume.close()


def _train(case: Case, ssd: str) -> tuple[Any, list[tuple[str, int, int]]]:
    import torch.distributed as dist

    home = mtrains.SsdHome((ssd,), PLENTY)
    sharders = mtrains.sharders(fused_params={"optimizer": case.optimizer, "learning_rate": 0.1})
    model = case.model()
    topology = TieredTopology(case.world_size, ddr_budget_bytes=1 << 20, ssd=home)
    planner = TieredShardingPlanner(topology, batch_size=case.batch_size, constraints=case.constraints())
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    keys = [f"t{i}f0" for i in range(len(case.tables))]
    for _ in range(3):
        ids = torch.cat([torch.randint(0, t.rows, (case.batch_size,)) for t in case.tables])
        features = KeyedJaggedTensor(keys=keys, values=ids, lengths=torch.ones(len(ids), dtype=torch.int32))
        dmp.module["ebc"](features).values().sum().backward()
    took = []
    for group in mtrains.tiered_groups(dmp):
        for i, table in enumerate(group.tables):
            took.append((table.name, sum(p.shape[1] * 4 if p.dim() == 2 else 4 for p in group.read_rows(i, 0, 1)), group.pool_rows[i]))
    return plan, took


def test_a_plan_trains_on_two_ranks_with_the_records_and_pools_it_was_charged_for(tmp_path: Path) -> None:
    case = Case(
        [TableCase(60_000, 8), TableCase(20_000, 32), TableCase(100, 8)], world_size=2, extra={"t0": {"sharding_types": ["row_wise"]}}
    )
    ranks = Ranks(2)
    try:
        answers = ranks.run(_train, case, str(tmp_path))
    finally:
        ranks.close()
    plan = answers[0][0]
    assert tiered_tables(plan) == {"t0", "t1"}
    shards = [(rank, name) for rank, (_, took) in enumerate(answers) for name, *_ in took]
    owner = plan.plan["ebc"]["t1"].ranks[0]
    assert sorted(shards) == sorted([(0, "t0"), (1, "t0"), (owner, "t1")])
    for _, took in answers:
        for name, record_bytes, pool_rows in took:
            assert record_bytes == case.record_bytes(name)
            assert pool_rows == plan.plan["ebc"][name].tiers.pool_rows
