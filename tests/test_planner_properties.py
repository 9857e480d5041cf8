"""What holds of any plan: nothing is slower with more or faster parts, bytes add up, and no plan is worse than TorchRec's own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.planner.types import PlannerError
from torchrec_mtrains.planner import (
    DdrStorageReservation,
    HardwareProfile,
    InsufficientStorageError,
    TieredPartitioner,
    TieredShardingPlanner,
    TieredStorageEstimator,
    hardware_profiles,
)
from torchrec_mtrains.planner.estimators import uncharged_bytes
from torchrec_mtrains.planner.storage import bytes_in

from planner_cases import DDR, PLENTY, Case, cases

SOME = settings(max_examples=25, deadline=None)
SEARCH_TOLERANCE = 1.02
"""The search is not exact: more may be predicted so much slower. The model is exact (tests/test_perf_model.py)."""
OPTANE = hardware_profiles()["optane"]
PMEM_BYTES = st.integers(1, 6 << 20)


def planned(case: Case, ddr: int, pmem: int | None = None, **kwargs: Any) -> TieredShardingPlanner:
    """A planner that has planned; examples without a plan are left out."""
    planner = case.planner(ddr, PLENTY, pmem, **kwargs)
    try:
        planner.plan(case.model(), case.sharders())
    except InsufficientStorageError:
        assume(False)
    return planner


def faster(hardware: HardwareProfile, part: str, factor: float) -> HardwareProfile:
    """The same machine with one part so much faster."""
    if part == "ssd":
        assert hardware.ssd is not None
        points = tuple(replace(p, operations_per_s=p.operations_per_s * factor) for p in hardware.ssd.points)
        return replace(hardware, ssd=replace(hardware.ssd, points=points))
    if part == "kernel":
        names = ("cpu_ns_per_lookup", "cpu_ns_per_miss", "cpu_ns_per_io", "cpu_ns_per_write_back", "tbe_forward_ns_per_byte")
        return replace(hardware, kernel=replace(hardware.kernel, **{n: getattr(hardware.kernel, n) / factor for n in names}))
    memory = getattr(hardware, part)
    rates = {n: getattr(memory, n) * factor for n in ("read_bytes_per_s", "write_bytes_per_s")}
    return replace(hardware, **{part: replace(memory, **rates)})


@SOME
@given(cases(max_world_size=3), DDR, PMEM_BYTES, st.floats(1, 100), st.sampled_from(["ddr", "pmem", "ssd", "kernel"]))
def test_faster_parts_never_make_the_predicted_step_slower(case: Case, ddr: int, pmem: int, factor: float, part: str) -> None:
    slow = planned(case, ddr, pmem, hardware=OPTANE)
    fast = planned(case, ddr, pmem, hardware=faster(OPTANE, part, factor))
    assert fast.prediction.step_ms <= SEARCH_TOLERANCE * slow.prediction.step_ms


@SOME
@given(cases(max_world_size=1), DDR, PMEM_BYTES, PMEM_BYTES)
def test_more_pmem_never_makes_the_predicted_step_slower(case: Case, ddr: int, one: int, other: int) -> None:
    less, more = (planned(case, ddr, pmem, hardware=OPTANE) for pmem in (min(one, other), max(one, other)))
    assert more.prediction.step_ms <= SEARCH_TOLERANCE * less.prediction.step_ms
    if less.search_result is not None and more.search_result is not None:
        assert more.search_result.bound_ms <= 1.001 * min(less.search_result.bound_ms, more.prediction.step_ms)


@SOME
@given(cases(max_world_size=3), DDR, PMEM_BYTES)
def test_bytes_of_ranks_and_of_tables_add_up_to_the_same_and_no_rank_has_more_than_its_own(case: Case, ddr: int, pmem: int) -> None:
    planner = planned(case, ddr, pmem)
    per_rank: dict[str, Counter[int]] = {tier: Counter() for tier in ("ddr", "pmem", "ssd")}
    for option in planner._best_plan:
        for shard, missing in zip(option.shards, uncharged_bytes(option), strict=True):
            for tier, on_rank in per_rank.items():
                on_rank[shard.rank] += bytes_in(shard.storage, tier) + (missing if tier == "ddr" else 0)
    rows = planner.described(planner._best_plan)
    for tier, on_rank in per_rank.items():
        assert sum(row[f"{tier}_bytes"] for row in rows) == sum(on_rank.values())
        for device in planner._topology.devices:
            assert on_rank[device.rank] <= bytes_in(device.storage, tier)


@SOME
@given(cases(max_world_size=3), DDR)
def test_without_an_ssd_a_plan_is_no_worse_than_torchrecs_by_torchrecs_own_rating(case: Case, ddr: int) -> None:
    """Of those that fit with the optimizer's state, which TorchRec's estimates leave out."""
    topology, constraints = Topology(case.world_size, "cpu", ddr_cap=ddr, ssd_cap=0), case.constraints()
    estimators = [EmbeddingPerfEstimator(topology=topology, constraints=constraints), TieredStorageEstimator(topology, constraints)]
    stock = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=case.batch_size,
        enumerator=EmbeddingEnumerator(topology, case.batch_size, constraints, estimators),
        constraints=constraints,
        partitioner=TieredPartitioner(),
        storage_reservation=DdrStorageReservation(),
    )
    try:
        stock.plan(case.model(), case.sharders())
    except PlannerError:
        assume(False)
    ours = case.planner(ddr, None)
    ours.plan(case.model(), case.sharders())
    rating = NoopPerfModel(topology=topology)
    assert rating.rate(ours._best_plan) <= rating.rate(stock._best_plan) * (1 + 1e-9)
