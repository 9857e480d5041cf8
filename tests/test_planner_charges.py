"""What the planner charges is what the kernel and the volume take, and its plans train."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec_mtrains.kernels import SsdVolume
from torchrec_mtrains.planner import CheckpointSchedule, InsufficientStorageError, TieredShardingPlanner, TieredTopology, chain_bytes
from torchrec_mtrains.planner.charges import (
    INDEX_BYTES_PER_ROW,
    PAGE_BYTES,
    SNAPSHOT_AFTER_BYTES,
    SNAPSHOT_BYTES_PER_ROW,
    block_bytes,
    capacity_for,
    has_snapshots,
    least_segment_bytes,
    live_bytes,
    log_bytes,
    volume_bytes,
)

import torchrec_mtrains as mtrains
from chain_memory import RECORD_BYTES, grown_bytes
from planner_cases import PLENTY, Case, TableCase, tiered_tables
from ranks import Ranks
from strategies import PMEM
from torchrec_mtrains import DdrCache, DdrHome, PmemCache, PmemHome, SsdHome, TierChain
from torchrec_mtrains.errors import ConfigurationError, VolumeFullError


@pytest.fixture
def disk() -> Iterator[Path]:
    """On the disk of the checkout: /tmp may be in memory."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        yield Path(name)


@pytest.mark.parametrize(("rows", "record_bytes"), [(1, 20), (20_000, 260), (20_000, 36), (3_000, 2_052), (50_000, 68)])
def test_ssd_bytes_are_those_that_the_volume_writes(rows: int, record_bytes: int, tmp_path: Path) -> None:
    volume = SsdVolume(paths=(str(tmp_path),), capacity_bytes=1 << 30)
    table = volume.table("t0", row_count=rows, record_bytes=record_bytes)
    table.put(torch.arange(rows), torch.ones(rows, record_bytes, dtype=torch.uint8))
    volume.flush()
    assert volume.stats()["write_bytes"] == live_bytes(rows, record_bytes)
    volume.close()


def _volume(folder: Path, rows: int, lookups: float, checkpoints: CheckpointSchedule, record_bytes: int = 260) -> tuple[SsdVolume, Any]:
    """A volume of exactly the capacity that is charged, every row put once."""
    capacity = log_bytes(rows, record_bytes, lookups, checkpoints, snapshots=False)
    volume = SsdVolume(paths=(str(folder),), capacity_bytes=capacity, keep_checkpoints=max(1, checkpoints.keep))
    table = volume.table("t0", row_count=rows, record_bytes=record_bytes)
    table.put(torch.arange(rows), torch.ones(rows, record_bytes, dtype=torch.uint8))
    return volume, table


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("share", [0.6, 1.0])
def test_a_volume_of_the_charged_size_holds_what_checkpoints_retain(keep: int, share: float, disk: Path) -> None:
    """Rows are replaced in turn, so that segments empty by themselves and only retention fills the disk."""
    rows, parts = 60_000, 20
    volume, table = _volume(disk, rows, lookups=share * rows / 100, checkpoints=CheckpointSchedule(every_steps=100, keep=keep))
    volume.checkpoint(1)
    order = torch.arange(rows).repeat(10)
    replaced = int(share * rows)
    peak = 0
    for interval in range(keep + 4):
        for ids in order[interval * replaced :][:replaced].split(replaced // parts):
            table.put(ids, torch.ones(len(ids), 260, dtype=torch.uint8))
        peak = max(peak, volume.stats()["disk_bytes"])
        volume.checkpoint(2 + interval)
    live = live_bytes(rows, 260)
    assert volume.stats()["disk_bytes"] <= peak <= volume.capacity_bytes
    assert peak >= live * (1 + keep * share)
    volume.close()


def test_a_volume_that_commits_no_checkpoint_lives_in_the_charged_size(disk: Path) -> None:
    rows = 200_000
    volume, table = _volume(disk, rows, lookups=math.inf, checkpoints=CheckpointSchedule(keep=0))
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        table.put(torch.randperm(rows, generator=generator)[:5000], torch.ones(5000, 260, dtype=torch.uint8))
    assert 0.8 < live_bytes(rows, 260) / volume.capacity_bytes < 0.9
    volume.close()


def test_retention_is_charged_by_the_rows_that_the_steps_between_two_checkpoints_look_up() -> None:
    often, seldom, unknown, none = (
        CheckpointSchedule(every_steps=10), CheckpointSchedule(every_steps=1000), CheckpointSchedule(), CheckpointSchedule(keep=0)
    )  # fmt: skip
    assert often.replaced_rows(10_000, lookups=50) == 500
    assert seldom.replaced_rows(10_000, lookups=50) == unknown.replaced_rows(10_000, lookups=50) == 10_000
    assert unknown.disk_over_live(10_000, 50) == 1 / unknown.fill + 3
    assert none.disk_over_live(10_000, 50) == 1 / 0.85
    with pytest.raises(ConfigurationError, match="every_steps at least 1"):
        CheckpointSchedule(every_steps=0)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_at_the_planned_fill_what_is_emptied_and_held_stays_below_what_is_foreseen(keep: int) -> None:
    """Writes a put of greedy cleaning, 1 ÷ (1 - s) where fill = (s - 1) ÷ ln s, by bisection."""
    low, high = 1e-9, 1 - 1e-9
    for _ in range(60):
        s = (low + high) / 2
        low, high = (s, high) if (s - 1) / math.log(s) < CheckpointSchedule(keep=keep).fill else (low, s)
    assert 0.75 * (keep + 1) / keep < 1 / (1 - s) < (keep + 1) / keep


def test_plans_charge_the_ssd_by_their_schedule() -> None:
    case = Case([TableCase(50_000, 32)])
    live = live_bytes(50_000, 132)

    def charged(checkpoints: CheckpointSchedule | None) -> int:
        planner = case.planner(2 << 20, PLENTY, checkpoints=checkpoints)
        (row,) = planner.plan_rows(planner.plan(case.model(), case.sharders()))
        return int(row["ssd_bytes"])

    every_100 = CheckpointSchedule(every_steps=100)
    snapshots = 50_000 * SNAPSHOT_BYTES_PER_ROW
    assert charged(every_100) == math.ceil(live * (1 / every_100.fill + 3 * 8 * 100 / 50_000)) + snapshots
    assert charged(CheckpointSchedule(keep=0)) == math.ceil(live / 0.85)
    assert charged(None) == math.ceil(live * (1 / CheckpointSchedule().fill + 3)) + snapshots


def test_a_schedule_that_the_ssd_has_no_room_for_is_refused_with_the_shortage() -> None:
    case = Case([TableCase(50_000, 32)])
    case.plan(2 << 20, 20 << 20, checkpoints=CheckpointSchedule(every_steps=10))
    with pytest.raises(InsufficientStorageError, match="commit a checkpoint more often or keep fewer") as caught:
        case.plan(2 << 20, 20 << 20, checkpoints=CheckpointSchedule(every_steps=10_000))
    assert caught.value.tier == "ssd"
    case.plan(2 << 20, (20 << 20) + caught.value.short_bytes, checkpoints=CheckpointSchedule(every_steps=10_000))


def test_every_tier_takes_the_memory_that_it_is_charged(disk: Path) -> None:
    """To 200 KiB of 13 to 50 MB. Every array that has a line in ``charges.py`` is larger, but for the pins (60 KB)."""
    rows, pool, cached = 600_000, 60_000, 240_000
    ssd = SsdHome((str(disk),), 1 << 30)
    with tempfile.TemporaryDirectory(dir=PMEM) as pmem:
        log_on_pmem = PmemHome((pmem,), 512 << 20)
        chains = [
            TierChain(pool, tiers)
            for tiers in ((ssd,), (DdrCache(cached), ssd), (PmemCache(pmem, cached), ssd), (DdrHome(),), (log_on_pmem,))
        ]
        measured = grown_bytes(rows, TierChain(pool, (ssd,)), chains)
    charged = [chain_bytes(c, rows=rows, record_bytes=RECORD_BYTES, checkpoints=CheckpointSchedule(keep=0)) for c in chains]
    for (ddr, pmem_bytes), cost in zip(measured, charged, strict=True):
        assert abs(ddr - cost.ddr) < 200 << 10
        least = live_bytes(rows, RECORD_BYTES) if cost is charged[-1] else cost.pmem  # of a log: more comes and goes
        assert 0.97 * least <= pmem_bytes <= 1.03 * cost.pmem


@pytest.mark.parametrize(("rows", "record_bytes"), [(6_000, 260), (12_000, 260), (2_000, 1_028)])
def test_a_small_volume_lives_with_the_segments_that_are_charged_for_it_and_not_without(rows: int, record_bytes: int, disk: Path) -> None:
    charged = log_bytes(rows, record_bytes, math.inf, CheckpointSchedule(keep=0), snapshots=False)

    def replace_rows(capacity: int) -> None:
        with tempfile.TemporaryDirectory(dir=disk) as folder:
            volume = SsdVolume(paths=(folder,), capacity_bytes=max(capacity, 2 << 20))
            table = volume.table("t0", row_count=rows, record_bytes=record_bytes)
            generator = torch.Generator().manual_seed(0)
            try:
                for ids in [torch.arange(rows), *(torch.randperm(rows, generator=generator)[: rows // 20] for _ in range(60))]:
                    for some in ids.split(rows // 20):
                        table.put(some, torch.ones(len(some), record_bytes, dtype=torch.uint8))
            finally:
                volume.close()

    replace_rows(capacity_for(charged, {block_bytes(record_bytes)}, keep=0))
    with pytest.raises(VolumeFullError):
        replace_rows(charged)


def test_the_planner_keeps_a_volumes_own_segments_from_the_tables() -> None:
    topology = TieredTopology(2, ddr_budget_bytes=1 << 20, ssd=SsdHome(("/nowhere",), 10 << 20))
    assert [device.storage.ssd for device in topology.devices] == [(10 << 20) - volume_bytes({PAGE_BYTES}, keep=0)] * 2


def test_a_volume_that_would_not_open_is_refused_by_the_planner_with_what_is_missing() -> None:
    case = Case([TableCase(1_000, 32)], extra={"t0": {"compute_kernels": ["customized_kernel"]}})
    with pytest.raises(InsufficientStorageError) as caught:
        case.plan(2 << 20, 1 << 20, checkpoints=CheckpointSchedule(keep=0))
    assert (caught.value.tier, caught.value.short_bytes) == ("ssd", 1 << 20)
    with tempfile.TemporaryDirectory(dir=PMEM) as folder:
        with pytest.raises(ConfigurationError, match="capacity_bytes must be at least 2097152"):
            SsdVolume((folder,), (2 << 20) - 1)
        SsdVolume((folder,), 2 << 20).close()
    case.plan(2 << 20, 2 << 20, checkpoints=CheckpointSchedule(keep=0))


def test_every_further_block_size_of_a_volumes_tables_keeps_four_segments_more_from_them() -> None:
    """The shortage is exact with them: of tables on one rank whose records lie in blocks of two sizes."""
    small, large = TableCase(20_000, 32), TableCase(2_000, 1_024)
    assert block_bytes(4 * 32 + 4) < block_bytes(4 * 1_024 + 4)
    everything_below = {f"t{i}": {"compute_kernels": ["customized_kernel"]} for i in range(2)}
    case, none = Case([small, large], extra=everything_below), CheckpointSchedule(keep=0)
    capacity, short_bytes = 2 << 20, 0
    while True:
        try:
            case.plan(4 << 20, capacity, checkpoints=none)
            break
        except InsufficientStorageError as error:
            short_bytes = error.short_bytes
        with pytest.raises(InsufficientStorageError, match="no plan: ssd is 1 bytes short"):
            case.plan(4 << 20, capacity + short_bytes - 1, checkpoints=none)
        capacity += short_bytes
    logs = [log_bytes(t.rows, 4 * t.dim + 4, 8, none, snapshots=False) for t in (small, large)]
    assert capacity == sum(logs) + 9 * least_segment_bytes({block_bytes(4 * 1_024 + 4)})


def test_an_index_snapshot_takes_what_is_charged_for_it_where_there_can_be_one(tmp_path: Path) -> None:
    assert SsdVolume.__init__.__kwdefaults__["snapshot_after_bytes"] == SNAPSHOT_AFTER_BYTES
    kept, none = CheckpointSchedule(keep=1), CheckpointSchedule(keep=0)
    small, large = SsdHome(("/nowhere",), SNAPSHOT_AFTER_BYTES), SsdHome(("/nowhere",), SNAPSHOT_AFTER_BYTES + 1)
    assert [has_snapshots(home, c) for home in (small, large) for c in (kept, none)] == [False, False, True, False]
    rows = 300_000
    volume = SsdVolume(paths=(str(tmp_path),), capacity_bytes=256 << 20, snapshot_after_bytes=0)
    table = volume.table("t0", row_count=rows, record_bytes=68)
    largest = 0
    for epoch in range(1, 6):
        table.put(torch.arange(rows), torch.full((rows, 68), epoch, dtype=torch.uint8))
        volume.checkpoint(epoch)
        for _ in range(50):
            largest = max(largest, sum(file.stat().st_size for file in tmp_path.glob("index_*.bin")))
            time.sleep(0.01)
    volume.close()
    one = rows * INDEX_BYTES_PER_ROW
    assert one <= largest <= 1.01 * rows * SNAPSHOT_BYTES_PER_ROW
    difference = [chain_bytes(TierChain(1, (home,)), rows=rows, record_bytes=68, checkpoints=kept) for home in (small, large)]
    assert difference[1].ssd - difference[0].ssd == rows * SNAPSHOT_BYTES_PER_ROW
    assert 0 < difference[1].ddr - difference[0].ddr < rows * 8


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
    assert sorted(shards) == sorted((rank, name) for name in ("t0", "t1") for rank in plan.plan["ebc"][name].ranks)
    for _, took in answers:
        for name, record_bytes, pool_rows in took:
            assert record_bytes == case.record_bytes(name)
            assert pool_rows == plan.plan["ebc"][name].tiers.pool_rows
