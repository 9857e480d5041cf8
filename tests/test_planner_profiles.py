"""What the planner is told of a machine and of a job's accesses changes its plans, in the direction that it should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torchrec_mtrains.planner import (
    AccessProfile,
    CheckpointSchedule,
    HardwareProfile,
    PlanSummary,
    TieredShardingPlanner,
    assumed_access,
    hardware_profiles,
)
from torchrec_mtrains.planner.charges import log_bytes, records_per_block
from torchrec_mtrains.planner.neighbours import curve_over_ssd
from torchrec_mtrains.planner.perf_model import ShardUse

from planner_cases import PLENTY, Case, TableCase, tiered_tables
from torchrec_mtrains.errors import ConfigurationError

MIB = 1 << 20
ROWS = 50_000
ALIKE = Case([TableCase(ROWS, 32), TableCase(ROWS, 32)], batch_size=64)
OPTANE = hardware_profiles()["optane"]


def profile_of(*lookups: float, rows: int = ROWS, samples: int = 64, names: str = "t", exponents: tuple[float, ...] = ()) -> AccessProfile:
    """A profile whose tables have so many lookups a batch."""
    tables = {
        f"{names}{i}": assumed_access(rows, n, samples, exponents[i] if exponents else 1.05, name=f"{names}{i}")
        for i, n in enumerate(lookups)
    }
    return AccessProfile(tables, "made for a test", "2026-11-26")


def planned(case: Case, ddr: int, pmem: int | None = None, **kwargs: Any) -> tuple[dict[str, dict[str, Any]], PlanSummary]:
    """Rows by table, and the summary."""
    planner = case.planner(ddr, PLENTY, pmem, search_seconds=1, **kwargs)
    plan = planner.plan(case.model(), case.sharders())
    return {row["table"]: row for row in planner.plan_rows(plan)}, planner.summary(plan)


def with_pmem(hardware: HardwareProfile, factor: float) -> HardwareProfile:
    assert hardware.pmem is not None
    rates = {name: getattr(hardware.pmem, name) * factor for name in ("read_bytes_per_s", "write_bytes_per_s")}
    return replace(hardware, pmem=replace(hardware.pmem, **rates))


def with_ssd(hardware: HardwareProfile, factor: float) -> HardwareProfile:
    assert hardware.ssd is not None
    points = tuple(replace(p, operations_per_s=p.operations_per_s * factor) for p in hardware.ssd.points)
    return replace(hardware, ssd=replace(hardware.ssd, points=points))


# -- the machine


def test_a_slow_pmem_gets_no_caches_and_a_fast_one_does() -> None:
    slow_ssd = with_ssd(OPTANE, 0.01)
    fast, _ = planned(ALIKE, 6 * MIB, 4 * MIB, hardware=slow_ssd)
    slow, _ = planned(ALIKE, 6 * MIB, 4 * MIB, hardware=with_pmem(slow_ssd, 1e-6))
    assert sum(row["cache_rows"] or 0 for row in fast.values()) * 132 > 0.8 * 4 * MIB
    assert not any(row["cache_rows"] for row in slow.values())


def test_a_slower_ssd_makes_the_step_slower_and_the_bottleneck() -> None:
    _, fast = planned(ALIKE, 6 * MIB, hardware=OPTANE)
    _, slow = planned(ALIKE, 6 * MIB, hardware=with_ssd(OPTANE, 1e-3))
    assert slow.step_ms > 10 * fast.step_ms
    assert (fast.bottleneck, slow.bottleneck) == ("cpu", "ssd")


def test_where_the_processor_is_slow_at_misses_the_table_with_most_misses_stays_in_memory_whatever_its_bytes() -> None:
    """By reads of the SSD both cost alike, a miss one read: then the table of small rows frees more misses a byte."""
    case = Case([TableCase(20_000, 8, [2.0]), TableCase(20_000, 128, [4.0])], batch_size=64)
    rows, _ = planned(case, 4 * MIB, hardware=with_ssd(OPTANE, 1e-3))
    assert rows["t0"]["kernel"] == "fused"
    assert rows["t1"]["kernel"] == "customized_kernel"


def test_the_plan_says_what_was_measured_and_what_assumed() -> None:
    _, both = planned(ALIKE, 6 * MIB)
    assert [note.split(":")[0] for note in both.notes] == ["assumed hardware", "assumed accesses"]
    _, neither = planned(ALIKE, 6 * MIB, hardware=OPTANE, access=profile_of(64, 64))
    assert neither.notes == ()


def test_a_machine_without_an_ssd_in_its_profile_is_asked_to_measure_one() -> None:
    with pytest.raises(ConfigurationError, match="mtrains calibrate --path"):
        planned(ALIKE, 6 * MIB, hardware=replace(OPTANE, ssd=None))


# -- the accesses


@pytest.mark.parametrize(("lookups", "more", "fewer"), [((640, 64), "t0", "t1"), ((64, 640), "t1", "t0")])
def test_the_table_that_the_profile_says_is_used_more_has_the_larger_pool(lookups: tuple[int, int], more: str, fewer: str) -> None:
    rows, _ = planned(ALIKE, 6 * MIB, access=profile_of(*lookups))
    assert rows[more]["pool_rows"] > 1.5 * rows[fewer]["pool_rows"]
    assert rows[more]["lookups"] == pytest.approx(max(lookups))


def test_of_tables_alike_but_for_their_skew_the_one_that_a_pool_serves_best_goes_above_the_ssd() -> None:
    case = Case([TableCase(20_000, 32), TableCase(20_000, 32)], batch_size=64)
    for exponents, skewed in (((1.4, 0.2), "t0"), ((0.2, 1.4), "t1")):
        access = profile_of(256, 256, rows=20_000, exponents=exponents)
        rows, _ = planned(case, 4 * MIB, access=access, hardware=with_ssd(OPTANE, 1e-2))
        assert [name for name, row in rows.items() if row["kernel"] == "customized_kernel"] == [skewed]
        assert rows[skewed]["hit_ratio"] > 0.9


def test_a_profile_of_other_tables_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="no table 't0', only other0, other1"):
        planned(ALIKE, 6 * MIB, access=profile_of(64, 64, names="other"))
    with pytest.raises(ConfigurationError, match="no table 't1', only t0"):
        planned(ALIKE, 6 * MIB, access=profile_of(64))
    with pytest.raises(ConfigurationError, match=r"'t0' has 100 rows there and 50000 in the model; profile the data of this job"):
        planned(ALIKE, 6 * MIB, access=profile_of(64, 64, rows=100))


def test_shards_of_a_skewed_range_of_rows_are_charged_and_timed_by_their_own_lookups() -> None:
    case = Case([TableCase(40_000, 32, [4.0])], world_size=2, batch_size=64, extra={"t0": {"sharding_types": ["row_wise"]}})
    even = profile_of(512, rows=40_000, samples=128)
    shares = tuple([0.9 / 32] * 32 + [0.1 / 32] * 32)
    skewed = replace(even, tables={"t0": replace(even.table("t0"), lookup_share_by_row_range=shares)})
    schedule = CheckpointSchedule(every_steps=10)
    ssd, busy = {}, {}
    for name, access in (("even", even), ("skewed", skewed)):
        planner = case.planner(1 * MIB, PLENTY, access=access, checkpoints=schedule)
        planner.plan(case.model(), case.sharders())
        (option,) = planner._best_plan
        ssd[name] = [shard.storage.ssd for shard in option.shards]
        busy[name] = [float(option.busy_ms(i).sum()) for i in range(2)]
    assert ssd["even"][0] == ssd["even"][1] == log_bytes(20_000, 132, 256, schedule, snapshots=True)
    assert ssd["skewed"] == pytest.approx([log_bytes(20_000, 132, share * 512, schedule, snapshots=True) for share in (0.9, 0.1)], rel=1e-3)
    assert busy["even"][0] == pytest.approx(busy["even"][1])
    assert busy["skewed"][0] > 2 * busy["skewed"][1]


def test_plans_count_on_the_window_and_on_neighbours_only_where_rows_are_prefetched() -> None:
    access = profile_of(640, 640)

    def use(prefetched: bool) -> Any:
        planner: TieredShardingPlanner = ALIKE.planner(6 * MIB, PLENTY, access=access, prefetched=prefetched)
        plan = planner.plan(ALIKE.model(), ALIKE.sharders())
        assert tiered_tables(plan) == {"t0", "t1"}
        return planner._best_plan[0].uses[0]

    table, records = access.table("t0"), records_per_block(132)
    assert use(True).ssd_curve == curve_over_ssd(table, 64, records)
    assert use(True).curve == table.miss_curve_for(64)
    assert use(False).ssd_curve == use(False).curve == table.miss_curve_for(64, 0)
    pools = [2_000, 5_000, 20_000]
    assert (use(True).reads(pools) < use(True).misses(pools)).all()
    assert (use(True).misses(pools) < use(False).misses(pools)).all()


def test_a_cache_does_not_make_room_for_neighbours_in_the_pool() -> None:
    table = assumed_access(50_000, 2_000, 500)
    curve, over = table.miss_curve_for(500, 8), curve_over_ssd(table, 500, 30, 8)
    use = ShardUse(50_000, 2_000, table.unique_rows_per_batch, 64, 68, curve, 50_000, ssd_curve=over)
    tight, roomy, held = curve.pool_rows[1], curve.pool_rows[6], curve.pool_rows[7]
    assert use.misses(held) - use.reads(held) > 2 * (use.misses(tight) - use.reads(tight))
    assert use.reads(tight, held - tight) > use.reads(roomy, held - roomy)
