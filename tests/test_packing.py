"""Rows that a batch used side by side are written side by side, whichever way they leave a pool or a cache."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torchrec_mtrains.kernels import SsdVolume, VolumeTable, _core
from torchrec_mtrains.kernels.caches import CachedVolume
from torchrec_mtrains.kernels.tiered_tbe import BATCH_LIMIT

from torchrec_mtrains.tiers import DdrCache

ROWS, RECORD_BYTES, SLOTS = 3000, 260, 600
BATCH = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))[: SLOTS // 2]
"""Rows that come and are used side by side."""
OTHERS = torch.tensor(sorted(set(range(ROWS)) - set(BATCH.tolist())))


@pytest.fixture
def volume() -> Iterator[SsdVolume]:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        yield SsdVolume((folder,), 64 << 20)


class Pool:
    def __init__(self, table: VolumeTable) -> None:
        self.table = table
        table.put(torch.arange(ROWS), torch.zeros(ROWS, RECORD_BYTES, dtype=torch.uint8))
        self.memory = torch.zeros(SLOTS, RECORD_BYTES, dtype=torch.uint8)
        part = _core.Part(self.memory.data_ptr(), RECORD_BYTES, RECORD_BYTES)
        one = _core.SlotPoolTable("t", table.volume._native, table._id, ROWS, SLOTS, [part])
        self.pool = _core.SlotPool([one], [0], BATCH_LIMIT)
        generator = torch.Generator().manual_seed(2)
        for _ in range(50):  # the slots are in no order
            self.train(OTHERS[torch.randint(0, len(OTHERS), (SLOTS // 3,), generator=generator)])
        self.train(BATCH)

    def train(self, rows: torch.Tensor) -> None:
        slots, offsets = torch.empty_like(rows), torch.tensor([0, len(rows)])
        seq = self.pool.begin(_core.Batch(rows.data_ptr(), False, len(rows), offsets.data_ptr()), slots.data_ptr(), True)
        self.pool.wait(seq)
        self.pool.release(seq)

    def evict_the_batch(self) -> None:
        parts = itertools.cycle(OTHERS.split(SLOTS // 4))
        while any(self.pool.slot_of_row(0, row) >= 0 for row in BATCH.tolist()):
            self.train(next(parts))


def pairs_in_one_block(table: VolumeTable) -> float:
    """Share of rows of the batch that come along with the row before them."""
    native, together = table.volume._native, 0
    out = torch.empty(1, RECORD_BYTES, dtype=torch.uint8)
    for row, after in itertools.pairwise(BATCH):
        wanted = _core.RowSet(ROWS)
        wanted.add(after[None])
        rows, _payloads = native.wait(native.submit_get(table._id, row[None].clone(), out, wanted))
        together += len(rows)
    return together / (len(BATCH) - 1)


SIDE_BY_SIDE = 0.9  # of the pairs; one in fourteen lies over the border of a block


def one_table(volume: SsdVolume) -> VolumeTable:
    return volume.table("t", row_count=ROWS, record_bytes=RECORD_BYTES)


def test_evicted_rows_lie_in_the_order_of_their_use(volume: SsdVolume) -> None:
    pool = Pool(one_table(volume))
    pool.evict_the_batch()
    pool.pool.flush()
    volume.flush()
    assert pairs_in_one_block(pool.table) > SIDE_BY_SIDE


def test_flushed_rows_lie_in_the_order_of_their_use(volume: SsdVolume) -> None:
    pool = Pool(one_table(volume))
    pool.pool.flush()
    volume.flush()
    assert pairs_in_one_block(pool.table) > SIDE_BY_SIDE


def test_trickled_rows_lie_in_the_order_of_their_use(volume: SsdVolume) -> None:
    pool = Pool(one_table(volume))
    assert pool.pool.trickle(0, 0, SLOTS) >= len(BATCH)
    volume.flush()
    assert pairs_in_one_block(pool.table) > SIDE_BY_SIDE


@pytest.mark.parametrize("way", ["sink", "flush"])
def test_rows_that_go_through_a_cache_lie_in_the_order_of_their_use(volume: SsdVolume, way: str) -> None:
    cached = CachedVolume(volume)
    table = cached.cached_table("t", row_count=ROWS, record_bytes=RECORD_BYTES, caches=(DdrCache(rows=2 * len(BATCH)),))
    pool = Pool(table)
    pool.evict_the_batch()
    if way == "sink":
        pool.evict_the_batch()
        pool.pool.flush()
    cached.flush()
    cached.forget()  # what it held is on disk too
    assert pairs_in_one_block(table) > SIDE_BY_SIDE


def test_survivors_of_cleaning_stay_in_the_order_in_which_they_were_put() -> None:
    """Of every block some rows are replaced, and the segments cleaned in time; the others move together."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        volume = SsdVolume((folder,), 8 << 20)
        table, busy = one_table(volume), volume.table("busy", row_count=12_000, record_bytes=RECORD_BYTES)
        others = OTHERS[: 3 * len(BATCH)]
        mixed = torch.cat([torch.cat([BATCH[i : i + 5], others[3 * i : 3 * i + 15]]) for i in range(0, len(BATCH), 5)])
        table.put(mixed, torch.ones(len(mixed), RECORD_BYTES, dtype=torch.uint8))
        table.put(others, torch.zeros(len(others), RECORD_BYTES, dtype=torch.uint8))
        volume.flush()
        before, generator = pairs_in_one_block(table), torch.Generator().manual_seed(3)
        while volume.stats()["cleaned_segments"] < 150:  # of at most 8 at a time
            rows = torch.randint(0, busy.row_count, (500,), generator=generator)
            busy.put(rows, torch.zeros(len(rows), RECORD_BYTES, dtype=torch.uint8))
        volume.flush()
        assert before < SIDE_BY_SIDE - 0.1
        assert pairs_in_one_block(table) > SIDE_BY_SIDE
        volume.close()
