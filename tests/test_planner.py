"""The first planner: what always holds of its plans, and what it says when there is none."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec_mtrains.planner import (
    DdrStorageReservation,
    InsufficientStorageError,
    TieredParameterConstraints,
    TieredTopology,
)
from torchrec_mtrains.planner.assignment import Solution, solve
from torchrec_mtrains.planner.choices import Assignment, Choices
from torchrec_mtrains.planner.planners import _sendable
from torchrec_mtrains.planner.search import predicted

from planner_cases import DDR, PLENTY, SSD, Case, TableCase, cases, shards, tiered_tables
from ranks import RankFailureError, Ranks
from torchrec_mtrains import SsdHome
from torchrec_mtrains.errors import ConfigurationError, MTrainsError, UnsupportedError

MANY = settings(max_examples=50, deadline=None)
KIB, MIB = 1 << 10, 1 << 20


def plan_or_none(case: Case, ddr: int, ssd: int | None) -> Any:
    try:
        return case.plan(ddr, ssd)
    except InsufficientStorageError:
        return None


# -- what always holds


def test_a_finer_round_of_the_search_that_ends_without_a_plan_leaves_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search whose work is used up may end where some bytes are still too many."""
    rounds: list[Solution] = []

    def first_fits(choices: Choices, *args: Any, **kwargs: Any) -> Solution:
        found = solve(choices, *args, **kwargs)
        rounds.append(found)
        largest = Assignment(choices.starts[1:] - 1, np.zeros(choices.tables, np.int64))
        return found if len(rounds) == 1 else Solution(largest, math.inf, found.relaxation)

    monkeypatch.setattr("torchrec_mtrains.planner.search.solve", first_fits)
    case = Case([TableCase(50_000, 32), TableCase(60_000, 32)])
    need_ddr, _ = case.needs(case.plan(6 * MIB, PLENTY))
    assert len(rounds) > 1
    assert max(need_ddr.values()) <= 6 * MIB


@MANY
@given(cases(max_world_size=3), DDR, SSD)
def test_no_rank_exceeds_its_budgets(case: Case, ddr: int, ssd: int) -> None:
    plan = plan_or_none(case, ddr, ssd)
    assume(plan is not None)
    need_ddr, need_ssd = case.needs(plan)
    assert max(need_ddr.values()) <= ddr
    assert max(need_ssd.values(), default=0) <= ssd


@MANY
@given(cases(max_world_size=3), DDR)
def test_what_the_plan_says_it_charges_is_within_all_ranks_budgets(case: Case, ddr: int) -> None:
    planner = case.planner(ddr, PLENTY)
    try:
        plan = planner.plan(case.model(), case.sharders())
    except InsufficientStorageError:
        assume(False)
    rows = planner.plan_rows(plan)
    assert {row["table"] for row in rows} == set(plan.plan["ebc"])
    assert sum(row["ddr_bytes"] for row in rows) <= ddr * case.world_size
    assert sum(row["ddr_bytes"] for row in rows) >= sum(case.needs(plan)[0].values())


@MANY
@given(cases(max_world_size=3), DDR)
def test_shards_make_up_their_tables_and_pools_are_legal(case: Case, ddr: int) -> None:
    plan = plan_or_none(case, ddr, PLENTY)
    assume(plan is not None)
    for name, sharding in plan.plan["ebc"].items():
        table = case.tables[int(name[1:])]
        if sharding.sharding_spec is None:
            continue
        spec = sharding.sharding_spec.shards
        assert sum(rows * columns for s in spec for rows, columns in [s.shard_sizes]) == table.rows * table.dim
        assert [s.placement.rank() for s in spec] == sharding.ranks
        if name in tiered_tables(plan):
            assert [s.shard_offsets[0] for s in spec] == [sum(s.shard_sizes[0] for s in spec[:i]) for i in range(len(spec))]
            largest = max(rows for _, rows in shards(case, name, sharding))
            assert case.smallest_pool(name, largest) <= sharding.tiers.pool_rows <= largest
            assert sharding.tiers.home == SsdHome(("/nowhere",), PLENTY)


@MANY
@given(cases(max_world_size=1), st.lists(DDR, min_size=2, max_size=4))
def test_a_bigger_budget_is_never_predicted_to_be_slower(case: Case, budgets: list[int]) -> None:
    """Within 2%: the search is not exact. The bound is exact to what stopping it early costs."""
    step = bound = math.inf
    for ddr in sorted(budgets):
        planner = case.planner(ddr, PLENTY)
        try:
            planner.plan(case.model(), case.sharders())
        except InsufficientStorageError:
            assert step == math.inf, "a bigger budget has no plan"
            continue
        now = planner.prediction.step_ms
        assert now <= 1.02 * step, (ddr, step, now)
        if planner.search_result is None:
            break  # everything fits: TorchRec's plan
        assert planner.search_result.bound_ms <= min(bound, now) * 1.001
        step, bound = now, planner.search_result.bound_ms


@settings(max_examples=20, deadline=None)
@given(cases(max_world_size=3))
def test_when_everything_fits_the_plan_is_torchrecs(case: Case) -> None:
    stock = EmbeddingShardingPlanner(
        topology=Topology(case.world_size, "cpu", ddr_cap=PLENTY, ssd_cap=PLENTY),
        batch_size=case.batch_size,
        constraints=case.constraints(),
        storage_reservation=FixedPercentageStorageReservation(0.0),
    )
    assert case.plan(PLENTY, PLENTY) == stock.plan(case.model(), case.sharders())
    assert case.plan(PLENTY, None) == stock.plan(case.model(), case.sharders())


@MANY
@given(cases(max_world_size=1), DDR, SSD)
def test_on_one_rank_the_shortage_is_exact(case: Case, ddr: int, ssd: int) -> None:
    have = {"ddr": ddr, "ssd": ssd}
    for _ in range(20):
        try:
            case.plan(**have)
            break
        except InsufficientStorageError as error:
            tier, short_bytes = error.tier, error.short_bytes
        assert short_bytes > 0
        with pytest.raises(InsufficientStorageError):
            case.plan(**have | {tier: have[tier] + short_bytes - 1})
        have[tier] += short_bytes
    else:
        pytest.fail("what the errors asked for was given, and there is still no plan")


# -- the search


def test_tables_with_most_lookups_per_byte_stay_in_memory() -> None:
    case = Case([TableCase(20_000, 32, [4.0]), TableCase(20_000, 32), TableCase(2_000, 32)])
    plan = case.plan(4 * MIB, PLENTY)
    assert tiered_tables(plan) == {"t1"}


def test_of_two_tables_the_one_with_more_lookups_has_more_rows_in_its_pool() -> None:
    case = Case([TableCase(50_000, 32, [3.0]), TableCase(50_000, 32, [1.0])])
    chains = {name: s.tiers for name, s in case.plan(6 * MIB, PLENTY).plan["ebc"].items()}
    assert chains["t0"].pool_rows > 1.5 * chains["t1"].pool_rows


def test_no_slots_that_one_pool_gives_another_make_the_step_faster() -> None:
    """What the proportion of lookups was for the first planner: the curves of both are as steep where their pools end."""
    case = Case([TableCase(50_000, 32, [3.0]), TableCase(50_000, 32, [1.0])])
    planner = case.planner(6 * MIB, PLENTY, search_seconds=2)
    planner.plan(case.model(), case.sharders())
    first, second = planner._best_plan
    step_ms = planner.prediction.step_ms
    for part in (-0.5, -0.2, -0.05, 0.05, 0.2, 0.5):
        moved = round(part * min(first.pool_rows, second.pool_rows))
        other = [first.resized(first.pool_rows + moved), second.resized(second.pool_rows - moved)]
        assert sum(o.total_storage.ddr for o in other) == sum(o.total_storage.ddr for o in (first, second))
        for option, old in zip(other, (first, second), strict=True):
            option.shards[0].rank = old.shards[0].rank
        assert predicted(other, planner._model, 1).step_ms >= 0.99 * step_ms


def test_a_table_too_large_for_a_rank_is_split_by_rows() -> None:
    case = Case([TableCase(100_000, 4)], world_size=2)
    sharding = case.plan(1 * MIB, PLENTY).plan["ebc"]["t0"]
    assert sharding.sharding_type == "row_wise"
    assert [s.shard_sizes for s in sharding.sharding_spec.shards] == [[50_000, 4], [50_000, 4]]
    assert sharding.ranks == [0, 1]


def test_all_but_a_sliver_of_the_budget_is_used() -> None:
    case = Case([TableCase(100_000, 16), TableCase(100_000, 64)])
    planner = case.planner(8 * MIB, PLENTY)
    rows = planner.plan_rows(planner.plan(case.model(), case.sharders()))
    used = sum(row["ddr_bytes"] for row in rows) + planner._enumerator.waiting_ids.of_rank
    assert 8 * MIB - 2 * KIB < used <= 8 * MIB


# -- constraints and reservations


def test_constraints_keep_a_table_on_the_ssd_or_in_memory() -> None:
    case = Case([TableCase(1000, 8), TableCase(1000, 8)], extra={"t0": {"compute_kernels": ["customized_kernel"]}})
    assert tiered_tables(case.plan(PLENTY, PLENTY)) == {"t0"}
    case = Case([TableCase(10_000, 8), TableCase(10_000, 8)], extra={"t0": {"compute_kernels": ["fused"]}})
    assert tiered_tables(case.plan(600 * KIB, PLENTY)) == {"t1"}


def test_row_wise_sharding_can_be_asked_for() -> None:
    case = Case([TableCase(10_000, 8)], world_size=2, extra={"t0": {"sharding_types": ["row_wise"]}})
    plan = case.plan(140 * KIB, PLENTY)
    assert plan.plan["ebc"]["t0"].sharding_type == "row_wise"
    assert tiered_tables(plan) == {"t0"}


def test_min_pool_rows_is_kept() -> None:
    """With just the memory that the smallest pools take, which is a byte more than too little, no pool is larger than asked."""
    case = Case([TableCase(50_000, 32), TableCase(50_000, 32)], extra={"t0": {"min_pool_rows": 30_000}})
    just, plan = 6 * MIB, None
    while plan is None:
        try:
            plan = case.plan(just, PLENTY)
        except InsufficientStorageError as error:
            just += error.short_bytes
    chains = {name: s.tiers for name, s in plan.plan["ebc"].items()}
    assert (chains["t0"].pool_rows, chains["t1"].pool_rows) == (30_000, case.batch_size)
    with pytest.raises(InsufficientStorageError):
        case.plan(just - 1, PLENTY)
    assert case.plan(7 * MIB, PLENTY).plan["ebc"]["t0"].tiers.pool_rows >= 30_000
    case.extra["t0"]["min_pool_rows"] = 1
    assert case.plan(7 * MIB, PLENTY).plan["ebc"]["t0"].tiers.pool_rows < 30_000, "the tables are alike"
    case.batch_size = 2000
    case.plan(4 * MIB, PLENTY, lookahead_bytes=0)


def test_tables_that_cannot_be_tiered_stay_in_memory_or_are_refused() -> None:
    case = Case([TableCase(50_000, 6)])
    with pytest.raises(InsufficientStorageError, match="t0"):
        case.plan(1 * MIB, PLENTY)
    case.extra = {"t0": {"compute_kernels": ["customized_kernel"]}}
    with pytest.raises(ConfigurationError, match=r"t0.*no way to keep it"):
        case.plan(PLENTY, PLENTY)
    case = Case([TableCase(50_000, 8)], optimizer=EmbOptimType.ADAM)
    with pytest.raises(InsufficientStorageError, match="t0"):
        case.plan(1 * MIB, PLENTY)


def test_the_optimizer_given_to_the_sharder_is_charged_in_memory_too() -> None:
    case = Case([TableCase(10_000, 16)], optimizer=EmbOptimType.EXACT_ADAGRAD, extra={"t0": {"sharding_types": ["table_wise"]}})
    assert tiered_tables(case.plan(1000 * KIB, PLENTY)) == {"t0"}
    case.optimizer = EmbOptimType.EXACT_SGD
    assert tiered_tables(case.plan(1000 * KIB, PLENTY)) == set()


def test_a_reservation_is_kept_from_the_tables() -> None:
    case = Case([TableCase(20_000, 32), TableCase(20_000, 32)])
    plan = case.plan(6 * MIB, PLENTY, storage_reservation=DdrStorageReservation(2 * MIB))
    assert max(case.needs(plan)[0].values()) <= 4 * MIB
    with pytest.raises(ConfigurationError, match="nothing is left"):
        case.plan(2 * MIB, PLENTY, storage_reservation=DdrStorageReservation(2 * MIB))


def test_a_tables_features_each_bring_their_lookups() -> None:
    class Unconstrained(Case):
        def constraints(self) -> Any:
            return None

    planner = (case := Unconstrained([TableCase(300_000, 8, [1.0, 1.0, 1.0])], batch_size=1000)).planner(8 * MIB, PLENTY, lookahead_bytes=0)
    plan = planner.plan(case.model(), case.sharders())
    assert plan.plan["ebc"]["t0"].tiers.pool_rows >= planner._best_plan[0].min_pool_rows == 3000


# -- errors


@pytest.mark.parametrize(
    ("case", "ddr", "ssd", "tier", "says"),
    [
        (Case([TableCase(50_000, 32)]), 1 * MIB, None, "ddr", "'t0' needs"),
        (Case([TableCase(50_000, 32)]), 500 * KIB, PLENTY, "ddr", "'t0' needs"),
        (Case([TableCase(50_000, 32)] * 3), 1 * MIB, PLENTY, "ddr", "even with the smallest pools"),
        (Case([TableCase(50_000, 32)]), 2 * MIB, 1 * MIB, "ssd", "'t0' needs"),
        (Case([TableCase(50_000, 32)] * 3), 4 * MIB, 60 * MIB, "ssd", "do not fit in memory need"),
    ],
)
def test_what_is_too_small_is_named_with_its_bytes(case: Case, ddr: int, ssd: int | None, tier: str, says: str) -> None:
    with pytest.raises(InsufficientStorageError, match=says) as caught:
        case.plan(ddr, ssd)
    assert caught.value.tier == tier
    assert f"{tier} is {caught.value.short_bytes} bytes short" in str(caught.value)
    assert isinstance(caught.value, MTrainsError)
    assert isinstance(caught.value, PlannerError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.tier, again.short_bytes) == (str(caught.value), tier, caught.value.short_bytes)


def test_a_topology_that_cannot_work_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="mtia"):
        TieredTopology(1, "mtia", ddr_budget_bytes=1)
    with pytest.raises(ConfigurationError, match="ddr_budget_bytes"):
        TieredTopology(1, ddr_budget_bytes=0)
    with pytest.raises(ConfigurationError, match="ddr_bytes"):
        DdrStorageReservation(-1)


# -- what people read


def test_the_plan_is_described_table_by_table() -> None:
    case = Case([TableCase(50_000, 32), TableCase(100, 8)])
    planner = case.planner(2 * MIB, PLENTY)
    plan = planner.plan(case.model(), case.sharders())
    console = Console(width=240)
    with console.capture() as capture:
        console.print(planner.describe(plan))
    text = capture.get()
    assert f"{plan.plan['ebc']['t0'].tiers.pool_rows:,}" in text
    assert "most time saved a byte" in text
    with pytest.raises(ConfigurationError, match="last plan"):
        planner.plan_rows(case.plan(2 * MIB, PLENTY))


def test_the_plan_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="torchrec_mtrains.planner.stats"):
        Case([TableCase(50_000, 32)]).plan(2 * MIB, PLENTY)
    assert "predicted step" in caplog.text


def test_min_pool_rows_is_part_of_the_constraints_hash() -> None:
    assert hash(TieredParameterConstraints(min_pool_rows=1)) != hash(TieredParameterConstraints(min_pool_rows=2))


# -- ranks, and laptops


def _collective(ddr: int) -> tuple[Any, Any]:
    import torch.distributed as dist

    case = Case([TableCase(50_000, 32), TableCase(50_000, 32)], world_size=2)
    planner = case.planner(ddr, PLENTY)
    plan = planner.collective_plan(case.model(), case.sharders(), dist.group.WORLD)
    return plan, planner.plan_rows(plan)


def _collective_error(ddr: int) -> Any:
    try:
        return _collective(ddr)
    except InsufficientStorageError as error:
        return error.short_bytes


def test_every_rank_gets_rank_0s_plan_or_its_error() -> None:
    ranks = Ranks(2)
    try:
        (plan, rows), (other_plan, other_rows) = ranks.run(_collective, 2 * MIB)
        assert plan == other_plan
        assert rows == other_rows
        assert tiered_tables(plan) == {"t0", "t1"}
        first, second = ranks.run(_collective_error, 100 * KIB)
        assert first == second > 0
        with pytest.raises(RankFailureError, match="ddr is"):
            ranks.run(_collective, 100 * KIB)
    finally:
        ranks.close()


def test_an_error_that_cannot_be_pickled_reaches_the_other_ranks_in_words() -> None:
    class Local(Exception):
        pass

    error = _sendable(Local("too small"))
    assert isinstance(error, RuntimeError)
    assert "Local on the rank that plans: too small" in str(error)
    shortage = InsufficientStorageError("no plan", "ddr", 5)
    assert _sendable(shortage) is shortage


def test_an_enumerator_that_knows_no_tiers_is_refused() -> None:
    case = Case([TableCase(50_000, 32)])
    with pytest.raises(ConfigurationError, match="must be a TieredEnumerator, got EmbeddingEnumerator"):
        case.planner(2 * MIB, PLENTY, enumerator=EmbeddingEnumerator(Topology(1, "cpu"), 8))


def test_planning_needs_no_native_core() -> None:
    program = """
import sys
sys.modules["torchrec_mtrains.kernels._core"] = None
from planner_cases import PLENTY, Case, TableCase, tiered_tables
assert tiered_tables(Case([TableCase(50_000, 32)]).plan(2 << 20, PLENTY)) == {"t0"}
assert not [name for name in sys.modules if name.startswith("torchrec_mtrains.kernels")and name != "torchrec_mtrains.kernels._core"]
"""
    subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {sys.path[0]!r})\n{program}"], check=True)
