"""The lookahead window: what was asked for or what pools can use, filled while the job trains, bounded by bytes, the same on all ranks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import torchrec_mtrains as mtrains
from dmp_twins import Job, Table
from pipelines import CPU, Twins
from ranks import Ranks
from torchrec_mtrains.lookahead import Lookahead

STEPS = 20
JOB = Job([Table(600, 8, ["a"], 200)], batch_size=4)


def windows_of(steps: int, job: Job = JOB, **options: int | None) -> list[int]:
    """The window after each step. Runs on every rank; a second rank's batches are ten times as large."""
    large = dist.get_rank() == 1
    twins = Twins(Job(job.tables, batch_size=job.batch_size, max_length=30 if large else 3), steps=steps)
    dmp = twins.model(True)
    pipeline, data, seen = mtrains.TieredTrainPipeline(dmp, twins.optimizer(dmp), CPU, **options), iter(twins.batches), []
    for _ in range(steps):
        pipeline.progress(data)
        seen.append(pipeline.lookahead)
        for group in mtrains.tiered_groups(dmp):
            group._pool.check()  # after what was prefetched, whose announcements have ended then
            assert group._pool.announced <= max(seen)
    pipeline.detach()
    assert all(g._pool.announced == 0 for g in mtrains.tiered_groups(dmp))
    return seen


def test_a_window_fills_by_one_batch_a_step_and_ends_with_the_data(one_rank: None) -> None:
    assert windows_of(STEPS, lookahead=5)[:8] == [1, 2, 3, 4, 5, 5, 5, 5]


def test_batches_of_the_window_are_announced_and_withdrawn(one_rank: None) -> None:
    twins = Twins(JOB, steps=STEPS)
    dmp = twins.model(True)
    pipeline, data = mtrains.TieredTrainPipeline(dmp, twins.optimizer(dmp), CPU, lookahead=5), iter(twins.batches)
    for _ in range(10):
        pipeline.progress(data)
    (group,) = mtrains.tiered_groups(dmp)
    assert group._pool.announced == 5
    pipeline.detach()
    assert group._pool.announced == 0 == group._pool.outstanding
    pipeline.progress(data)
    assert group._pool.announced == 5, "the pipeline goes on as before"


def test_left_out_it_is_what_the_pools_can_use(one_rank: None) -> None:
    twins = Twins(Job([Table(600, 8, ["a"], 24)], batch_size=4), steps=120)
    dmp = twins.model(True)
    pipeline, data = mtrains.TieredTrainPipeline(dmp, twins.optimizer(dmp), CPU), iter(twins.batches)
    for _ in range(70):
        pipeline.progress(data)
    (group,) = mtrains.tiered_groups(dmp)
    held = 24 / group._rows_of_a_batch(0)
    assert group.useful_lookahead == math.ceil(8 * held) < 64
    assert abs(pipeline.lookahead - group.useful_lookahead) <= 8


def test_pools_with_a_slot_for_every_row_have_no_use_for_it(one_rank: None) -> None:
    twins = Twins(Job([Table(600, 8, ["a"], 600)], batch_size=4), steps=STEPS)
    dmp = twins.model(True)
    pipeline, data = mtrains.TieredTrainPipeline(dmp, twins.optimizer(dmp), CPU), iter(twins.batches)
    for _ in range(STEPS - 4):
        pipeline.progress(data)
    (group,) = mtrains.tiered_groups(dmp)
    assert (pipeline.lookahead, group.useful_lookahead, group._pool.announced) == (0, 0, 0)


def test_without_tiered_tables_there_is_none(one_rank: None) -> None:
    twins = Twins(JOB, steps=6)
    dmp = twins.model(False)
    pipeline, data = mtrains.TieredTrainPipeline(dmp, twins.optimizer(dmp), CPU), iter(twins.batches)
    for _ in range(4):
        pipeline.progress(data)
    assert pipeline.lookahead == 0


def test_a_window_beyond_its_bytes_shrinks_and_says_so(one_rank: None) -> None:
    with pytest.warns(RuntimeWarning, match=r"lookahead: 0 batches instead of 5 batches.*lookahead_bytes=10"):
        assert set(windows_of(STEPS, lookahead=5, lookahead_bytes=10)) == {0}


@given(st.lists(st.integers(0, 100), max_size=8), st.integers(0, 100), st.integers(0, 70), st.integers(0, 400))
def test_the_batches_of_a_window_fit_in_its_bytes(held: list[int], one_more: int, wish: int, limit: int) -> None:
    window = Lookahead(None, limit)
    window._warned = True
    window.propose(held, one_more, wish, None, CPU)
    assert window.batches <= min(wish, len(held) + 1)
    assert sum([*held, one_more][: window.batches]) <= limit
    if window.batches < min(wish, len(held) + 1):
        assert sum([*held, one_more][: window.batches + 1]) > limit


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def test_the_window_of_all_ranks_is_the_smallest(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(bounded_windows)
    assert first == second
    assert 0 < max(first) < 5, "the large batches of one rank bound both"


def test_the_window_is_the_largest_wish_of_all_ranks(two_ranks: Ranks) -> None:
    assert two_ranks.run(agreed_windows) == [[4, 4, 0], [4, 4, 0]]


def agreed_windows() -> list[int]:
    """Of wishes that differ, then with room for less, then of none."""
    rank, windows = dist.get_rank(), []
    for wishes, limits in (((1, 4), (99, 99)), ((9, 1), (99, 40)), ((0, 0), (99, 99))):
        window = Lookahead(None, limits[rank])
        window._warned = True
        window.propose([10] * 6, 10, wishes[rank], dist.group.WORLD, CPU)
        window.agree()
        windows.append(window.batches)
    return windows


def bounded_windows() -> list[int]:
    """With bytes for two or three of the second rank's batches."""
    warnings.simplefilter("ignore")
    return windows_of(STEPS, lookahead=5, lookahead_bytes=2000)


def test_a_rank_whose_pools_hold_every_row_takes_the_window_of_the_others(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(windows_beside_a_whole_pool)
    assert first == second
    assert max(first) > 1, "as many as the other pool of 200 rows has room for, at its large batches"


def windows_beside_a_whole_pool() -> list[int]:
    """The first rank's pool evicts nothing, the second's does."""
    return windows_of(2 * STEPS, Job([Table(600, 8, ["a"], 600), Table(600, 8, ["b"], 200, rank=1)], batch_size=4))


def test_ranks_whose_pools_hold_every_row_have_no_window(two_ranks: Ranks) -> None:
    assert two_ranks.run(windows_of_whole_pools) == [[0] * STEPS] * 2


def windows_of_whole_pools() -> list[int]:
    return windows_of(STEPS, Job([Table(600, 8, ["a"], 600), Table(600, 8, ["b"], 600, rank=1)], batch_size=4))
