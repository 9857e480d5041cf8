"""Rows that train in a slot pool leave the disk: their volume may forget its copies until they are put again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec_mtrains.kernels import SsdVolume, VolumeTable, _core
from torchrec_mtrains.kernels.tiered_tbe import BATCH_LIMIT

from torchrec_mtrains.errors import VolumeError

ROWS, RECORD_BYTES, CAPACITY = 300, 1000, 8 << 20


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        yield name


class Pool:
    """A slot pool over one table, trained by adding 1 to every byte of a batch's rows."""

    def __init__(self, volume: SsdVolume, slots: int) -> None:
        self.volume, self.table = volume, volume.table("t", row_count=ROWS, record_bytes=RECORD_BYTES)
        self.memory = torch.zeros(slots, RECORD_BYTES, dtype=torch.uint8)
        part = _core.Part(self.memory.data_ptr(), RECORD_BYTES, RECORD_BYTES)
        self.pool = _core.SlotPool([_core.SlotPoolTable("t", volume._native, self.table._id, ROWS, slots, [part])], [0], BATCH_LIMIT)

    def batch(self, rows: torch.Tensor, train: bool = True) -> torch.Tensor:
        """The rows' values before the step."""
        slots, offsets = torch.empty_like(rows), torch.tensor([0, len(rows)])
        seq = self.pool.begin(_core.Batch(rows.data_ptr(), False, len(rows), offsets.data_ptr()), slots.data_ptr(), train)
        self.pool.wait(seq)
        values = self.memory[slots].clone()
        if train:
            self.memory[slots] += 1
        self.pool.release(seq)
        return values


def read(table: VolumeTable, rows: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(rows), RECORD_BYTES, dtype=torch.uint8)
    table.get(rows, out)
    return out


def written(volume: SsdVolume) -> VolumeTable:
    """Every row on disk, with value 7."""
    table = volume.table("t", row_count=ROWS, record_bytes=RECORD_BYTES)
    table.put(torch.arange(ROWS), torch.full((ROWS, RECORD_BYTES), 7, dtype=torch.uint8))
    volume.flush()
    return table


def test_a_row_in_training_is_read_from_its_pool_alone(folder: str) -> None:
    volume = SsdVolume((folder,), CAPACITY)
    table, pool = written(volume), Pool(volume, 20)
    pool.batch(torch.arange(10))
    with pytest.raises(VolumeError, match="row 3: its newest value is in a slot pool"):
        read(table, torch.tensor([3]))
    assert (read(table, torch.arange(10, ROWS)) == 7).all()
    pool.pool.flush()
    assert (read(table, torch.arange(10)) == 8).all()


def test_no_checkpoint_is_committed_without_the_rows_in_training(folder: str) -> None:
    volume = SsdVolume((folder,), CAPACITY)
    written(volume)
    pool = Pool(volume, 20)
    pool.batch(torch.arange(10))
    with pytest.raises(VolumeError, match="newest values, 10240 bytes of records, are in slot pools"):
        volume.checkpoint(1)
    assert volume.epochs == []
    pool.pool.flush()
    volume.checkpoint(1)
    assert volume.epochs == [1]


def test_a_row_that_is_only_looked_at_stays_on_disk(folder: str) -> None:
    volume = SsdVolume((folder,), CAPACITY)
    table, pool = written(volume), Pool(volume, 20)
    pool.batch(torch.arange(10), train=False)
    assert (read(table, torch.arange(ROWS)) == 7).all()
    volume.checkpoint(1)


def test_returning_to_a_checkpoint_finds_the_rows_that_were_given_up_since(folder: str) -> None:
    volume = SsdVolume((folder,), CAPACITY)
    table = written(volume)
    volume.checkpoint(1)
    pool = Pool(volume, 20)
    pool.batch(torch.arange(10))
    pool.pool.forget()
    volume.restore(1)
    assert (read(table, torch.arange(ROWS)) == 7).all()


def test_cleaning_copies_no_row_that_is_in_training(folder: str) -> None:
    rows, capacity = 6000, 12 << 20
    half = rows // 2

    def moved(train: bool) -> int:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
            volume = SsdVolume((name,), capacity)
            table = volume.table("big", row_count=rows, record_bytes=RECORD_BYTES)
            for part in torch.arange(rows).split(250):
                table.put(part, torch.zeros(len(part), RECORD_BYTES, dtype=torch.uint8))
            memory = torch.zeros(half, RECORD_BYTES, dtype=torch.uint8)
            part = _core.Part(memory.data_ptr(), RECORD_BYTES, RECORD_BYTES)
            native = _core.SlotPoolTable("big", volume._native, table._id, rows, half, [part])
            pool = _core.SlotPool([native], [0], BATCH_LIMIT)
            ids, slots = torch.arange(half) * 2, torch.empty(half, dtype=torch.int64)  # every second row of every block
            offsets = torch.tensor([0, half])
            pool.release(pool.begin(_core.Batch(ids.data_ptr(), False, half, offsets.data_ptr()), slots.data_ptr(), train))
            generator = torch.Generator().manual_seed(0)
            for _ in range(200):
                churned = torch.randperm(half, generator=generator)[:100] * 2 + 1
                table.put(churned, torch.zeros(100, RECORD_BYTES, dtype=torch.uint8))
            volume.flush()
            return volume.stats()["moved_rows"]

    assert moved(train=True) < 0.75 * moved(train=False)  # half of every segment is in training


@settings(deadline=None, max_examples=20)
@given(
    batches=st.lists(st.tuples(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=12, unique=True), st.booleans()), max_size=60),
    slots=st.integers(12, 40),
    commit_after=st.integers(0, 60),
)
def test_training_through_a_pool_loses_no_step_and_a_crash_none_that_was_committed(
    batches: list[tuple[list[int], bool]], slots: int, commit_after: int
) -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        volume = SsdVolume((name,), CAPACITY)
        written(volume)
        pool = Pool(volume, slots)
        expected, committed = torch.full((ROWS,), 7, dtype=torch.uint8), None
        for step, (rows, train) in enumerate(batches):
            ids = torch.tensor(rows)
            assert torch.equal(pool.batch(ids, train)[:, 0], expected[ids])
            expected[ids] += train
            if step == commit_after:
                pool.pool.flush()
                volume.checkpoint(1)
                committed = expected.clone()
        pool.pool.flush()
        assert torch.equal(read(pool.table, torch.arange(ROWS))[:, 0], expected)
        volume._native.close()  # nothing since the checkpoint outlives this
        if committed is not None:
            volume = SsdVolume((name,), CAPACITY)
            table = volume.table("t", row_count=ROWS, record_bytes=RECORD_BYTES)
            assert torch.equal(read(table, torch.arange(ROWS))[:, 0], committed)
            volume.close()
