"""The native profiler of a table: its pools are SlotPools to the last miss, its LRU is an LRU, its counts are the ids'."""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec_mtrains.kernels import MemoryVolume, _core
from torchrec_mtrains.kernels.tiered_tbe import BATCH_LIMIT

from torchrec_mtrains.errors import ConfigurationError, IdOutOfRangeError

Batches = list[np.ndarray]


@st.composite
def jobs(draw: st.DrawFn) -> tuple[int, Batches]:
    """A table and batches of ids, hot or cold by coin flip; some batches are empty."""
    rows = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    most = draw(st.integers(1, 12))
    hot = max(1, rows // 6)
    batches = []
    for _ in range(draw(st.integers(1, 40))):
        count = int(rng.integers(0, most + 1))
        batches.append(np.where(rng.random(count) < 0.5, rng.integers(0, hot, count), rng.integers(0, rows, count)))
    return rows, batches


def profiled(
    rows: int, batches: Batches, pools: list[int], lookahead: int = 0, outstanding: int = 0, sampled: int | None = None, seed: int = 0
) -> Any:
    profiler = _core.TableProfiler(rows, sampled or rows, seed, pools, [lookahead], outstanding, 4)
    for ids in batches:
        profiler.push(ids)
    profiler.finish()
    profiler.check()
    return profiler


class _Pool:
    """A real slot pool over one table in memory, trained batch by batch with ``outstanding`` tickets held meanwhile."""

    def __init__(self, rows: int, pool_rows: int, outstanding: int) -> None:
        self.volume, self.outstanding = MemoryVolume(), outstanding
        self.home = self.volume.table("t", row_count=rows, record_bytes=4)
        self.memory = torch.zeros(pool_rows, 4, dtype=torch.uint8)
        table = _core.SlotPoolTable("t", self.volume._native, self.home._id, rows, pool_rows, [_core.Part(self.memory.data_ptr(), 4, 4)])
        self.pool = _core.SlotPool([table], [0], BATCH_LIMIT)
        self.held: deque[tuple[int, Any]] = deque()

    def batch(self, ids: np.ndarray) -> tuple[Any, Any]:
        tensors = torch.from_numpy(ids), torch.tensor([0, len(ids)])
        return _core.Batch(tensors[0].data_ptr(), False, len(ids), tensors[1].data_ptr()), tensors

    def train(self, ids: np.ndarray, announced: int) -> None:
        while len(self.held) > self.outstanding:
            self.pool.release(self.held.popleft()[0])
        batch, tensors = self.batch(ids)
        slots = torch.empty(len(ids), dtype=torch.int64)
        seq = self.pool.prefetch(batch, slots.data_ptr(), True, announced)
        self.held.append((seq, (batch, tensors, slots)))
        while not self.pool.acquire(seq, True):  # no room: the oldest batches end before this one begins
            raise AssertionError("a pool of the test is too small for the batches it holds")
        self.pool.wait(seq)


def really_missed(rows: int, batches: Batches, pool_rows: int, lookahead: int, outstanding: int) -> tuple[int, int]:
    """Misses and write-backs of a real pool."""
    real = _Pool(rows, pool_rows, outstanding)
    announced: deque[Any] = deque()
    for b, ids in enumerate(batches):
        for coming in batches[b + len(announced) : b + lookahead]:
            batch, tensors = real.batch(coming)
            announced.append((real.pool.announce(batch), batch, tensors))
        real.train(ids, announced.popleft()[0] if announced else 0)
    stats = real.pool.stats(0)
    return stats["misses"], stats["write_backs"]


@settings(deadline=None)
@given(jobs(), st.sampled_from([0, 1, 3, 64]), st.integers(0, 2), st.data())
def test_with_every_row_sampled_pools_miss_what_slot_pools_miss(
    job: tuple[int, Batches], lookahead: int, outstanding: int, data: st.DataObject
) -> None:
    rows, batches = job
    held = [np.unique(np.concatenate(batches[max(0, b - outstanding) : b + 1])).size for b in range(len(batches))]
    least = max(1, *held)
    pools = sorted(data.draw(st.sets(st.integers(least, max(least, rows)), min_size=1, max_size=3)))
    found = profiled(rows, batches, pools, lookahead, outstanding).pools()[0]
    for k, pool_rows in enumerate(pools):
        real = really_missed(rows, batches, pool_rows, lookahead, outstanding)
        assert (found["misses"][k], found["write_backs"][k]) == real


def lru_misses(batches: Batches, size: int) -> int:
    """Of a dictionary in the order of last use."""
    cache: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for ids in batches:
        misses += len(set(ids.tolist()) - cache.keys())
        for row in ids.tolist():
            cache[row] = None
            cache.move_to_end(row)
        while len(cache) > size:
            cache.popitem(last=False)
    return misses


@settings(deadline=None)
@given(jobs(), st.sets(st.integers(1, 45), min_size=1, max_size=6))
def test_the_lru_curve_is_that_of_a_dictionary_in_order_of_use(job: tuple[int, Batches], sizes: set[int]) -> None:
    rows, batches = job
    pools = sorted(sizes)
    assert profiled(rows, batches, pools).lru_misses() == [lru_misses(batches, size) for size in pools]


@settings(deadline=None)
@given(jobs())
def test_counts_are_those_of_the_ids(job: tuple[int, Batches]) -> None:
    rows, batches = job
    counts = profiled(rows, batches, [rows]).counts()
    ids = np.concatenate(batches)
    assert counts["batches"] == len(batches)
    assert counts["lookups"] == len(ids)
    assert counts["unique_rows"] == sum(len(np.unique(b)) for b in batches)
    assert counts["unique_rows_of_quarter"] == sum(len(np.unique(b[: len(b) // 4])) for b in batches)
    assert counts["used_rows"] == len(np.unique(ids))
    assert counts["lookups_of_range"] == np.bincount(ids.astype(np.int64) * 64 // rows, minlength=64).tolist()
    for scale in (1, 4, 16):
        whole = [np.unique(np.concatenate(batches[b : b + scale])) for b in range(0, len(batches) - scale + 1, scale)]
        group = counts[f"sampled_groups_of_{scale}"]
        assert (group["complete"], group["unique_rows"]) == (len(whole), sum(map(len, whole)))
        fresh = [len(np.setdiff1d(b, a)) for a, b in itertools.pairwise(whole)]
        assert group["fresh_rows"] == sum(fresh)


@given(jobs())
def test_reuse_is_by_batches_since_the_last_use(job: tuple[int, Batches]) -> None:
    rows, batches = job
    last: dict[int, int] = {}
    classes = [0] * 12
    for b, ids in enumerate(batches):
        for row in set(ids.tolist()):
            classes[11 if row not in last else min(11, (b - last[row] - 1).bit_length())] += 1
            last[row] = b
    assert profiled(rows, batches, [rows]).counts()["sampled_reuse"] == classes


@given(st.integers(2, 5000), st.data())
def test_a_sample_has_as_many_rows_as_asked_for(rows: int, data: st.DataObject) -> None:
    sampled, seed = data.draw(st.integers(1, rows)), data.draw(st.integers(0, 2**64 - 1))
    uses = profiled(rows, [np.arange(rows)], [rows], sampled=sampled, seed=seed).uses_of_sample()
    assert len(uses) == sampled
    assert (uses == 1).all()


@settings(deadline=None)
@given(jobs(), st.data())
def test_the_end_of_a_stream_changes_no_batch_before_it(job: tuple[int, Batches], data: st.DataObject) -> None:
    rows, batches = job
    cut = data.draw(st.integers(0, len(batches)))
    whole, parts = (_core.TableProfiler(rows, rows, 0, [1, rows], [0, 5, 64], 1, 4) for _ in range(2))
    for ids in batches[:cut]:
        parts.push(ids)
    before = parts.counts(), parts.pools(), parts.lru_misses()
    for ids in batches:
        whole.push(ids)
    for ids in batches[cut:]:
        parts.push(ids)
    assert (parts.counts(), parts.pools(), parts.lru_misses()) == (whole.counts(), whole.pools(), whole.lru_misses())
    alone = _core.TableProfiler(rows, rows, 0, [1, rows], [0, 5, 64], 1, 4)
    for ids in batches[:cut]:
        alone.push(ids.astype(np.int32))
    assert (alone.counts(), alone.pools(), alone.lru_misses()) == before


def test_a_pool_that_cannot_hold_a_batch_is_given_up() -> None:
    pools = profiled(10, [np.arange(2), np.arange(5)], [4, 5]).pools()[0]
    assert pools["resident"] == [-1, 5]


def test_an_id_outside_the_table_is_refused_and_changes_nothing() -> None:
    profiler = _core.TableProfiler(10, 10, 0, [5], [0], 0, 4)
    with pytest.raises(IdOutOfRangeError, match=r"id 10 \(position 1\)"):
        profiler.push(np.array([3, 10]))
    with pytest.raises(IdOutOfRangeError):
        profiler.push(np.array([-1], np.int32))
    assert profiler.counts()["lookups"] == 0
    assert profiler.pools()[0]["misses"] == [0]


def test_sizes_that_cannot_be_are_refused() -> None:
    for sizes in ((0, 1, [1]), (10, 11, [1]), (10, 0, [1]), (10, 10, [3, 2])):
        with pytest.raises(ConfigurationError):
            _core.TableProfiler(sizes[0], sizes[1], 0, sizes[2], [0], 0, 4)
    with pytest.raises(ConfigurationError, match="at most 64"):
        _core.TableProfiler(10, 10, 0, [1], [0, 65], 0, 4)
