"""Plans for GPUs: what always holds of them, which kernel a table gets, and what the model says of measured steps. Needs no GPU."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchrec.distributed.types import ShardingPlan
from torchrec_mtrains.planner import (
    InsufficientStorageError,
    MissCurve,
    PmemDevice,
    TieredShardingPlanner,
    TieredTopology,
    gpu_charges,
    hardware_profiles,
)
from torchrec_mtrains.planner.gpu_charges import pool_bytes
from torchrec_mtrains.planner.gpu_perf_model import GpuPerfModel
from torchrec_mtrains.planner.perf_model import ShardUse
from torchrec_mtrains.planner.records import state_bytes_per_row

from planner_cases import PLENTY, Case, TableCase, cases, shards
from torchrec_mtrains import DdrCache, DdrHome, SsdHome, TieredParameterSharding
from torchrec_mtrains.errors import ConfigurationError, UnsupportedError

MANY = settings(max_examples=30, deadline=None)
MIB = 1 << 20
OPTIMIZERS = (EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.ADAM, EmbOptimType.PARTIAL_ROWWISE_ADAM)
UVM, OURS = "fused_uvm_caching", "customized_kernel"


def planner(case: Case, hbm: int, ddr: int = PLENTY, ssd: int | None = PLENTY, **kwargs: Any) -> TieredShardingPlanner:
    home = None if ssd is None else SsdHome(("/nowhere",), ssd)
    topology = TieredTopology(case.world_size, "cuda", ddr_budget_bytes=ddr, hbm_budget_bytes=hbm, ssd=home)
    kwargs.setdefault("search_seconds", 0.05)
    return TieredShardingPlanner(topology, batch_size=case.batch_size, constraints=case.constraints(), **kwargs)


def state_bytes(case: Case, name: str) -> int:
    return state_bytes_per_row(case.optimizer.name, case.tables[int(name[1:])].dim, "cuda") or 0


def needs(case: Case, plan: ShardingPlan) -> dict[str, dict[int, int]]:
    """Bytes that the tables take of each tier on every rank, without batches and without overhead of logs; from the plan alone."""
    need: dict[str, dict[int, int]] = {tier: defaultdict(int) for tier in ("hbm", "ddr", "ssd")}
    for name, sharding in plan.plan["ebc"].items():
        weights, state = 4 * case.tables[int(name[1:])].dim, state_bytes(case, name)
        record = weights + state
        rowwise = 4 if "ROWWISE" in case.optimizer.name else 0
        for rank, rows in shards(case, name, sharding):
            if isinstance(sharding, TieredParameterSharding):
                cache = sharding.tiers.caches[0] if sharding.tiers.caches else None
                places = cache.rows if isinstance(cache, DdrCache) else rows
                need["hbm"][rank] += pool_bytes(rows, record, sharding.tiers.pool_rows, places, 0)
                need["ddr"][rank] += min(rows, places) * record + (0 if isinstance(sharding.tiers.home, DdrHome) else 8 * rows)
                need["ssd"][rank] += 0 if isinstance(sharding.tiers.home, DdrHome) else rows * record
            elif sharding.compute_kernel == UVM:
                cached = math.floor(rows * sharding.cache_params.load_factor)
                need["hbm"][rank] += rows * (4 + rowwise) + cached * (weights + 20)
                need["ddr"][rank] += rows * (record - rowwise)
            else:
                need["hbm"][rank] += rows * record
    return need


def shortage(case: Case, have: dict[str, int]) -> InsufficientStorageError | None:
    try:
        planner(case, **have).plan(case.model(), case.sharders())
    except InsufficientStorageError as error:
        return error
    return None


# -- what always holds


@MANY
@given(cases(3, OPTIMIZERS), st.integers(1, 8 * MIB), st.integers(1, 20 * MIB), st.integers(1, 40 * MIB) | st.none())
def test_no_rank_exceeds_any_tier(case: Case, hbm: int, ddr: int, ssd: int | None) -> None:
    try:
        plan = planner(case, hbm, ddr, ssd).plan(case.model(), case.sharders())
    except InsufficientStorageError:
        assume(False)
    need = needs(case, plan)
    assert max(need["hbm"].values()) <= hbm
    assert max(need["ddr"].values(), default=0) <= ddr
    assert max(need["ssd"].values(), default=0) <= (ssd or 0)


@MANY
@given(cases(3, OPTIMIZERS), st.integers(1, 4 * MIB), st.integers(1, 20 * MIB))
def test_dmp_gets_what_it_can_take(case: Case, hbm: int, ddr: int) -> None:
    try:
        plan = planner(case, hbm, ddr).plan(case.model(), case.sharders())
    except InsufficientStorageError:
        assume(False)
    for name, sharding in plan.plan["ebc"].items():
        if sharding.sharding_spec is None:
            continue
        placements = [shard.placement for shard in sharding.sharding_spec.shards]
        assert [p.rank() for p in placements] == sharding.ranks
        assert all(p.device().type == "cuda" for p in placements)
        rows = max(rows for _, rows in shards(case, name, sharding))
        if isinstance(sharding, TieredParameterSharding):
            assert case.smallest_pool(name, rows) <= sharding.tiers.pool_rows <= rows
            assert len(sharding.tiers.tiers) == (1 if isinstance(sharding.tiers.home, DdrHome) else 2)
            for cache in sharding.tiers.caches:
                assert isinstance(cache, DdrCache)
                assert cache.rows >= sharding.tiers.pool_rows
        elif sharding.compute_kernel == UVM:
            assert 0 < sharding.cache_params.load_factor < 1
        else:
            assert sharding.compute_kernel == "fused"


@MANY
@given(cases(1, OPTIMIZERS), st.lists(st.integers(1, 8 * MIB), min_size=2, max_size=4), st.integers(1, 20 * MIB))
def test_more_hbm_is_never_predicted_to_be_slower(case: Case, budgets: list[int], ddr: int) -> None:
    """Within 2%: the search is not exact."""
    step = math.inf
    for hbm in sorted(budgets):
        planning = planner(case, hbm, ddr)
        try:
            planning.plan(case.model(), case.sharders())
        except InsufficientStorageError:
            assert step == math.inf, "more HBM has no plan"
            continue
        now = planning.prediction.step_ms
        assert now <= 1.02 * step, (hbm, step, now)
        step = now


@settings(max_examples=20, deadline=None)
@given(cases(3, OPTIMIZERS))
def test_where_all_fits_all_is_fused(case: Case) -> None:
    plan = planner(case, PLENTY).plan(case.model(), case.sharders())
    assert {s.compute_kernel for s in plan.plan["ebc"].values()} <= {"fused", "dense"}


@MANY
@given(cases(1, OPTIMIZERS), st.integers(1, 4 * MIB), st.integers(1, 4 * MIB))
def test_what_is_short_is_enough_when_it_is_given(case: Case, hbm: int, ddr: int) -> None:
    have = {"hbm": hbm, "ddr": ddr, "ssd": 1}
    for _ in range(12):
        short = shortage(case, have)
        if short is None:
            return
        assert short.short_bytes > 0
        have[short.tier] += short.short_bytes
    pytest.fail(f"what the errors asked for was given, and there is still no plan: {have}")


def least_hbm(case: Case) -> int:
    """Of a rank, below which there is no plan."""
    have = {"hbm": 1, "ddr": PLENTY, "ssd": PLENTY}
    while short := shortage(case, have):
        have["hbm"] += short.short_bytes
    return have["hbm"]


def test_each_table_is_charged_for_its_part_of_the_graphs_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def case(sharding: str, ranks: int) -> Case:
        asked = {"compute_kernels": [OURS], "sharding_types": [sharding]}
        return Case([TableCase(100_000, 64, [20.0]), TableCase(100_000, 8, [5.0])], ranks, 256, extra={"t0": asked, "t1": asked})

    with_graphs = [least_hbm(case("table_wise", 1)), least_hbm(case("row_wise", 2))]
    monkeypatch.setattr(gpu_charges, "graph_bytes", lambda *_: 0)
    of_graphs = [a - least_hbm(c) for a, c in zip(with_graphs, (case("table_wise", 1), case("row_wise", 2)), strict=True)]
    outputs, ids = (256 * 64 * 4, 256 * 8 * 4), (256 * 20, 256 * 5)
    assert of_graphs == [sum(o + max(o, 44 * n) for o, n in zip(outputs, ids, strict=True)), 0]


# -- which kernel


def alone(kernel: str | None, optimizer: EmbOptimType, rows: int, pooling: float, batch_size: int) -> Case:
    extra = {} if kernel is None else {"t0": {"compute_kernels": [kernel]}}
    return Case([TableCase(rows, 64, [pooling])], batch_size=batch_size, optimizer=optimizer, extra=extra)


@MANY
@given(
    st.sampled_from(OPTIMIZERS), st.integers(1_000, 2_000_000), st.sampled_from([0.5, 2.0, 8.0]), st.sampled_from([64, 1024]),
    st.floats(0.02, 0.95),
)  # fmt: skip
def test_a_table_gets_the_kernel_that_is_predicted_to_be_fastest(
    optimizer: EmbOptimType, rows: int, pooling: float, batch_size: int, share: float
) -> None:
    """Alone, below HBM: what any of them would do when asked for is not faster, within 2%."""
    free = alone(None, optimizer, rows, pooling, batch_size)
    hbm = round(share * rows * (256 + (state_bytes(free, "t0"))))
    steps: dict[str | None, float] = {}
    for kernel in (None, OURS, UVM):
        case = alone(kernel, optimizer, rows, pooling, batch_size)
        planning = planner(case, hbm)
        try:
            plan = planning.plan(case.model(), case.sharders())
        except InsufficientStorageError:
            steps[kernel] = math.inf
            continue
        assert kernel in (None, plan.plan["ebc"]["t0"].compute_kernel)
        steps[kernel] = planning.prediction.step_ms
    best = min(steps[OURS], steps[UVM])
    if math.isinf(best):
        assert math.isinf(steps[None])
    else:
        assert steps[None] <= 1.02 * best


def test_ours_takes_large_batches_and_uvm_caching_pools_too_small_for_one() -> None:
    for optimizer in (EmbOptimType.EXACT_SGD, EmbOptimType.ADAM):
        case = alone(None, optimizer, 5_000_000, 20.0, 4096)
        record = 256 + state_bytes(case, "t0")
        assert planner(case, 1_000_000 * record).plan(case.model(), case.sharders()).plan["ebc"]["t0"].compute_kernel == OURS
        case.extra = {"t0": {"min_pool_rows": 900_000}}
        tight = planner(case, 330_000 * record).plan(case.model(), case.sharders()).plan["ebc"]["t0"]
        assert tight.compute_kernel == UVM


def test_an_optimizer_that_ours_lacks_leaves_uvm_caching() -> None:
    case = alone(None, EmbOptimType.LARS_SGD, 1_000_000, 8.0, 256)
    assert planner(case, 100 * MIB).plan(case.model(), case.sharders()).plan["ebc"]["t0"].compute_kernel == UVM
    case.extra = {"t0": {"compute_kernels": [OURS]}}
    with pytest.raises(ConfigurationError, match=r"t0.*no way to keep it"):
        planner(case, 100 * MIB).plan(case.model(), case.sharders())


def test_rows_go_to_the_ssd_only_where_ddr_has_no_room_for_them() -> None:
    case = alone(OURS, EmbOptimType.EXACT_SGD, 1_000_000, 8.0, 256)
    roomy = planner(case, 60 * MIB).plan(case.model(), case.sharders()).plan["ebc"]["t0"].tiers
    held = roomy.pool_rows + sum(cache.rows for cache in roomy.caches)
    assert roomy.tiers == (DdrHome(),) or held >= 1_000_000  # in DDR, or above an SSD that keeps nothing
    tight = planner(case, 60 * MIB, ddr=100 * MIB).plan(case.model(), case.sharders()).plan["ebc"]["t0"].tiers
    assert tight.home == SsdHome(("/nowhere",), PLENTY)
    assert tight.caches[0].rows > 200_000
    with pytest.raises(InsufficientStorageError, match="ssd"):
        planner(case, 60 * MIB, ddr=100 * MIB, ssd=None).plan(case.model(), case.sharders())


# -- the model


H200 = hardware_profiles()["h200"]
assert H200.hbm is not None
assert H200.pcie is not None
H100 = replace(H200, hbm=replace(H200.hbm, read_bytes_per_s=2.377e12), pcie=replace(H200.pcie, both_bytes_per_s=89.7e9))
ROWS, TABLES_MEASURED, FOOTPRINT = 1_000_000, 10, 0.859


def measured_use(state: int) -> ShardUse:
    """A table of docs/gpu.md: its lookups, and the misses of its pools of 80% and 10% of what is used."""
    pools = (0, round(0.1 * FOOTPRINT * ROWS), round(0.8 * FOOTPRINT * ROWS), ROWS)
    misses = tuple(m / TABLES_MEASURED for m in (320_000.0, 121_700.0, 16_660.0, 0.0))
    curve = MissCurve(pools, misses, misses, 4096)
    return ShardUse(ROWS, 1_064_960 / TABLES_MEASURED, 32_000, 512, 512 + state, curve, ROWS)


@pytest.mark.parametrize(
    ("state", "rows", "kernel", "ms_on_h200", "ms_on_h100"),
    [
        (0, 1.0, "fused", 0.467, 0.518), (1024, 1.0, "fused", 0.84, 0.924),
        (0, 1.0, OURS, 0.50, 0.543), (1024, 1.0, OURS, None, 0.950),
        (0, 0.8 * FOOTPRINT, OURS, 0.76, 0.822), (0, 0.1 * FOOTPRINT, OURS, 1.80, 1.953),
        (1024, 0.8 * FOOTPRINT, OURS, 1.31, 1.425), (1024, 0.1 * FOOTPRINT, OURS, 5.15, 5.377),
        (0, 0.8 * FOOTPRINT, UVM, 5.27, 5.649), (0, 0.1 * FOOTPRINT, UVM, 12.22, 12.637),
        (1024, 0.8 * FOOTPRINT, UVM, 14.71, 16.371), (1024, 0.1 * FOOTPRINT, UVM, 21.78, 22.835),
    ],
)  # fmt: skip
def test_the_model_gives_back_what_was_measured(state: int, rows: float, kernel: str, ms_on_h200: float | None, ms_on_h100: float) -> None:
    use, pool = measured_use(state), round(rows * ROWS)
    for hardware, ms in ((H200, ms_on_h200), (H100, ms_on_h100)):
        model = GpuPerfModel(hardware)
        busy = {
            "fused": model.in_memory(use),
            OURS: model.over_ddr(use, pool)[0],
            UVM: model.uvm_cached(use, pool, state)[0],
        }[kernel]
        step = model.predict((model.base_of(tiered=kernel == OURS) + TABLES_MEASURED * busy)[None]).step_ms
        assert ms is None or step == pytest.approx(ms, rel=0.06)


@given(st.integers(1, ROWS), st.integers(1, ROWS), st.sampled_from([0, 1024]))
def test_more_rows_in_hbm_or_ddr_never_keep_anything_busier(one: int, other: int, state: int) -> None:
    model, use = GpuPerfModel(H200), measured_use(state)
    few, many = sorted((one, other))
    for busy in (
        model.over_ddr(use, [few, many]),
        model.uvm_cached(use, [few, many], state),
        model.tiered(use, [few, many], many),
        model.tiered(use, few, [few, many]),
    ):
        assert (busy[1] <= busy[0] * (1 + 1e-12)).all()
        assert (busy >= model.in_memory(use) * (1 - 1e-12)).all()


def test_ranks_of_a_host_share_its_ssd_and_not_its_gpus() -> None:
    model, use = GpuPerfModel(H200, ranks_per_host=2), measured_use(0)
    busy = model.base_ms + model.tiered(use, 100_000, 100_000)[0]
    both, alone_ = model.predict(np.array([busy, busy])), model.predict(busy[None])
    names = ("ssd", "gpu")
    assert [both.busy_share[n] * both.step_ms / (alone_.busy_share[n] * alone_.step_ms) for n in names] == pytest.approx([2.0, 1.0])


def test_a_profile_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="has no hbm"):
        planner(Case([TableCase(10, 8)]), MIB, hardware=hardware_profiles()["optane"])


def test_a_topology_of_gpus_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="hbm_budget_bytes"):
        TieredTopology(1, "cuda", ddr_budget_bytes=1)
    with pytest.raises(ConfigurationError, match="hbm_budget_bytes"):
        TieredTopology(1, ddr_budget_bytes=1, hbm_budget_bytes=1)
    with pytest.raises(UnsupportedError, match="PMem"):
        TieredTopology(1, "cuda", ddr_budget_bytes=1, hbm_budget_bytes=1, ssd=SsdHome(("/x",), 1), pmem=PmemDevice("/p", 1))


def test_the_plan_and_its_summary_say_what_is_in_hbm() -> None:
    case = Case([TableCase(200_000, 32, [4.0]), TableCase(200_000, 32)], batch_size=64)
    planning = planner(case, 10 * MIB, 100 * MIB)
    plan = planning.plan(case.model(), case.sharders())
    rows = planning.plan_rows(plan)
    assert 9 * MIB < sum(r["hbm_bytes"] for r in rows) <= 10 * MIB
    assert {"in DDR", "on the SSD", "in UVM caching"} & {part for r in rows for part in r["why"].split("; ")}
    summary = planning.summary(plan)
    assert summary.memory == "hbm"
    assert "hbm" in summary.one_more_gib_ms
    assert summary.step_by_memory
