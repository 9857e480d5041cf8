"""Every store, alone and behind caches, is for whoever uses it the same dict of records.

One state machine gives the same commands to all stores at once. They are small enough that caches evict and logs clean; the
test counts that they did. When a log wants a checkpoint is a matter of threads, so nothing that is drawn depends on it. A
crash leaves the files that a killed process would: those that are closed, and those that are not.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torchrec_mtrains.kernels import MemoryVolume, PmemVolume, SsdVolume, VolumeTable
from torchrec_mtrains.kernels.caches import CachedVolume
from torchrec_mtrains.kernels.deferred_init import UniformInit

from disk import allocated_bytes
from strategies import PMEM
from torchrec_mtrains.errors import UnsupportedError, VolumeError, VolumeFullError
from torchrec_mtrains.tiers import Cache, DdrCache, PmemCache

CAPACITY_BYTES = 6 << 20  # of a log: 12 segments
KEEP_CHECKPOINTS = 2
MOST_AT_ONCE = 12  # rows of a put: below a segment, as the room is that a log keeps for one
RENUMBER_AFTER = 30  # insertions into a cache
# By table: bytes of a record, rows at first and at most, rows that it grows by, initial values. The last one only fills volumes.
RECORD_BYTES = (60_000, 68, 60_000)
FIRST_ROWS, MOST_ROWS, GROWTH = (24, 50, 400), (30, 200, 400), (2, 25, 0)
INITS = (None, UniformInit(7, -1, 1, columns=17), None)
FILLER = 2
COMPARED_ROWS = (*MOST_ROWS[:FILLER], 5)

Rows = dict[int, torch.Tensor]  # records by row; a row that is not there has its initial value


def ids(rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def records(seed: int, count: int, t: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, RECORD_BYTES[t]), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def initial(t: int, row: int) -> torch.Tensor:
    init = INITS[t]
    return torch.zeros(RECORD_BYTES[t], dtype=torch.uint8) if init is None else init.materialize(row, 1).view(torch.uint8).reshape(-1)


def wanted(t: int, rows: list[int], model: Rows) -> torch.Tensor:
    found = [model[row] if row in model else initial(t, row) for row in rows]
    return torch.stack(found) if rows else torch.empty(0, RECORD_BYTES[t], dtype=torch.uint8)


def read(table: VolumeTable, rows: list[int]) -> torch.Tensor:
    out = torch.empty(len(rows), table.record_bytes, dtype=torch.uint8)
    table.get(ids(rows), out)
    return out


def first_refused(table: VolumeTable, value: torch.Tensor) -> int:
    """Puts row after row until one does not fit."""
    for row in range(table.row_count):
        try:
            table.put(ids([row]), value)
        except VolumeFullError:
            return row
    raise AssertionError(f"{table.row_count} rows of {table.record_bytes} bytes fit in {CAPACITY_BYTES}")


class Store:
    """One kind of volume behind a chain of caches, perhaps none. ``take`` and ``evict`` are a slot pool's."""

    def __init__(
        self,
        name: str,
        kind: type[MemoryVolume | PmemVolume | SsdVolume],
        caches: tuple[Cache, ...] = (),
        stripes: int = 1,
        backend: str | None = None,
    ) -> None:
        self.name, self.kind, self.caches, self.stripes, self.backend = name, kind, caches, stripes, backend
        self.is_log = kind is not MemoryVolume
        self.tally: Counter[str] = Counter()
        self._stack = contextlib.ExitStack()
        self.folders: tuple[str, ...] = ()

    def _new_folders(self) -> tuple[str, ...]:
        where = PMEM if self.kind is PmemVolume else Path.cwd()  # /tmp may be in memory, where there is no O_DIRECT
        return tuple(self._stack.enter_context(tempfile.TemporaryDirectory(dir=where)) for _ in range(self.stripes))

    def open(self, row_counts: list[int]) -> None:
        if self.is_log:
            self.folders = self.folders or self._new_folders()
            options = {"keep_checkpoints": KEEP_CHECKPOINTS, "backend": self.backend, "depth": 4, "snapshot_after_bytes": 1 << 20}
            self.home = self.kind(self.folders, CAPACITY_BYTES, **options)
        else:
            self.home = self.kind()
        self._open_tables(row_counts)

    def _open_tables(self, row_counts: list[int]) -> None:
        self.chain = CachedVolume(self.home, RENUMBER_AFTER)
        self.row_counts = list(row_counts)
        self.cached = [self.chain.cached_table(**self._shape(t), caches=self.caches) for t in range(len(RECORD_BYTES))]
        self.tables = self.cached if self.caches else [self.home_table(t) for t in range(len(RECORD_BYTES))]
        self.volume = self.chain if self.caches else self.home

    def _shape(self, t: int) -> dict[str, Any]:
        return {"name": f"t{t}", "row_count": self.row_counts[t], "record_bytes": RECORD_BYTES[t], "init": INITS[t]}

    def home_table(self, t: int) -> VolumeTable:
        return self.home.table(**self._shape(t))

    def take(self, t: int, rows: list[int]) -> torch.Tensor:
        out = torch.empty(len(rows), RECORD_BYTES[t], dtype=torch.uint8)
        self.chain._native.wait(self.chain._native.submit_get(self.cached[t]._id, ids(rows), out, take=True))
        return out

    def evict(self, t: int, rows: list[int], values: torch.Tensor, dirty: bool) -> None:
        self.chain._native.evict(self.cached[t]._id, ids(rows), values, dirty)

    def count(self) -> None:
        """What has happened since the last opening of home and caches."""
        for counter in ("cleaned_segments", "moved_rows"):
            self.tally[counter] += self.home.stats()[counter]
        for level in range(len(self.caches)):
            for counter in ("hits", "evictions", "write_backs"):
                self.tally[f"{counter} of cache {level}"] += sum(self.chain.cache_stats(t)[level][counter] for t in self.cached)

    def grow(self, t: int, row_counts: list[int], everything: list[Rows]) -> None:
        """What is above has been put, and what is in caches flushed."""
        if self.is_log:
            self.home_table(t).grow(row_counts[t])
            self.chain.close()
            self._open_tables(row_counts)
            return
        with pytest.raises(UnsupportedError, match="cannot grow; make a new one"):
            self.tables[t].grow(row_counts[t])
        self.lose(row_counts, everything)

    def crash(self, row_counts: list[int], committed: list[Rows], closed: bool) -> None:
        """The process ends, having closed the volume or not, and another one opens what it left."""
        if not self.is_log:
            self.lose(row_counts, committed)
            return
        old = self.folders
        if not closed:
            self.folders = self._new_folders()
            for a, b in zip(old, self.folders, strict=True):
                for file in os.listdir(a):
                    with contextlib.suppress(FileNotFoundError):  # the cleaner removed it
                        os.link(f"{a}/{file}", f"{b}/{file}")
        self.chain.close()
        self.home.close()
        self.open(row_counts)

    def restore(self, epoch: int, row_counts: list[int], committed: list[Rows]) -> None:
        if self.is_log:
            self.volume.restore(epoch)
            return
        with pytest.raises(VolumeError, match="cannot go back"):
            self.volume.restore(epoch)
        self.lose(row_counts, committed)

    def lose(self, row_counts: list[int], everything: list[Rows]) -> None:
        """A volume in memory does not outlive its process: its rows come back out of a checkpoint of another kind."""
        self.chain.close()
        self.home.close()
        self.open(row_counts)
        for t, rows in enumerate(everything):
            if rows:
                self.tables[t].put(ids(list(rows)), torch.stack(list(rows.values())))

    def close(self) -> None:
        self.chain.close()
        self.home.close()
        self._stack.close()


def all_stores() -> list[Store]:
    return [
        Store("memory", MemoryVolume),
        Store("pmem", PmemVolume, stripes=2),
        Store("ssd", SsdVolume, stripes=2),
        Store("ddr, ssd", SsdVolume, (DdrCache(5),), backend="pread"),
        Store("ddr, pmem, pmem", PmemVolume, (DdrCache(3), PmemCache(PMEM, 4))),
    ]


def resumes_when_full(step: Callable[..., None]) -> Callable[..., None]:
    """A log that is too small for what comes between two checkpoints refuses a put; a job then resumes from the last one."""

    @functools.wraps(step)
    def body(self: StoresAgree, *arguments: Any, **named: Any) -> None:
        try:
            step(self, *arguments, **named)
        except VolumeFullError:
            self._crash(closed=True)

    return body


tables = st.integers(0, FILLER - 1)
seeds = st.integers(0, 1 << 30)


@st.composite
def some_rows(draw: st.DrawFn) -> list[float]:
    """Shares of a table: rows of one that may have grown since."""
    return draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=MOST_AT_ONCE))


class StoresAgree(RuleBasedStateMachine):
    """``model`` has the newest records; ``above`` the rows that a pool would hold: taken, and not evicted again."""

    def __init__(self, tally: dict[str, Counter[str]]) -> None:
        super().__init__()
        self.tally = tally
        self.stores: list[Store] = []

    @initialize()
    def create(self) -> None:
        self.stores = all_stores()
        self.row_counts = list(FIRST_ROWS)
        self.model: list[Rows] = [{} for _ in FIRST_ROWS]
        self.above: list[set[int]] = [set() for _ in FIRST_ROWS]
        self.epoch = 0
        self.committed = {0: (list(FIRST_ROWS), [dict(m) for m in self.model])}
        for store in self.stores:
            store.open(self.row_counts)

    # -- what the rules are made of

    def _rows(self, t: int, shares: list[float], above: bool = False) -> list[int]:
        rows = [int(share * self.row_counts[t]) for share in shares]
        return rows if above else [row for row in dict.fromkeys(rows) if row not in self.above[t]]

    def _want(self, t: int, rows: list[int]) -> torch.Tensor:
        return wanted(t, rows, self.model[t])

    def _put(self, t: int, rows: list[int], seed: int) -> None:
        values = records(seed, len(rows), t)
        for store in self.stores:
            store.tables[t].put(ids(rows), values)
        self._set(t, rows, values)

    def _set(self, t: int, rows: list[int], values: torch.Tensor) -> None:
        self.model[t].update(zip(rows, values, strict=True))
        self.above[t].difference_update(rows)

    def _compare_everything(self) -> None:
        for t, most in enumerate(COMPARED_ROWS):
            rows = [row for row in range(min(self.row_counts[t], most)) if row not in self.above[t]]
            self._compare(t, rows)

    def _compare(self, t: int, rows: list[int]) -> torch.Tensor:
        want = self._want(t, rows)
        differing = {}
        for store in self.stores:
            got = read(store.tables[t], rows)
            if not torch.equal(got, want):
                differing[store.name] = [row for row, a, b in zip(rows, got, want, strict=True) if not torch.equal(a, b)]
        assert not differing, f"table {t}"
        return want

    def _put_what_is_above(self) -> None:
        for t, above in enumerate(self.above):
            rows = sorted(above)
            values = self._want(t, rows)
            for store in self.stores:
                store.tables[t].put(ids(rows), values)
            above.clear()

    def _checkpoint(self) -> None:
        self._put_what_is_above()
        self.epoch += 1
        for store in self.stores:
            store.volume.checkpoint(self.epoch)
        self.committed[self.epoch] = (list(self.row_counts), [dict(m) for m in self.model])
        self.committed = {e: self.committed[e] for e in sorted(self.committed)[-KEEP_CHECKPOINTS:]}
        self._check_epochs()

    def _check_epochs(self) -> None:
        for store in self.stores:
            if store.is_log:
                assert store.volume.epochs == [e for e in sorted(self.committed) if e > 0], store.name

    def _serve_wishes(self) -> None:
        """As the training loop does between steps."""
        if any(store.is_log and store.home.wants_checkpoint for store in self.stores):
            self._checkpoint()

    def _go_back(self, epoch: int) -> None:
        self.committed = {e: c for e, c in self.committed.items() if e <= epoch}
        self.model = [dict(m) for m in self.committed[epoch][1]]
        for above in self.above:
            above.clear()
        self._check_epochs()
        self._compare_everything()

    def _crash(self, closed: bool) -> None:
        epoch = max(self.committed)
        self.row_counts = list(self.committed[epoch][0])
        for store in self.stores:
            store.count()
            store.crash(self.row_counts, self.committed[epoch][1], closed)
        self._go_back(epoch)

    # -- the rules

    @rule(t=tables, shares=some_rows(), seed=seeds)
    @resumes_when_full
    def put(self, t: int, shares: list[float], seed: int) -> None:
        self._serve_wishes()
        self._put(t, self._rows(t, shares, above=True), seed)

    @rule(t=tables, shares=some_rows())
    def get(self, t: int, shares: list[float]) -> None:
        self._compare(t, self._rows(t, shares))

    @rule(t=tables, shares=some_rows())
    def take(self, t: int, shares: list[float]) -> None:
        rows = self._rows(t, shares)
        want = self._want(t, rows)
        for store in self.stores:
            assert torch.equal(store.take(t, rows), want), store.name
        self.above[t].update(rows)

    @rule(t=tables, seed=seeds, most=st.integers(1, MOST_AT_ONCE))
    @resumes_when_full
    def change_and_evict(self, t: int, seed: int, most: int) -> None:
        self._serve_wishes()
        rows = sorted(self.above[t])[:most]
        values = records(seed, len(rows), t)
        for store in self.stores:
            store.evict(t, rows, values, dirty=True)
        self._set(t, rows, values)

    @rule(t=tables, shares=some_rows(), seed=seeds)
    @resumes_when_full
    def train(self, t: int, shares: list[float], seed: int) -> None:
        self.take(t, shares)
        self.change_and_evict(t, seed, most=MOST_AT_ONCE)

    @rule(t=tables, shares=some_rows())
    def evaluate(self, t: int, shares: list[float]) -> None:
        """Reads that do not take; what was read leaves the pool as it was."""
        rows = self._rows(t, shares)
        want = self._compare(t, rows)
        for store in self.stores:
            store.evict(t, rows, want, dirty=False)

    @rule()
    @resumes_when_full
    def flush(self) -> None:
        for store in self.stores:
            store.volume.flush()

    @rule()
    @resumes_when_full
    def checkpoint(self) -> None:
        self._checkpoint()

    @rule(closed=st.booleans())
    def crash_and_reopen(self, closed: bool) -> None:
        self._crash(closed)

    @rule(oldest=st.booleans(), t=tables, shares=some_rows(), seed=seeds)
    def restore(self, oldest: bool, t: int, shares: list[float], seed: int) -> None:
        self.train(t, shares, seed)  # something to undo, in the caches too
        kept = sorted(e for e in self.committed if e > 0)
        if not kept:
            return
        epoch = kept[0 if oldest else -1]
        for store in self.stores:
            store.restore(epoch, self.row_counts, self.committed[epoch][1])
        self._go_back(epoch)

    @rule(oldest=st.booleans())
    def read_beside_the_writers(self, oldest: bool) -> None:
        kept = sorted(e for e in self.committed if e > 0)
        if not kept:
            return
        epoch = kept[0 if oldest else -1]
        row_counts, tables = self.committed[epoch]
        for store in self.stores:
            if store.is_log:
                reader = store.kind.open_read_only(store.folders, epoch=epoch, backend=store.backend, depth=4)
                for t in range(FILLER):
                    table = reader.table(f"t{t}", row_count=row_counts[t], record_bytes=RECORD_BYTES[t], init=INITS[t])
                    rows = list(range(row_counts[t]))
                    assert torch.equal(read(table, rows), wanted(t, rows, tables[t])), store.name
                reader.close()

    @rule(t=tables, seed=seeds, rounds=st.integers(1, 16))
    @resumes_when_full
    def write_over_and_over(self, t: int, seed: int, rounds: int) -> None:
        """A few rows stay, so that what cleaning finds is not all dead."""
        for k in range(rounds):
            some = [row for row in range(self.row_counts[t]) if (row * 7 + seed + k) % 4]
            for first in range(0, len(some), MOST_AT_ONCE):
                self._serve_wishes()
                self._put(t, some[first : first + MOST_AT_ONCE], seed + k + first)

    @rule(t=tables)
    @resumes_when_full
    def grow(self, t: int) -> None:
        if self.row_counts[t] + GROWTH[t] > MOST_ROWS[t]:
            return
        self._put_what_is_above()
        self.row_counts[t] += GROWTH[t]
        for store in self.stores:
            store.volume.flush()
            store.count()
            store.grow(t, self.row_counts, self.model)
        self._compare_everything()

    @rule(seed=seeds)
    def fill_to_the_cap_and_crash(self, seed: int) -> None:
        """A put that does not fit changes nothing, and the last checkpoint is as it was."""
        value = records(seed, 1, FILLER)
        for store in self.stores:
            if store.is_log:
                table, cleaned = store.home_table(FILLER), store.home.stats()["cleaned_segments"]
                row = first_refused(table, value)
                put = [row - 1] if row else []  # what older checkpoints hold may leave no room at all
                assert torch.equal(read(table, [*put, row]), torch.stack([*(value[0] for _ in put), initial(FILLER, row)])), store.name
                store.tally["full"] += 1
                store.tally["cleaned_segments"] -= store.home.stats()["cleaned_segments"] - cleaned
        for t in range(FILLER):
            self._compare(t, [row for row in range(self.row_counts[t]) if row not in self.above[t]])
        self._crash(closed=True)

    @invariant()
    def nothing_exceeds_its_room(self) -> None:
        for store in self.stores:
            store.chain._native.check()
            assert allocated_bytes(store.folders) <= CAPACITY_BYTES + 16 * 4096, store.name  # the folders' own blocks, the lock
            for table in store.cached:
                assert all(c["resident_rows"] <= c["rows"] for c in store.chain.cache_stats(table))

    def teardown(self) -> None:
        if self.stores:
            self._compare_everything()
            for store in self.stores:
                store.count()
                self.tally.setdefault(store.name, Counter()).update(store.tally)
        for store in self.stores:
            store.close()


def test_no_store_differs_from_a_dict() -> None:
    tally: dict[str, Counter[str]] = {}
    run_state_machine_as_test(lambda: StoresAgree(tally), settings=settings(max_examples=30, stateful_step_count=30, deadline=None))
    print(tally)
    for store in all_stores():
        wanted = ["cleaned_segments", "moved_rows", "full"] if store.is_log else []
        for level in range(len(store.caches)):
            wanted += [f"{counter} of cache {level}" for counter in ("hits", "evictions", "write_backs")]
        assert not [what for what in wanted if not tally[store.name][what]], f"{store.name} had too little to do"
