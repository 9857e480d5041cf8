"""The planner's components one by one, in TorchRec's own planner."""

from __future__ import annotations

import copy
import operator
from functools import reduce
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.planner.types import PlannerError, Storage
from torchrec_mtrains.planner import (
    DdrStorageReservation,
    PerfModel,
    PmemDevice,
    PredictedStep,
    TieredEnumerator,
    TieredPartitioner,
    TieredProposer,
    TieredStats,
    TieredStorage,
    TieredStorageEstimator,
    TieredTopology,
    with_chains,
)
from torchrec_mtrains.planner.assumed_hardware import assumed_hardware
from torchrec_mtrains.planner.search import predicted

from planner_cases import PLENTY, Case, TableCase, tiered_tables
from torchrec_mtrains import SsdHome, TieredParameterSharding
from torchrec_mtrains.errors import ConfigurationError

MIB = 1 << 20
SSD = SsdHome(("/nowhere",), PLENTY)
CASE = Case([TableCase(50_000, 32, [3.0]), TableCase(50_000, 32), TableCase(2_000, 8)], batch_size=64)
SIZES = st.integers(0, 1 << 40)
PLAIN = st.builds(Storage, SIZES, SIZES, SIZES)
TIERED = st.builds(TieredStorage, SIZES, SIZES, SIZES, SIZES)


def topology(ddr: int = 5 * MIB, pmem: int | None = None, ranks: int = 1) -> TieredTopology:
    return TieredTopology(ranks, ddr_budget_bytes=ddr, ssd=SSD, pmem=PmemDevice("/pmem", pmem) if pmem else None)


def model_of(on: TieredTopology) -> PerfModel:
    return PerfModel(assumed_hardware(on), on.ranks_per_host)


def enumerator(on: TieredTopology) -> TieredEnumerator:
    return TieredEnumerator(on, CASE.batch_size, CASE.constraints(), model_of(on))


def stock(on: Topology, **components: Any) -> tuple[Any, list[Any]]:
    """The plan of TorchRec's own planner with these components, and the options that it chose."""
    chosen: list[Any] = []

    def keep(options: list[Any]) -> list[Any]:
        chosen.extend(options)
        return options

    components.setdefault("storage_reservation", DdrStorageReservation())
    planner = EmbeddingShardingPlanner(
        topology=on, batch_size=CASE.batch_size, constraints=CASE.constraints(), callbacks=[keep], **components
    )
    return planner.plan(CASE.model(), CASE.sharders()), chosen


# -- storage and topology


@given(TIERED, TIERED, PLAIN)
def test_storage_adds_and_compares_in_every_tier_and_with_torchrecs(a: TieredStorage, b: TieredStorage, plain: Storage) -> None:
    assert (a + b) - b == a
    assert a + plain == plain + a == TieredStorage(a.hbm + plain.hbm, a.ddr + plain.ddr, a.ssd + plain.ssd, a.pmem)
    assert (a + plain).pmem == a.pmem
    assert type(plain - a) is Storage
    assert reduce(operator.add, [plain, a, b]) == sum([plain, a, b], Storage(0, 0, 0))
    assert (a == plain) == (plain == a) == (a.pmem == 0 and (a.hbm, a.ddr, a.ssd) == (plain.hbm, plain.ddr, plain.ssd))
    assert (a < plain) == (plain > a)
    assert (a <= b) == (not b < a)
    assert a < Storage(1 << 62, 0)
    assert not Storage(1 << 62, 0) < a
    assert copy.deepcopy(a) == a
    assert hash(copy.deepcopy(a)) == hash(a)


@given(TIERED, st.integers(1, 1 << 30))
def test_storage_that_lacks_pmem_does_not_fit_and_one_that_never_heard_of_it_does_not_object(a: TieredStorage, short: int) -> None:
    assert a.fits_in(a)
    assert not (a + TieredStorage(pmem=short)).fits_in(a)
    assert not (a + TieredStorage(ddr=short)).fits_in(a)
    plain = Storage(a.hbm, a.ddr, a.ssd)
    assert a.fits_in(plain)
    assert plain.fits_in(a)
    assert not (a + TieredStorage(ssd=short)).fits_in(plain)


def test_a_topology_has_every_tier_of_every_rank_and_host() -> None:
    four = TieredTopology(4, ddr_budget_bytes=MIB, ssd=SSD, pmem=PmemDevice("/pmem", 7), local_world_size=2)
    assert [device.storage.pmem for device in four.devices] == [7] * 4
    assert four.ranks_per_host == 2
    assert four.host_storage(1) == four.devices[2].storage + four.devices[3].storage
    assert (four.host_storage(1).ddr, four.host_storage(1).pmem) == (2 * MIB, 14)
    hashes = {topology(pmem=pmem)._hash() for pmem in (None, 7, 8)}
    assert len(hashes) == 3
    assert topology(pmem=7)._hash() in hashes


def test_torchrecs_planner_plans_in_memory_on_our_topology_as_on_its_own() -> None:
    ours, theirs = topology(ddr=PLENTY), Topology(1, "cpu", ddr_cap=PLENTY, ssd_cap=ours_ssd(PLENTY))
    assert stock(ours)[0] == stock(theirs)[0]


def ours_ssd(ddr: int) -> int:
    return int(topology(ddr=ddr).devices[0].storage.ssd)


# -- enumerator, estimator


def test_torchrecs_proposers_and_partitioner_choose_among_the_options_of_our_enumerator() -> None:
    on = topology()
    plan, chosen = stock(on, enumerator=enumerator(on), proposer=GreedyProposer(), partitioner=GreedyPerfPartitioner())
    tiered = [name for name, sharding in plan.plan["ebc"].items() if sharding.compute_kernel == "customized_kernel"]
    assert tiered
    assert not tiered_tables(plan), "TorchRec's plan entries have no place for a chain"
    assert with_chains(plan, chosen, on) is plan
    assert tiered_tables(plan) == set(tiered)
    for option in chosen:
        sharding = plan.plan["ebc"][option.name]
        if option.name in tiered:
            assert isinstance(sharding, TieredParameterSharding)
            assert (sharding.tiers.pool_rows, sharding.tiers.home) == (option.min_pool_rows, SSD)
            assert sharding.ranks == [shard.rank for shard in option.shards]


def test_our_storage_estimator_in_torchrecs_enumerator_notes_the_optimizers_state() -> None:
    on = Topology(1, "cpu", ddr_cap=PLENTY)
    constraints = CASE.constraints()
    estimators = [EmbeddingPerfEstimator(topology=on, constraints=constraints), TieredStorageEstimator(on, constraints)]
    options = EmbeddingEnumerator(on, CASE.batch_size, constraints, estimators).enumerate(CASE.model(), CASE.sharders())
    assert {option.name for option in options} == {"t0", "t1", "t2"}
    for option in options:
        assert option.uncharged_bytes == [4 * shard.size[0] for shard in option.shards], "row-wise Adagrad: one float a row"


# -- proposer, partitioner


def test_our_proposer_and_partitioner_in_torchrecs_planner_find_what_our_planner_finds() -> None:
    on, reservation = topology(), DdrStorageReservation()
    proposer = TieredProposer(reservation, model_of(on), search_seconds=2)
    plan, chosen = stock(on, enumerator=enumerator(on), proposer=proposer, partitioner=TieredPartitioner(), storage_reservation=reservation)
    ours = CASE.planner(5 * MIB, PLENTY, search_seconds=2)
    ours.plan(CASE.model(), CASE.sharders())
    assert predicted(chosen, model_of(on), 1).step_ms == pytest.approx(ours.prediction.step_ms, rel=0.02)
    assert proposer.result is not None
    assert tiered_tables(with_chains(plan, chosen, on)) >= {"t0", "t1"}


def test_a_proposer_whose_reservation_is_not_the_planners_says_so() -> None:
    on = topology()
    proposer = TieredProposer(DdrStorageReservation(), model_of(on))
    with pytest.raises(ConfigurationError, match="give the planner the same one"):
        stock(on, enumerator=enumerator(on), proposer=proposer)


def test_our_partitioner_refuses_what_does_not_fit_with_optimizer_state() -> None:
    bytes_of_weights = 4 * (50_000 * 32 * 2 + 2_000 * 8)
    on = topology(ddr=bytes_of_weights + 200_000)  # the state takes 400,000 more, and a batch 90,000
    estimators = [
        EmbeddingPerfEstimator(topology=on, constraints=CASE.constraints()),
        TieredStorageEstimator(on, CASE.constraints()),
    ]

    def components() -> dict[str, Any]:
        return {"enumerator": EmbeddingEnumerator(on, CASE.batch_size, CASE.constraints(), estimators)}

    assert len(stock(on, **components())[1]) == 3
    with pytest.raises(PlannerError, match="optimizer state included"):
        stock(on, partitioner=TieredPartitioner(), **components())


def test_our_partitioner_refuses_pmem_that_torchrecs_does_not_see() -> None:
    on = topology(ddr=20 * MIB, pmem=4 * MIB)
    (option,) = [
        o for o in enumerator(on).enumerate(CASE.model(), CASE.sharders()) if o.name == "t0" and o.compute_kernel == "customized_kernel"
    ]
    fits, too_much = option.resized(2_000, 4 * MIB // 132 - 100), option.resized(2_000, 40_000)
    assert fits.total_storage.pmem <= 4 * MIB < too_much.total_storage.pmem
    for placer in (GreedyPerfPartitioner(), TieredPartitioner()):
        assert placer.partition([copy.deepcopy(fits)], on)[0].shards[0].rank == 0
    assert GreedyPerfPartitioner().partition([copy.deepcopy(too_much)], on)
    with pytest.raises(PlannerError, match="bytes of pmem"):
        TieredPartitioner().partition([copy.deepcopy(too_much)], on)


# -- rating, stats


def test_torchrecs_planner_rates_by_our_prediction() -> None:
    on = topology()
    model = model_of(on)
    steps = {}
    for name, rating in (("ours", {"performance_model": PredictedStep(1, model)}), ("theirs", {})):
        _, chosen = stock(on, enumerator=enumerator(on), proposer=[GreedyProposer(), UniformProposer()], **rating)
        steps[name] = predicted(chosen, model, 1).step_ms
        assert PredictedStep(1, model).rate(chosen) == steps[name]
    assert steps["ours"] <= steps["theirs"]


def test_our_stats_log_a_plan_of_torchrecs_planner(caplog: pytest.LogCaptureFixture) -> None:
    on = topology()
    with caplog.at_level("INFO", logger="torchrec_mtrains.planner.stats"):
        _, chosen = stock(on, enumerator=enumerator(on), proposer=GreedyProposer(), stats=TieredStats(model_of(on)))
    assert f"predicted step {predicted(chosen, model_of(on), 1).step_ms:.3g} ms" in caplog.text
    assert all(option.name in caplog.text for option in chosen)
