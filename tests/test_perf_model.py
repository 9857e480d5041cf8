"""What the perf model says of a step: it adds up, and neither memory nor a faster device makes it slower."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchrec_mtrains.kernels import SsdVolume
from torchrec_mtrains.planner import HardwareProfile, TieredTopology, assumed_access
from torchrec_mtrains.planner.assumed_hardware import assumed_hardware
from torchrec_mtrains.planner.charges import block_bytes
from torchrec_mtrains.planner.perf_model import _NOT_OVERLAPPED, CPU, PMEM, QUEUE_DEPTH, RESOURCES, SSD, TIERS, PerfModel, ShardUse

from torchrec_mtrains.calibration.block_device import DEEP_READS
from torchrec_mtrains.errors import ConfigurationError

ROWS = 20_000
IN_FLIGHT = 12_000  # at least what two batches of use() take


def hardware(ranks: int = 1, **changes: Any) -> HardwareProfile:
    return replace(assumed_hardware(TieredTopology(ranks, ddr_budget_bytes=1, local_world_size=ranks)), **changes)


def use(lookups: float = 4_000.0, share: float = 1.0) -> ShardUse:
    access = assumed_access(ROWS, lookups, 512)
    return ShardUse(round(ROWS * share), lookups * share, access.unique_rows_per_batch * share, 128, 132, access.miss_curve, ROWS, share)


SIZES = st.integers(1, ROWS)


@given(SIZES, SIZES, st.integers(0, ROWS))
def test_a_larger_pool_never_makes_the_processor_or_the_ssd_busier(one: int, other: int, cache: int) -> None:
    model = PerfModel(hardware())
    small, large = model.tiered(use(), [min(one, other), max(one, other)], cache)
    assert (large[[CPU, TIERS, SSD]] <= small[[CPU, TIERS, SSD]] * (1 + 1e-12)).all()
    assert (small >= model.in_memory(use()) * (1 - 1e-12)).all()


@given(SIZES, SIZES, SIZES)
def test_a_larger_cache_never_makes_the_ssd_busier(pool: int, one: int, other: int) -> None:
    small, large = PerfModel(hardware()).tiered(use(), pool, [min(one, other), max(one, other)])
    assert large[SSD] <= small[SSD] * (1 + 1e-12)


@given(SIZES, st.integers(0, ROWS), st.floats(1, 100), st.sampled_from(["ddr", "pmem", "ssd", "kernel", "cores"]))
def test_faster_parts_never_make_a_step_slower(pool: int, cache: int, factor: float, part: str) -> None:
    slow = hardware()
    if part == "cores":
        fast = replace(slow, cores=slow.cores * int(factor))
    elif part == "kernel":
        fast = replace(slow, kernel=replace(slow.kernel, cpu_ns_per_miss=slow.kernel.cpu_ns_per_miss / factor))
    elif part == "ssd":
        assert slow.ssd is not None
        points = tuple(replace(p, operations_per_s=p.operations_per_s * factor) for p in slow.ssd.points)
        fast = replace(slow, ssd=replace(slow.ssd, points=points))
    else:
        memory = getattr(slow, part)
        rates = {name: getattr(memory, name) * factor for name in ("read_bytes_per_s", "write_bytes_per_s")}
        fast = replace(slow, **{part: replace(memory, **rates)})

    for prefetched in (True, False):
        steps = [PerfModel(h, prefetched=prefetched).predict(PerfModel(h).tiered(use(), pool, cache)).step_ms for h in (slow, fast)]
        assert steps[1] <= steps[0] * (1 + 1e-12)


def test_reads_take_the_devices_rate_and_misses_their_processor_time() -> None:
    machine, what = hardware(cores=3), use()
    model = PerfModel(machine)
    (busy,) = model.tiered(what, IN_FLIGHT)
    missed = float(what.misses(IN_FLIGHT))
    assert machine.ssd is not None
    reads_ms = 1e3 * missed / machine.ssd.operations_per_s(block_bytes(132), 128, 1.0)
    assert reads_ms < busy[SSD] < 1.5 * reads_ms  # and the log's writes
    kernel = machine.kernel
    assert kernel.cpu_ns_per_io is not None
    assert busy[TIERS] > 1e-6 * missed * (kernel.cpu_ns_per_miss + kernel.cpu_ns_per_io)


def test_devices_are_calibrated_and_modelled_at_the_depth_that_volumes_have() -> None:
    assert inspect.signature(SsdVolume).parameters["depth"].default == QUEUE_DEPTH == DEEP_READS[1]


def test_with_no_core_to_spare_prefetching_takes_the_training_threads_time() -> None:
    busy, spare = (PerfModel(hardware(cores=cores)).tiered(use(), IN_FLIGHT)[0] for cores in (2, 3))
    assert busy[CPU] == pytest.approx(spare[CPU] + spare[TIERS] + _NOT_OVERLAPPED * spare[SSD])
    assert busy[TIERS] == 0 < spare[TIERS]


@pytest.mark.parametrize("cores", [2, 3])
def test_what_a_pool_without_room_for_two_batches_misses_is_waited_for(cores: int) -> None:
    model, what = PerfModel(hardware(cores=cores)), use()
    assert what.rows_in_flight < IN_FLIGHT
    small, large = model.tiered(what, [int(what.rows_in_flight) - 1, int(what.rows_in_flight) + 1])
    tiers = PerfModel(hardware(cores=3)).tiered(what, int(what.rows_in_flight) + 1)[0][TIERS]
    hidden = _NOT_OVERLAPPED * large[SSD] + tiers if cores == 2 else 0.0
    assert small[SSD] == pytest.approx(large[SSD], rel=0.01)
    assert small[CPU] - large[CPU] == pytest.approx(large[SSD] + tiers - hidden, rel=0.02)
    assert small[TIERS] == 0


def test_batches_in_flight_that_share_rows_need_less_room() -> None:
    what = replace(use(), in_flight=2_000.0)
    assert what.rows_in_flight == pytest.approx(2_060)
    assert PerfModel(hardware()).crowded(what, [2_050, 2_070]).tolist() == [True, False]
    assert not PerfModel(hardware(), prefetched=False).crowded(what, 2_050)


def test_the_shards_of_a_table_together_do_what_the_table_does() -> None:
    model = PerfModel(hardware())
    (whole,), (half,) = model.tiered(use(), 2_000), model.tiered(use(share=0.5), 1_000)
    whole[CPU] += 1e-3 * model.hardware.kernel.step_overhead_us_per_table  # which comes with each
    assert half * 2 == pytest.approx(whole)


def test_ranks_of_a_host_wait_for_its_devices_and_not_for_each_others_processors() -> None:
    model = PerfModel(hardware(ranks=2), ranks_per_host=2)
    busy = np.zeros((4, len(RESOURCES)))
    busy[:, CPU], busy[:, SSD] = (5.0, 1.0, 2.0, 1.0), (4.0, 3.0, 1.0, 0.5)
    predicted = model.predict(busy)
    assert predicted.busy_ms[:, SSD].tolist() == [7.0, 7.0, 1.5, 1.5]
    assert predicted.rank_ms.tolist() == [7.0, 7.0, 2.0, 1.5]
    assert (predicted.step_ms, predicted.bottleneck) == (7.0, "ssd")
    assert predicted.busy_share["cpu"] == pytest.approx(5 / 7)
    assert replace(predicted, prefetched=False).step_ms == 12.0


def test_a_cache_reads_its_hits_and_writes_every_victim() -> None:
    machine, what = hardware(), use()
    (busy,) = PerfModel(machine).tiered(what, IN_FLIGHT, 5_000)
    assert machine.pmem is not None
    missed, cold = float(what.misses(IN_FLIGHT)), float(what.misses(IN_FLIGHT + 5_000))
    moved_s = (missed - cold) / machine.pmem.read_bytes_per_s + missed / machine.pmem.write_bytes_per_s
    assert busy[PMEM] == pytest.approx(1e3 * 132 * moved_s)
    assert RESOURCES[PMEM] == "pmem"


def test_what_was_not_measured_is_asked_for() -> None:
    with pytest.raises(ConfigurationError, match="the hardware profile none; measure it with `mtrains calibrate --pmem-path`"):
        PerfModel(hardware(pmem=None)).tiered(use(), 2_000, 100)
    with pytest.raises(ConfigurationError, match="mtrains calibrate --path"):
        PerfModel(hardware(ssd=None)).tiered(use(), 2_000)
    kernel = replace(hardware().kernel, cpu_ns_per_io=None)
    with pytest.raises(ConfigurationError, match="cpu_ns_per_io"):
        PerfModel(hardware(kernel=kernel)).tiered(use(), 2_000)
