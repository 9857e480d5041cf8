"""Caches in the planner's plans: when a table gets one, how large it is, and that nothing else pays for it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console
from torchrec_mtrains.planner import InsufficientStorageError, PmemDevice, TieredTopology
from torchrec_mtrains.planner.charges import cache_index_bytes, slot_bytes
from torchrec_mtrains.planner.pmem_caches import Uncached, cache_rows, share

from planner_cases import PLENTY, Case, TableCase, cases, shards, tiered_tables
from torchrec_mtrains import PmemCache
from torchrec_mtrains.errors import ConfigurationError

KIB, MIB = 1 << 10, 1 << 20
MANY = settings(max_examples=50, deadline=None)


def cached_rows(plan: Any) -> dict[str, int]:
    """Rows of each tiered table's cache, 0 for none."""
    chains = {name: s.tiers for name, s in plan.plan["ebc"].items() if name in tiered_tables(plan)}
    return {name: sum(cache.rows for cache in chain.caches) for name, chain in chains.items()}


@MANY
@given(cases(max_world_size=3), st.integers(1, 3 << 20), st.integers(1, 6 << 20))
def test_no_rank_exceeds_its_memory_or_its_pmem(case: Case, ddr: int, pmem: int) -> None:
    try:
        plan = case.plan(ddr, PLENTY, pmem)
    except InsufficientStorageError:
        assume(False)
    need_ddr, need_pmem, _ = case.needs_of_tiers(plan)
    assert max(need_ddr.values()) <= ddr
    assert max(need_pmem.values(), default=0) <= pmem


@MANY
@given(cases(max_world_size=3), st.integers(1, 3 << 20), st.integers(1, 6 << 20))
def test_pmem_changes_neither_whether_there_is_a_plan_nor_what_it_says_of_ssds(case: Case, ddr: int, pmem: int) -> None:
    without = case.planner(ddr, PLENTY)
    try:
        without.plan(case.model(), case.sharders())
    except InsufficientStorageError as error:
        with pytest.raises(InsufficientStorageError, match=f"{error.short_bytes} bytes short"):
            case.plan(ddr, PLENTY, pmem)
        return
    planner = case.planner(ddr, PLENTY, pmem)
    plan = planner.plan(case.model(), case.sharders())
    assert planner.prediction.step_ms <= 1.02 * without.prediction.step_ms  # the search is not exact
    for name, sharding in plan.plan["ebc"].items():
        if name in tiered_tables(plan):
            assert sharding.tiers.home.capacity_bytes == PLENTY
            assert all(isinstance(cache, PmemCache) and cache.path == "/pmem" for cache in sharding.tiers.caches)


@MANY
@given(cases(max_world_size=3), st.integers(1, 3 << 20), st.integers(1, 6 << 20))
def test_a_cache_never_costs_more_rows_in_pools_than_it_holds(case: Case, ddr: int, pmem: int) -> None:
    try:
        plan = case.plan(ddr, PLENTY, pmem)
    except InsufficientStorageError:
        assume(False)
    for name, rows in cached_rows(plan).items():
        record = case.record_bytes(name)
        for _, of_shard in shards(case, name, plan.plan["ebc"][name]):
            if rows:
                assert min(rows, of_shard) * slot_bytes(record) > cache_index_bytes(of_shard, rows)


def test_pool_and_cache_hold_a_whole_table_where_there_is_room() -> None:
    case = Case([TableCase(50_000, 32)])
    plan = case.plan(3 * MIB, PLENTY, pmem=64 * MIB)
    chain = plan.plan["ebc"]["t0"].tiers
    assert 50_000 * 0.95 < chain.pool_rows + chain.caches[0].rows <= 50_000


def test_caches_take_what_they_can_use_of_a_device() -> None:
    """Not to the last byte, as pools do of DDR: a cached row costs DDR, which may be worth more in a pool."""
    case = Case([TableCase(50_000, 32, [3.0]), TableCase(50_000, 32, [1.0])])
    rows = cached_rows(case.plan(3 * MIB, PLENTY, pmem=4 * MIB, search_seconds=2))
    assert sum(rows.values()) * 132 > 0.9 * 4 * MIB
    rows = cached_rows(case.plan(5 * MIB, PLENTY, pmem=9 * MIB, search_seconds=2))
    assert sum(rows.values()) * 132 > 0.9 * 9 * MIB


def test_all_but_a_sliver_of_the_memory_is_used_beside_caches() -> None:
    case = Case([TableCase(100_000, 16), TableCase(100_000, 64)])
    planner = case.planner(8 * MIB, PLENTY, 16 * MIB, search_seconds=2)
    rows = planner.plan_rows(planner.plan(case.model(), case.sharders()))
    assert all(row["cache_rows"] for row in rows)
    taken = planner._enumerator.waiting_ids.of_rank + sum(row["ddr_bytes"] for row in rows)
    assert 8 * MIB - 2 * KIB < taken <= 8 * MIB
    assert 0.95 * 16 * MIB < sum(row["pmem_bytes"] for row in rows) <= 16 * MIB


def test_a_device_too_small_for_the_index_that_it_needs_is_left_out_and_the_plan_says_so() -> None:
    case = Case([TableCase(50_000, 32)])
    planner = case.planner(2 * MIB, PLENTY, pmem=100 * KIB)  # 775 rows, whose index would hold 1,400 in the pool
    plan = planner.plan(case.model(), case.sharders())
    assert plan == case.plan(2 * MIB, PLENTY)
    (row,) = planner.plan_rows(plan)
    assert row["cache_rows"] is None
    assert "a cache's index costs more than it holds" in row["why"]


def test_caches_shrink_to_the_memory_that_their_indexes_find() -> None:
    case = Case([TableCase(50_000, 32)])
    with pytest.raises(InsufficientStorageError) as least:
        case.plan(1, PLENTY)
    budget = 1 + least.value.short_bytes
    assert cached_rows(case.plan(budget, PLENTY, pmem=64 * MIB)) == {"t0": 0}
    assert cached_rows(case.plan(budget + 190 * KIB, PLENTY, pmem=64 * MIB)) == {"t0": 0}  # 195 for the cache's map alone
    assert 0 < cached_rows(case.plan(2 * budget, PLENTY, pmem=64 * MIB))["t0"] < 49_000


def test_the_plan_shows_caches_with_their_rows_and_bytes() -> None:
    case = Case([TableCase(50_000, 32)])
    planner = case.planner(2 * MIB, PLENTY, pmem=4 * MIB)
    plan = planner.plan(case.model(), case.sharders())
    console = Console(width=140)
    with console.capture() as capture:
        console.print(planner.describe(plan))
    text = capture.get()
    assert f"{plan.plan['ebc']['t0'].tiers.caches[0].rows:,}" in text
    assert "of 4 MiB" in text


def test_pmem_without_an_ssd_or_a_size_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="there is no ssd"):
        TieredTopology(1, ddr_budget_bytes=1, pmem=PmemDevice("/pmem", 1))
    with pytest.raises(ConfigurationError, match="capacity_bytes be positive"):
        PmemDevice("/pmem", 0)


@given(
    st.integers(0, 1 << 50),
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 1 << 45)), max_size=6),
)
def test_a_share_is_in_proportion_up_to_what_each_can_use(room: int, members: list[tuple[float, int]]) -> None:
    weights, most = [w for w, _ in members], [m for _, m in members]
    parts = share(room, weights, most)
    assert all(0 <= part <= limit for part, limit in zip(parts, most, strict=True))
    assert sum(parts) <= room
    wanting = [i for i in range(len(most)) if weights[i] > 1e-3 and parts[i] < most[i]]
    for i in wanting:  # rounding down leaves at most a byte a member to the others
        for j in wanting:
            assert parts[i] / weights[i] == pytest.approx(parts[j] / weights[j], rel=1e-6, abs=len(most) / min(weights[i], weights[j]))
    if wanting:
        assert sum(parts) >= room - len(most) - room * 1e-6


def test_a_table_without_lookups_or_rows_below_its_pool_gets_no_cache() -> None:
    shards = [Uncached(1000, 0, 68, 5.0), Uncached(1000, 900, 68, 0.0), Uncached(1000, 900, 68, 5.0)]
    assert cache_rows(shards, 1 << 20) == [0, 0, 900]
