"""Caches between slot pools and a home: they change where a row is read from, and never its value."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torchrec_mtrains.kernels import MemoryVolume, SsdVolume, VolumeTable
from torchrec_mtrains.kernels.caches import CachedVolume
from torchrec_mtrains.kernels.deferred_init import UniformInit

from strategies import PMEM, caches
from torchrec_mtrains.errors import ConfigurationError, DamagedRecordError, IdOutOfRangeError, VolumeError, VolumeFullError, VolumeIoError
from torchrec_mtrains.tiers import Cache, DdrCache, PmemCache

CAPACITY = 64 << 20
ROWS = 40
RECORD_BYTES = 68


@pytest.fixture
def folder() -> Iterator[str]:
    """On the disk of the checkout: /tmp may be in memory, where there is no O_DIRECT."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        yield name


def ids(*rows: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def records(*first_bytes: int) -> torch.Tensor:
    """One record per argument, each byte of it counting up from the argument."""
    return ((torch.arange(RECORD_BYTES)[None, :] + torch.tensor(first_bytes, dtype=torch.int64)[:, None]) % 256).to(torch.uint8)


def read(table: VolumeTable, *rows: int) -> torch.Tensor:
    out = torch.empty(len(rows), RECORD_BYTES, dtype=torch.uint8)
    table.get(ids(*rows), out)
    return out


def submit_take(table: VolumeTable, *rows: int) -> tuple[int, torch.Tensor]:
    """A token to wait for, and where the records will be then."""
    out = torch.empty(len(rows), RECORD_BYTES, dtype=torch.uint8)
    return table.volume._native.submit_get(table._id, ids(*rows), out, take=True), out


def take(table: VolumeTable, *rows: int) -> torch.Tensor:
    token, out = submit_take(table, *rows)
    table.volume._native.wait(token)
    return out


def evict(table: VolumeTable, rows: list[int], values: torch.Tensor, dirty: bool = True) -> None:
    table.volume._native.evict(table._id, ids(*rows), values, dirty)


def cached(*chain: Cache, below: SsdVolume | MemoryVolume | None = None) -> VolumeTable:
    return CachedVolume(below or MemoryVolume()).cached_table("t", row_count=ROWS, record_bytes=RECORD_BYTES, caches=chain)


def stats(table: VolumeTable) -> list[dict[str, int]]:
    assert isinstance(table.volume, CachedVolume)
    return table.volume.cache_stats(table)


class CachesAgree(RuleBasedStateMachine):
    """Two tables behind caches over one volume are, for whoever takes and evicts their rows, like a memory volume.

    ``model`` holds the newest value of every row; ``above`` those that a pool would hold: taken, and not evicted again.
    """

    on_ssd = False

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=Path.cwd())
        self.init = UniformInit(7, -1, 1, columns=2)

    @initialize(chains=st.lists(caches(), min_size=2, max_size=2), batch_limit=st.sampled_from([4, 20, 1000]))
    def create(self, chains: list[tuple[Cache, ...]], batch_limit: int) -> None:
        self.chains, self.batch_limit = chains, batch_limit
        self.epoch = 0
        self.committed: list[torch.Tensor] = []
        self.model = self._tables_of_a_memory_volume()
        self._open()

    def _tables_of_a_memory_volume(self) -> list[VolumeTable]:
        volume = MemoryVolume()
        return [volume.table(f"t{i}", row_count=ROWS, record_bytes=RECORD_BYTES, init=self.init) for i in range(2)]

    def _open(self) -> None:
        self.below = SsdVolume((self.folder.name,), CAPACITY, depth=4) if self.on_ssd else MemoryVolume()
        self.volume = CachedVolume(self.below, self.batch_limit)
        self.tables = [
            self.volume.cached_table(f"t{i}", row_count=ROWS, record_bytes=RECORD_BYTES, init=self.init, caches=chain)
            for i, chain in enumerate(self.chains)
        ]
        self.above: list[set[int]] = [set(), set()]
        self.pending: list[tuple[tuple[int, torch.Tensor], torch.Tensor]] = []

    tables_and_rows = {"t": st.integers(0, 1), "rows": st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=20, unique=True)}

    @rule(**tables_and_rows)
    def get(self, t: int, rows: list[int]) -> None:
        below = [row for row in rows if row not in self.above[t]]
        assert torch.equal(read(self.tables[t], *below), read(self.model[t], *below))

    @rule(**tables_and_rows)
    def take(self, t: int, rows: list[int]) -> None:
        below = [row for row in rows if row not in self.above[t]]
        assert torch.equal(take(self.tables[t], *below), read(self.model[t], *below))
        self.above[t].update(below)

    @rule(**tables_and_rows)
    def take_and_wait_later(self, t: int, rows: list[int]) -> None:
        below = [row for row in rows if row not in self.above[t]]
        self.pending.append((submit_take(self.tables[t], *below), read(self.model[t], *below)))
        self.above[t].update(below)

    @rule()
    def wait_for_what_was_taken(self) -> None:
        for (token, out), expected in self.pending:
            self.volume._native.wait(token)
            assert torch.equal(out, expected)
        self.pending.clear()

    @rule(t=st.integers(0, 1), share=st.sampled_from([0.3, 1.0]), seed=st.integers(0, 255))
    def change_and_evict_what_was_taken(self, t: int, share: float, seed: int) -> None:
        rows = sorted(self.above[t])
        rows = rows[: max(1, int(share * len(rows)))]
        values = records(*[seed + row for row in rows])
        evict(self.tables[t], rows, values)
        self.model[t].put(ids(*rows), values)
        self.above[t].difference_update(rows)

    @rule(t=st.integers(0, 1), rows=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=20), seed=st.integers(0, 255))
    def evict_changed(self, t: int, rows: list[int], seed: int) -> None:
        values = records(*[seed + i for i in range(len(rows))])
        evict(self.tables[t], rows, values)
        self.model[t].put(ids(*rows), values)
        self.above[t].difference_update(rows)

    @rule(**tables_and_rows)
    def evict_unchanged(self, t: int, rows: list[int]) -> None:
        below = [row for row in rows if row not in self.above[t]]
        evict(self.tables[t], below, read(self.model[t], *below), dirty=False)

    @rule(**tables_and_rows, seed=st.integers(0, 255))
    def put_and_keep(self, t: int, rows: list[int], seed: int) -> None:
        values = records(*[seed + i for i in range(len(rows))])
        for tables in (self.tables, self.model):
            tables[t].put(ids(*rows), values)
        self.above[t].difference_update(rows)

    @rule()
    def flush_brings_everything_home(self) -> None:
        self._put_what_is_above()
        self.volume.flush()
        for mine, model in zip(self.tables, self.model, strict=True):
            home = self.below.table(mine.name, row_count=ROWS, record_bytes=RECORD_BYTES, init=self.init)
            assert torch.equal(read(home, *range(ROWS)), read(model, *range(ROWS)))

    def _put_what_is_above(self) -> None:
        self.wait_for_what_was_taken()
        for t, rows in enumerate(self.above):
            self.tables[t].put(ids(*rows), read(self.model[t], *rows))
            rows.clear()

    @rule()
    def checkpoint(self) -> None:
        self._put_what_is_above()
        self.epoch += 1
        self.volume.checkpoint(self.epoch)
        self.committed = [read(t, *range(ROWS)) for t in self.model]

    def _go_back(self) -> None:
        self.model = self._tables_of_a_memory_volume()
        for table, values in zip(self.model, self.committed, strict=True):
            table.put(torch.arange(ROWS), values)

    @precondition(lambda self: self.on_ssd and self.committed)
    @rule(crash=st.booleans())
    def crash_or_restore(self, crash: bool) -> None:
        self.wait_for_what_was_taken()
        if crash:
            self.below.close()
            self._open()
            assert self.volume.epoch == self.epoch
        else:
            self.volume.restore(self.epoch)
            self.above = [set(), set()]
        self._go_back()

    @invariant()
    def caches_are_whole_and_within_their_rows(self) -> None:
        if hasattr(self, "volume"):
            self.volume._native.check()
            for table, chain in zip(self.tables, self.chains, strict=True):
                for tier, s in zip(chain, stats(table), strict=True):
                    assert s["resident_rows"] <= s["rows"] == tier.rows
                    assert s["inserted_rows"] >= s["evictions"] >= 0

    def teardown(self) -> None:
        if hasattr(self, "volume"):
            self._put_what_is_above()
            for mine, model in zip(self.tables, self.model, strict=True):
                assert torch.equal(read(mine, *range(ROWS)), read(model, *range(ROWS)))
            self.volume.close()
            self.below.close()
        self.folder.cleanup()


class CachesAgreeOverAnSsd(CachesAgree):
    on_ssd = True


TestCachesAgree = CachesAgree.TestCase
TestCachesAgree.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCachesAgreeOverAnSsd = CachesAgreeOverAnSsd.TestCase
TestCachesAgreeOverAnSsd.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_an_evicted_row_is_read_from_the_cache_and_not_from_its_home(folder: str) -> None:
    ssd = SsdVolume((folder,), CAPACITY)
    table = cached(DdrCache(10), below=ssd)
    evict(table, [3, 4], records(1, 2))
    assert torch.equal(read(table, 4, 3), records(2, 1))
    assert ssd.stats()["get_rows"] == ssd.stats()["put_rows"] == 0
    assert (stats(table)[0]["hits"], stats(table)[0]["misses"]) == (2, 0)


def test_records_sink_from_cache_to_cache_and_home_in_the_order_they_came() -> None:
    home = MemoryVolume()
    table = cached(DdrCache(2), PmemCache(PMEM, 2), below=home)
    for row in range(6):
        evict(table, [row], records(row))
    assert [s["resident_rows"] for s in stats(table)] == [2, 2]
    assert home.stats()["put_rows"] == 2
    read(table, *range(6))
    assert [(s["hits"], s["misses"], s["write_backs"]) for s in stats(table)] == [(2, 4, 4), (2, 2, 2)]


def test_a_taken_row_leaves_the_cache_unwritten() -> None:
    home = MemoryVolume()
    table = cached(DdrCache(2), below=home)
    evict(table, [0, 1], records(1, 2))
    take(table, 0)
    evict(table, [2], records(3))
    assert stats(table)[0]["resident_rows"] == 2
    assert stats(table)[0]["evictions"] == home.stats()["put_rows"] == 0


def test_unchanged_rows_are_kept_and_never_written() -> None:
    home = MemoryVolume()
    table = cached(DdrCache(2), below=home)
    table.put(torch.arange(8), records(*range(8)))
    for row in range(8):
        evict(table, [row], records(row), dirty=False)
    table.volume.flush()
    assert home.stats()["put_rows"] == 8
    assert torch.equal(read(table, *range(8)), records(*range(8)))
    assert (stats(table)[0]["hits"], stats(table)[0]["evictions"], stats(table)[0]["write_backs"]) == (2, 6, 0)


def test_a_put_takes_its_row_out_of_every_cache() -> None:
    table = cached(DdrCache(1), DdrCache(1))
    evict(table, [0, 1], records(1, 2))
    table.put(ids(0, 1), records(3, 4))
    assert [s["resident_rows"] for s in stats(table)] == [0, 0]
    assert torch.equal(read(table, 0, 1), records(3, 4))


def test_flushed_records_stay_and_are_not_written_again() -> None:
    home = MemoryVolume()
    table = cached(DdrCache(5), below=home)
    evict(table, [0, 1], records(1, 2))
    for _ in range(2):
        table.volume.flush()
    assert home.stats()["put_rows"] == stats(table)[0]["flushed_rows"] == stats(table)[0]["resident_rows"] == 2


def test_a_read_that_fails_leaves_what_it_would_have_taken(folder: str) -> None:
    ssd = SsdVolume((folder,), CAPACITY)
    table = cached(DdrCache(2), below=ssd)
    table.put(ids(5), records(9))
    table.volume.flush()
    evict(table, [0, 1], records(1, 2))
    segment = next(Path(folder).glob("segment_*.log"))
    data = bytearray(segment.read_bytes())
    data[4096 + 24 + 30] ^= 1
    segment.write_bytes(data)
    with pytest.raises(DamagedRecordError):
        take(table, 0, 5, 1)
    assert stats(table)[0]["resident_rows"] == 2
    assert torch.equal(take(table, 0, 1), records(1, 2))
    assert stats(table)[0]["resident_rows"] == 0


@pytest.mark.parametrize("evictions_before", range(3))
@pytest.mark.parametrize("evictions_between", range(6))
def test_a_row_that_comes_back_before_its_read_is_waited_for_stays(folder: str, evictions_before: int, evictions_between: int) -> None:
    """However often insertions were numbered anew meanwhile."""
    ssd = SsdVolume((folder,), CAPACITY)
    table = CachedVolume(ssd, batch_limit=4).cached_table("t", row_count=ROWS, record_bytes=RECORD_BYTES, caches=(DdrCache(1),))
    table.put(ids(5), records(9))
    table.volume.flush()
    for i in range(evictions_before):
        evict(table, [10], records(100 + i))
    evict(table, [0], records(1))
    token, out = submit_take(table, 0, 5)
    for i in range(evictions_between):
        evict(table, [10], records(100 + i))
    evict(table, [0], records(2))
    table.volume._native.wait(token)
    assert torch.equal(out, records(1, 9))
    assert stats(table)[0]["resident_rows"] == 1
    assert torch.equal(read(table, 0), records(2))


def test_an_eviction_that_finds_the_home_full_loses_nothing(folder: str) -> None:
    ssd = SsdVolume((folder,), 8 << 20)
    rows = 4000
    volume = CachedVolume(ssd)
    table = volume.cached_table("t", row_count=rows, record_bytes=4000, caches=(DdrCache(100), PmemCache(PMEM, 100)))
    kept, out = 0, torch.empty(100, 4000, dtype=torch.uint8)

    def fill() -> None:
        nonlocal kept
        for first in range(0, rows, 100):
            volume._native.evict(table._id, torch.arange(first, first + 100), torch.full((100, 4000), first // 100 + 1).byte(), True)
            kept += 1

    with pytest.raises(VolumeFullError):
        fill()
    assert kept > 10
    volume._native.check()
    for batch in range(kept):
        table.get(torch.arange(100 * batch, 100 * batch + 100), out)
        assert out.eq(batch + 1).all(), batch


def test_a_cache_is_no_larger_than_its_table() -> None:
    table = cached(DdrCache(10**12), PmemCache(PMEM, 10**12))
    assert [s["rows"] for s in stats(table)] == [ROWS, ROWS]


def test_host_memory_of_a_cache_is_taken_as_rows_come() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident_bytes()
    volume = CachedVolume(MemoryVolume())
    table = volume.cached_table("t", row_count=1 << 20, record_bytes=4096, caches=(DdrCache(1 << 20),))
    volume._native.evict(table._id, ids(7), torch.ones(1, 4096, dtype=torch.uint8), True)
    assert resident_bytes() - before < 256 << 20


def test_a_pmem_cache_leaves_no_file_behind_even_when_killed(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from torchrec_mtrains.kernels import MemoryVolume
from torchrec_mtrains.kernels.caches import CachedVolume
from torchrec_mtrains.tiers import PmemCache
volume = CachedVolume(MemoryVolume())
table = volume.cached_table("t", row_count=1000, record_bytes=68, caches=(PmemCache(sys.argv[1], 1000),))
maps = [line for line in open("/proc/self/maps") if sys.argv[1] in line]
assert len(maps) == 1 and "(deleted)" in maps[0] and "rw-s" in maps[0], maps
print("open", os.listdir(sys.argv[1]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert run.stdout == "open []\n", run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_pmem_cache_gives_its_space_back_when_closed(tmp_path: Path) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    table = cached(PmemCache(str(tmp_path), 10))
    assert mapped() == 1
    table.volume.close()
    assert mapped() == 0
    with pytest.raises(VolumeError, match="is closed"):
        read(table, 0)


def test_a_pmem_folder_that_is_missing_or_too_small_is_named(tmp_path: Path) -> None:
    with pytest.raises(VolumeIoError, match=r"cannot create a cache file in '.*nowhere': No such file"):
        cached(PmemCache(str(tmp_path / "nowhere"), 10))
    volume = CachedVolume(MemoryVolume())
    with pytest.raises(VolumeFullError, match=r"cannot take \d+ bytes for a cache in .*Nothing is left there"):
        volume.cached_table("t", row_count=1 << 20, record_bytes=1 << 20, caches=(PmemCache(PMEM, 1 << 20),))
    assert volume.below.stats()["put_rows"] == 0


def test_a_table_is_opened_behind_caches_once() -> None:
    table = cached(DdrCache(2))
    assert isinstance(table.volume, CachedVolume)
    with pytest.raises(ConfigurationError, match="table 't' is already open"):
        table.volume.cached_table("t", row_count=ROWS, record_bytes=RECORD_BYTES, caches=(DdrCache(3),))
    assert table.volume.table("t", row_count=ROWS, record_bytes=RECORD_BYTES)._id == table._id


def test_rows_outside_the_table_are_refused_before_anything_changes() -> None:
    table = cached(DdrCache(3))
    for bad in (-1, ROWS):
        for dirty in (True, False):
            with pytest.raises(IdOutOfRangeError):
                evict(table, [0, bad], records(1, 2), dirty)
        with pytest.raises(IdOutOfRangeError):
            take(table, 0, bad)
    assert stats(table)[0]["inserted_rows"] == 0


def test_threads_that_share_a_table_get_their_own_rows_newest_values(folder: str) -> None:
    """Each thread evicts, reads and takes rows that no other touches, through caches that all of them fill."""
    ssd = SsdVolume((folder,), CAPACITY)
    rows_each, threads = 50, 3
    table = CachedVolume(ssd).cached_table(
        "t", row_count=rows_each * threads, record_bytes=RECORD_BYTES, caches=(DdrCache(20), PmemCache(PMEM, 20))
    )
    wrong: list[str] = []

    def work(thread: int) -> None:
        generator = torch.Generator().manual_seed(thread)
        model = torch.zeros(rows_each, RECORD_BYTES, dtype=torch.uint8)
        for step in range(300):
            mine = torch.randperm(rows_each, generator=generator)[:15]
            rows = (mine + thread * rows_each).tolist()
            if not torch.equal(take(table, *rows), model[mine]) and not wrong:
                wrong.append(f"thread {thread}, step {step}")
            model[mine] = records(*[step + i for i in range(15)])
            evict(table, rows, model[mine])
            if step % 50 == thread:
                table.volume.flush()

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, i) for i in range(threads)]:
            done.result()
    assert wrong == []
    table.volume._native.check()
