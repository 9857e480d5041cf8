"""Ids of batches that wait take no more than what is charged for them, whatever pools say how far the pipeline looks ahead."""

from __future__ import annotations

from typing import Any

import pytest
from torchrec_mtrains.planner import InsufficientStorageError
from torchrec_mtrains.planner.waiting_ids import BATCHES_WAITING, WaitingIds

from planner_cases import Case, TableCase
from ranks import Ranks
from torchrec_mtrains.lookahead import LOOKAHEAD_BYTES, MOST_BATCHES
from waiting_memory import WaitingJob, measured

BELOW, IN_MEMORY = {"compute_kernels": ["customized_kernel"]}, {"compute_kernels": ["fused"]}
MIB = 1 << 20
TABLES_BYTES = 15 * MIB
"""Memory for the tables of ``job``: a pool that can use the longest window, and one that cannot."""


def job(world_size: int = 1) -> Case:
    """In a batch of all ranks: few lookups above an SSD, some in memory, and many above the SSD. Input dist puts tables of a kind side by
    side, so it copies what it is given."""
    tables = [TableCase(400_000, 8), TableCase(2_000, 4, [2.0]), TableCase(200_000, 8, [8.0])]
    ways = {"t0": BELOW | {"min_pool_rows": 20_000}, "t1": IN_MEMORY, "t2": BELOW | {"sharding_types": ["table_wise"]}}
    return Case(tables, world_size, 2048 // world_size, extra=ways)


def charged(case: Case, lookahead_bytes: int = LOOKAHEAD_BYTES) -> tuple[WaitingIds, list[int]]:
    """Of a rank, and of each table."""
    samples = case.world_size * case.batch_size
    ids = [(samples * sum(t.pooling), samples * len(t.pooling)) for t in case.tables]
    waiting = WaitingIds.of(ids, case.world_size, lookahead_bytes)
    return waiting, [waiting.of_shard(*of_table) for of_table in ids]


def test_small_pools_and_tables_in_memory_wait_as_long_as_the_largest_pool_wishes(tmp_path: Any) -> None:
    """Measured as memory that the process is rid of without them."""
    waiting, of_tables = charged(job())
    ddr = waiting.of_rank + sum(of_tables) + TABLES_BYTES
    window, wishes, held, resident = measured(job(), ddr, str(tmp_path), LOOKAHEAD_BYTES)
    assert window == wishes["t0"] == MOST_BATCHES == waiting.batches - BATCHES_WAITING
    assert wishes["t2"] < 0.8 * MOST_BATCHES, "the small pool would wait as long by itself"
    assert 0.7 * (waiting.of_rank + sum(of_tables)) < held
    assert 0.9 * held < resident <= waiting.of_rank + sum(of_tables)  # memory freed elsewhere in the process hides some


def test_no_more_is_charged_than_the_pipeline_may_hold_and_that_is_held(tmp_path: Any) -> None:
    limit = 4 * MIB
    waiting, of_tables = charged(job(), limit)
    window, _, held, resident = measured(job(), waiting.of_rank + sum(of_tables) + TABLES_BYTES, str(tmp_path), limit)
    batch = 2 * waiting.given_bytes
    assert 0 < window < MOST_BATCHES
    assert limit <= waiting.of_rank + sum(of_tables) - BATCHES_WAITING * batch < limit + batch + 4
    assert 0.7 * (waiting.of_rank + sum(of_tables)) < held
    assert 0.9 * held < resident <= waiting.of_rank + sum(of_tables) + batch  # memory freed elsewhere in the process hides some


def _held(case: Case, ddr: int, ssd: str) -> tuple[int, dict[str, list[int]]]:
    job = WaitingJob(case, ddr, ssd, LOOKAHEAD_BYTES)
    return job.held_bytes, {name: sharding.ranks for name, sharding in job.plan.plan["ebc"].items()}


def test_every_rank_of_several_holds_what_it_was_given_and_the_ids_of_its_shards(tmp_path: Any) -> None:
    case = job(world_size=2)
    ranks = Ranks(2)
    try:
        answers = ranks.run(_held, case, 28 * MIB, str(tmp_path))
    finally:
        ranks.close()
    waiting, of_tables = charged(case)
    for rank, (held, placed) in enumerate(answers):
        assert all(len(on) == 1 for on in placed.values()), placed
        mine = sum(of_tables[int(name[1:])] for name, on in placed.items() if rank in on)
        assert 0.7 * (waiting.of_rank + mine) < held <= waiting.of_rank + mine


@pytest.mark.parametrize("prefetched", [True, False])
def test_plans_leave_each_rank_the_memory_of_ids_that_wait(prefetched: bool) -> None:
    """By how much more memory the smallest plan needs, to the byte."""
    case = job()
    needs = []
    for lookahead_bytes in (0, LOOKAHEAD_BYTES):
        ddr = MIB
        while True:
            planner = case.planner(ddr, 1 << 40, prefetched=prefetched, lookahead_bytes=lookahead_bytes)
            try:
                planner.plan(case.model(), case.sharders())
                break
            except InsufficientStorageError as error:
                ddr += error.short_bytes
        needs.append(ddr)
    (none, of_none), (longest, of_longest) = charged(case, 0), charged(case)
    assert none.batches == BATCHES_WAITING
    difference = longest.of_rank + sum(of_longest) - none.of_rank - sum(of_none)
    assert needs[1] - needs[0] == (difference if prefetched else 0)
