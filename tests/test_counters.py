"""What the tiers did: each counter moves with what it counts, and reaches a scalar writer and the progress bar."""

from __future__ import annotations

from pathlib import Path

import pytest
from torchrec.distributed.model_parallel import DistributedModelParallel

import torchrec_mtrains as mtrains
from dmp_twins import Job, Table
from pipelines import CPU, Twins, until_the_end
from torchrec_mtrains.show import live

pytestmark = pytest.mark.usefixtures("one_rank")

JOB = Job([Table(4000, 8, ["a"], 120), Table(300, 8, ["b"], 120)], batch_size=8, max_length=4)


@pytest.fixture
def twins() -> Twins:
    return Twins(JOB, steps=40)


@pytest.fixture
def dmp(twins: Twins, tmp_path: Path) -> DistributedModelParallel:
    return twins.model(True, [mtrains.SsdHome(paths=(str(tmp_path),), capacity_bytes=64 << 20)])


def train(twins: Twins, dmp: DistributedModelParallel) -> None:
    """Twice: rows of the second time are on the device."""
    for _ in range(2):
        until_the_end(mtrains.TieredTrainPipeline(dmp, twins.optimizer(dmp), CPU), iter(twins.batches))
        for group in mtrains.tiered_groups(dmp):
            group.flush()


def test_counters_are_those_of_every_table_tier_and_volume(twins: Twins, dmp: DistributedModelParallel, tmp_path: Path) -> None:
    before = mtrains.counters(dmp)
    assert not any(before["table/t0/pool"].values())
    train(twins, dmp)
    now = mtrains.counters(dmp)
    volume = f"volume/{tmp_path}/rank_0"
    assert set(now) == {"table/t0/pool", "table/t0/SsdHome", "table/t1/pool", "table/t1/SsdHome", volume, "forward"} == set(before)
    for name, feature in (("t0", "a"), ("t1", "b")):
        pool, home = now[f"table/{name}/pool"], now[f"table/{name}/SsdHome"]
        of_batches = [b.ids[feature].values() for b in twins.batches]
        assert pool["lookups"] == 2 * sum(ids.numel() for ids in of_batches)
        assert pool["unique_rows"] == 2 * sum(ids.unique().numel() for ids in of_batches) == pool["hits"] + pool["misses"]
        assert 0 < pool["write_backs"] <= pool["evictions"]
        assert pool["flushed_rows"] > 0
        assert pool["resident_rows"] == 120
        assert home["hits"] == pool["misses"]
        assert home["written_bytes"] == (pool["write_backs"] + pool["flushed_rows"]) * 36
    pools = [now[f"table/{name}/pool"] for name in ("t0", "t1")]
    assert now[volume]["get_rows"] == sum(p["misses"] for p in pools)
    assert now[volume]["put_rows"] == sum(p["write_backs"] + p["flushed_rows"] for p in pools)
    assert min(now[volume]["read_ios"], now[volume]["write_ios"]) > 0
    assert now[volume]["read_bytes"] >= now[volume]["read_ios"] * 4096
    assert now[volume]["rows_per_io"] > 0
    assert now[volume]["queue_depth"] >= 1
    assert 0 < now[volume]["io_busy_seconds"] <= now[volume]["io_flight_seconds"]
    assert now["forward"]["stall_seconds"] > 0


def test_tables_of_one_name_in_two_collections_are_told_apart(tmp_path: Path) -> None:
    twins = Twins(JOB, collections=2, steps=3)
    dmp = twins.model(True)
    twins.train_plainly(dmp)
    pools = {place: numbers["lookups"] for place, numbers in mtrains.counters(dmp).items() if place.endswith("/pool")}
    assert len(pools) == 4
    assert len(set(pools.values())) == 2


def test_a_model_without_tiers_has_no_counters(twins: Twins) -> None:
    assert mtrains.counters(twins.model(False)) == {}


def test_a_scalar_writer_gets_all_of_them(twins: Twins, dmp: DistributedModelParallel) -> None:
    train(twins, dmp)
    written: dict[tuple[str, int], dict[str, float]] = {}

    class Writer:
        def add_scalars(self, main_tag: str, tag_scalar_dict: dict[str, float], global_step: int) -> None:
            written[main_tag, global_step] = tag_scalar_dict

    mtrains.write_scalars(Writer(), dmp, 80)
    assert written == {(place, 80): numbers for place, numbers in mtrains.counters(dmp).items()}


def test_the_progress_bar_says_what_the_tiers_do() -> None:
    step = {
        "lookups": 100,
        "misses": 5,
        "read_ios": 4,
        "io_busy_seconds": 0.01,
        "io_flight_seconds": 0.03,
        "stall_seconds": 0.02,
        "seconds": 0.1,
    }
    assert live(step) == ["hit ratio 0.950", "40 reads/s", "queue 3", "stalled 20%"]
    assert live({"seconds": 0.1}) == []
