"""Wanted rows that come along with the pages read for others: never stale, never asked for, and at no cost in I/O."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torchrec_mtrains.kernels import MemoryVolume, PmemVolume, SsdVolume, VolumeTable, _core
from torchrec_mtrains.kernels.caches import CachedVolume

from strategies import caches
from torchrec_mtrains.errors import IdOutOfRangeError
from torchrec_mtrains.tiers import Cache, DdrCache

RECORD_BYTES = 260
IN_A_BLOCK = 14
ROWS = 200
CAPACITY = 64 << 20
SMALL_CAPACITY = 16 << 20  # a table of 100 rows of 20,000 bytes is put often, so that the volume is cleaned


@pytest.fixture
def folder() -> Iterator[str]:
    """On the disk of the checkout: /tmp may be in memory, where there is no O_DIRECT."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        yield name


def ids(*rows: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def values(rows: torch.Tensor, version: int, record_bytes: int = RECORD_BYTES) -> torch.Tensor:
    """A record says which row and which version it is."""
    record = torch.cat([rows[:, None], torch.full_like(rows, version)[:, None]], 1).view(torch.uint8)
    return torch.cat([record, torch.zeros(len(rows), record_bytes - record.shape[1], dtype=torch.uint8)], 1)


def wanted(table: VolumeTable, *rows: int) -> _core.RowSet:
    rows_wanted = _core.RowSet(table.row_count)
    rows_wanted.add(ids(*rows))
    return rows_wanted


class Get:
    """A get in flight, and what came of it."""

    def __init__(self, table: VolumeTable, rows: torch.Tensor, also: _core.RowSet | None, take: bool = False) -> None:
        self.table, self.rows, self.also = table, rows, also
        self.out = torch.empty(len(rows), table.record_bytes, dtype=torch.uint8)
        self.token = table.volume._native.submit_get(table._id, rows, self.out, also, take)

    def wait(self) -> dict[int, torch.Tensor]:
        rows, payloads = self.table.volume._native.wait(self.token)
        assert len(set(rows)) == len(rows), "a row came twice"
        return {row: torch.frombuffer(bytearray(p), dtype=torch.uint8) for row, p in zip(rows, payloads, strict=True)}


def filled(volume: SsdVolume | PmemVolume | MemoryVolume, rows: int = ROWS) -> VolumeTable:
    """Every row on the medium, in order: ``IN_A_BLOCK`` of them in a block."""
    table = volume.table("t", row_count=rows, record_bytes=RECORD_BYTES)
    table.put(torch.arange(rows), values(torch.arange(rows), 1))
    volume.flush()
    return table


def test_wanted_rows_of_the_same_block_come_along_without_more_io(folder: str) -> None:
    table = filled(volume := SsdVolume((folder,), CAPACITY))
    before = volume.stats()
    get = Get(table, ids(3, 20), wanted(table, 3, 4, 7, 13, 14, 60))
    found = get.wait()
    assert torch.equal(get.out, values(ids(3, 20), 1))
    assert set(found) == {4, 7, 13, 14}  # 3 was asked for, 60 is in a block that was not read
    assert all(torch.equal(payload, values(ids(row), 1)[0]) for row, payload in found.items())
    after = volume.stats()
    assert (after["read_ios"] - before["read_ios"], after["read_bytes"] - before["read_bytes"]) == (2, 8192)
    assert after["neighbour_rows"] == 4


def test_nothing_comes_along_unless_it_is_wanted(folder: str) -> None:
    table = filled(SsdVolume((folder,), CAPACITY))
    assert not Get(table, ids(3), None).wait()
    assert not Get(table, ids(3), wanted(table)).wait()
    rows = wanted(table, 4, 5)
    rows.remove(ids(4))
    assert set(Get(table, ids(3), rows).wait()) == {5}


def test_only_the_pages_of_the_rows_asked_for_are_looked_at(folder: str) -> None:
    """Records of 1,500 bytes lie 8 in a block of three pages."""
    volume = SsdVolume((folder,), CAPACITY)
    table = volume.table("t", row_count=80, record_bytes=1500)
    table.put(torch.arange(80), values(torch.arange(80), 1, 1500))
    volume.flush()
    before = volume.stats()["read_bytes"]
    found = Get(table, ids(0), wanted(table, *range(80))).wait()
    assert set(found) == {1}  # 0 and 1 lie whole in the first page, 2 does not
    assert volume.stats()["read_bytes"] - before == 4096


@pytest.mark.parametrize("kind", [MemoryVolume, PmemVolume])
def test_a_medium_without_pages_to_read_has_no_neighbours(kind: type, folder: str) -> None:
    table = filled(kind() if kind is MemoryVolume else kind((folder,), CAPACITY))
    get = Get(table, ids(3), wanted(table, *range(ROWS)))
    assert not get.wait()
    assert torch.equal(get.out, values(ids(3), 1))


def test_a_row_that_was_put_meanwhile_does_not_come_along(folder: str) -> None:
    table = filled(volume := SsdVolume((folder,), CAPACITY))
    get = Get(table, ids(3), wanted(table, 4, 5))
    table.put(ids(4), values(ids(4), 2))  # into the write buffer
    assert set(get.wait()) == {5}
    assert set(Get(table, ids(3), wanted(table, 4, 5)).wait()) == {5}
    volume.flush()
    assert set(Get(table, ids(3), wanted(table, 4, 5)).wait()) == {5}


def test_a_row_that_was_taken_does_not_come_along_from_its_old_place(folder: str) -> None:
    table = filled(SsdVolume((folder,), CAPACITY))
    Get(table, ids(4), None, take=True).wait()
    assert set(Get(table, ids(3), wanted(table, 4, 5)).wait()) == {5}
    table.put(ids(4), values(ids(4), 2))


def test_rows_asked_for_by_another_request_of_the_batch_do_not_come_along(folder: str) -> None:
    table = filled(SsdVolume((folder,), CAPACITY))
    get = Get(table, ids(3, 5, 3), wanted(table, 3, 4, 5))
    assert set(get.wait()) == {4}
    assert torch.equal(get.out, values(ids(3, 5, 3), 1))


def test_a_damaged_record_does_not_come_along(folder: str) -> None:
    table = filled(SsdVolume((folder,), CAPACITY))
    (segment,) = Path(folder).glob("*.log")
    with segment.open("r+b") as opened:
        opened.seek(4096 + 4 * 288 + 100)
        opened.write(b"\xff")
    assert set(Get(table, ids(3), wanted(table, 4, 5)).wait()) == {5}


def test_a_set_of_rows_refuses_rows_that_it_cannot_hold() -> None:
    rows = _core.RowSet(10)
    for bad in (-1, 10):
        with pytest.raises(IdOutOfRangeError, match=rf"row {bad} is outside \[0, 10\)"):
            rows.add(ids(bad))
        assert bad not in rows
    rows.add(ids(9))
    assert 9 in rows


def test_a_row_that_a_cache_holds_does_not_come_along(folder: str) -> None:
    filled(below := SsdVolume((folder,), CAPACITY))
    volume = CachedVolume(below)
    table = volume.cached_table("t", row_count=ROWS, record_bytes=RECORD_BYTES, caches=(DdrCache(rows=3),))
    volume._native.evict(table._id, ids(4, 5), values(ids(4, 5), 2), True)
    assert set(Get(table, ids(3), wanted(table, *range(8))).wait()) == {0, 1, 2, 6, 7}
    volume._native.evict(table._id, ids(100, 101, 102), values(ids(100, 101, 102), 2), True)  # 4 and 5 sink into the write buffer
    assert set(Get(table, ids(3), wanted(table, *range(8))).wait()) == {0, 1, 2, 6, 7}


def test_neighbours_name_their_request_where_caches_answer_others(folder: str) -> None:
    """Two tables; all that is asked of the first one is in its cache."""
    filled(below := SsdVolume((folder,), CAPACITY))
    volume = CachedVolume(below)
    table = volume.cached_table("t", row_count=ROWS, record_bytes=RECORD_BYTES, caches=(DdrCache(rows=3),))
    volume._native.evict(table._id, ids(3), values(ids(3), 2), True)
    assert not Get(table, ids(3), wanted(table, 4)).wait()
    assert set(Get(table, ids(3, 6), wanted(table, 4)).wait()) == {4}


class NeighboursAreNewest(RuleBasedStateMachine):
    """Gets are waited for later; puts, evictions, cleaning and checkpoints come between. Every neighbour is the newest value then."""

    @initialize(chain=st.one_of(st.just(()), caches()))
    def create(self, chain: tuple[Cache, ...]) -> None:
        self.folder = tempfile.TemporaryDirectory(dir=Path.cwd())
        self.below = SsdVolume((self.folder.name,), SMALL_CAPACITY, depth=4, snapshot_after_bytes=0)
        self.volume = CachedVolume(self.below, 1000)
        self.table = self.volume.cached_table("t", row_count=ROWS, record_bytes=RECORD_BYTES, caches=chain)
        self.filler = self.below.table("filler", row_count=100, record_bytes=20_000)
        self.newest = [0] * ROWS
        self.version, self.epoch = 0, 0
        self.above: set[int] = set()  # taken, not put again
        self.gets: list[tuple[Get, set[int]]] = []
        self.put(list(range(ROWS)))
        self.volume.flush()

    def changed(self, rows: list[int]) -> torch.Tensor:
        self.version += 1
        for row in rows:
            self.newest[row] = self.version
        self.above.difference_update(rows)
        return values(ids(*rows), self.version)

    some_rows = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=20, unique=True)

    @rule(rows=some_rows)
    def put(self, rows: list[int]) -> None:
        self.table.put(ids(*rows), self.changed(rows))

    @rule(rows=some_rows)
    def evict(self, rows: list[int]) -> None:
        self.volume._native.evict(self.table._id, ids(*rows), self.changed(rows), True)

    @rule(first=st.integers(0, ROWS - 1))
    def evict_a_stretch(self, first: int) -> None:
        self.evict(list(range(first, min(ROWS, first + 2 * IN_A_BLOCK))))

    @rule(rows=some_rows, also=st.sets(st.integers(0, ROWS - 1), max_size=100), take=st.booleans())
    def submit(self, rows: list[int], also: set[int], take: bool) -> None:
        rows = [row for row in rows if row not in self.above]
        self.gets.append((Get(self.table, ids(*rows), wanted(self.table, *also), take), also))
        if take:
            self.above.update(rows)

    @precondition(lambda self: self.gets)
    @rule()
    def wait(self) -> None:
        get, also = self.gets.pop(0)
        for row, payload in get.wait().items():
            assert row in also
            assert row not in get.rows
            if row in self.above:
                continue  # its taker knows
            assert torch.equal(payload, values(ids(row), self.newest[row])[0])

    @rule(seed=st.integers(0, 255))
    def fill_up(self, seed: int) -> None:
        for first in range(0, 400, 10):
            if self.below.wants_checkpoint:  # cleaning has done what it can
                return
            self.filler.put(torch.arange(first, first + 10) % 100, torch.full((10, 20_000), seed, dtype=torch.uint8))

    @rule()
    def flush(self) -> None:
        self.volume.flush()

    @precondition(lambda self: not self.gets)
    @rule()
    def checkpoint(self) -> None:
        self.put(sorted(self.above) or [0])
        self.epoch += 1
        self.volume.checkpoint(self.epoch)

    @invariant()
    def checks_hold(self) -> None:
        self.volume._native.check()

    def teardown(self) -> None:
        for get, _ in self.gets:
            get.wait()
        self.volume.close()
        self.below.close()
        self.folder.cleanup()


TestNeighboursAreNewest = NeighboursAreNewest.TestCase
TestNeighboursAreNewest.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)


def test_neighbours_are_never_older_than_what_was_put_before_the_wait(folder: str) -> None:
    """One thread writes rows whose version only grows, while another waits for neighbours: cleaning goes on all the time."""
    volume = SsdVolume((folder,), 8 << 20)
    rows = 4000
    table = volume.table("t", row_count=rows, record_bytes=RECORD_BYTES)
    table.put(torch.arange(rows), values(torch.arange(rows), 1))
    finished = torch.ones(rows, dtype=torch.int64)  # versions whose put has returned
    generator = torch.Generator().manual_seed(1)

    def write() -> None:
        for version in range(2, 200):
            some = torch.randperm(rows, generator=generator)[:300].sort().values
            table.put(some, values(some, version))
            finished[some] = version

    everything, seen = wanted(table, *range(rows)), 0
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        while not writer.done():
            get = Get(table, torch.randint(0, rows, (50,)), everything)
            least = finished.clone()
            for row, payload in get.wait().items():
                got_row, version = payload[:16].view(torch.int64).tolist()
                assert got_row == row
                assert version >= least[row]
                seen += 1
        writer.result()
    assert seen > 1000
    assert volume.stats()["moved_rows"] > 0
