"""What a user may do while a job runs: another size for a pool, and a look at the tiers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import torchrec_mtrains as mtrains
from dmp_twins import Job, Table, assert_same_state, batch, in_order, initial_values, sharded
from torchrec_mtrains import SsdHome
from torchrec_mtrains.errors import ConfigurationError, TicketError

pytestmark = pytest.mark.usefixtures("one_rank")


def job() -> Job:
    tables = [
        Table(60, 8, ["a", "b"], 12),
        Table(50, 16, ["c"], 6, sharding="column_wise", shard_dim=8),
        Table(40, 8, ["d"], 6, tiered=False),
    ]
    return Job(tables, on_ssd=True)


def train(dmp, made: Job, steps: int, generator: torch.Generator) -> list[torch.Tensor]:
    outputs = []
    for _ in range(steps):
        outputs.append(in_order(dmp(batch(made, generator))))
        outputs[-1].sum().backward()
    return [o.detach() for o in outputs]


def test_a_pool_is_resized_between_steps_and_nothing_else_changes(tmp_path: Path) -> None:
    made = job()
    ours, theirs = sharded(made, True, SsdHome((str(tmp_path),), 64 << 20)), sharded(made, False)
    values = initial_values(made)
    theirs.load_state_dict(values)
    ours.load_state_dict({"embedding_bags.t2.weight": values["embedding_bags.t2.weight"]}, strict=False)
    a, b = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for table, pool_rows in (("t0", 40), ("t1", 20), ("t0", 12), ("t1", 1000), ("t0", 60)):
        for mine, other in zip(train(ours, made, 4, a), train(theirs, made, 4, b), strict=True):
            assert torch.equal(mine, other)
        for dmp in (ours, theirs):
            for of_tables in dmp.fused_optimizer.param_groups:
                of_tables["lr"] *= 0.5
            dmp.fused_optimizer.zero_grad()
        mtrains.resize(ours, table, pool_rows=pool_rows)
        assert_same_state(ours, theirs)
        pools = {t.table: t.planned_rows for t in mtrains.explain(ours).tiers if t.tier == "pool"}
        assert pools[table] == min(pool_rows, {"t0": 60, "t1": 50}[table])
    for mine, other in zip(train(ours, made, 4, a), train(theirs, made, 4, b), strict=True):
        assert torch.equal(mine, other)
    assert_same_state(ours, theirs)


def test_the_rows_of_a_pool_stay_in_it_when_it_grows(tmp_path: Path) -> None:
    made = Job([Table(60, 8, ["a"], 12)])
    dmp = sharded(made, True, SsdHome((str(tmp_path),), 64 << 20))
    train(dmp, made, 10, torch.Generator().manual_seed(1))
    (group,) = mtrains.tiered_groups(dmp)
    before = group.resident_rows()[0].tolist()
    mtrains.resize(dmp, "t0", pool_rows=30)
    assert sorted(group.resident_rows()[0].tolist()) == sorted(before)
    mtrains.resize(dmp, "t0", pool_rows=5)
    assert set(group.resident_rows()[0].tolist()) <= set(before)
    assert len(group.resident_rows()[0]) == 5


def test_a_resize_that_cannot_be_is_refused(tmp_path: Path) -> None:
    made = job()
    dmp = sharded(made, True, SsdHome((str(tmp_path),), 64 << 20))
    with pytest.raises(ConfigurationError, match="no tiered table 't2' to resize; there are t0, t1"):
        mtrains.resize(dmp, "t2", pool_rows=9)
    with pytest.raises(ConfigurationError, match="pool_rows"):
        mtrains.resize(dmp, "t0", pool_rows=0)
    output = in_order(dmp(batch(made, torch.Generator().manual_seed(3))))
    with pytest.raises(TicketError):
        mtrains.resize(dmp, "t0", pool_rows=9)
    output.sum().backward()
    mtrains.resize(dmp, "t0", pool_rows=9)


def test_an_explanation_counts_what_happened(tmp_path: Path) -> None:
    made = Job([Table(60, 8, ["a"], 6), Table(60, 8, ["b"], 60)])
    dmp = sharded(made, True, SsdHome((str(tmp_path),), 64 << 20))
    train(dmp, made, 20, torch.Generator().manual_seed(1))
    explanation = mtrains.explain(dmp)
    by_tier = {(t.table, t.tier): t for t in explanation.tiers}
    assert set(by_tier) == {(t, tier) for t in ("t0", "t1") for tier in ("pool", "SsdHome")}
    small, large = by_tier["t0", "pool"], by_tier["t1", "pool"]
    assert small.planned_rows == 6
    assert small.write_backs > 0
    assert small.hits > 0
    assert by_tier["t0", "SsdHome"].hits == small.misses > large.misses
    assert large.write_backs == 0
    (volume,) = explanation.volumes
    assert str(tmp_path) in volume.volume
    assert volume.capacity_bytes == 64 << 20
    text = str(explanation)
    for shown in ("t0", "table_wise", "pool", "SsdHome", "hit ratio", f"{small.hit_ratio:.3f}", "rows a read"):
        assert shown in text
