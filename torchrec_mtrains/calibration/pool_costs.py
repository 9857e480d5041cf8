"""Processor time of slot pools and what is behind them, per row and I/O: real pools over real volumes, prefetching.

Four kinds of run, each on a pool of an eighth of its table's rows that goes round the table in an order of its own, so that every row
is missed:

    memory       a MemoryVolume behind the pool, batches that change nothing: clean victims
    cache        the same with a PmemCache between that holds every row, and batches that change their rows: a victim goes into the cache
    ssd          an SsdVolume, clean victims
    ssd, dirty   the same, batches that change their rows: every victim is put into the log

What a kind costs more than another is the cost of what it does more. They take turns, and differences are taken in each round; what is
reported are medians over the rounds. Time is that of all threads of the process. The log has room for all that is put: nothing is cleaned.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from ..kernels.caches import CachedVolume
from ..kernels.volumes import MemoryVolume, SsdVolume
from ..tiers import PmemCache
from .effort import Effort, Said
from .pool import Pool

RECORD_BYTES = 260  # 64 weights in fp32 and the state of row-wise Adagrad
PREFETCHED = 2  # batches, as TieredTrainPipeline's default
LOG_BYTES_A_RECORD = 512  # more than twice a record of the log
SPARE_LOG_BYTES = 1 << 30
_PART = 1 << 14


@dataclass(frozen=True)
class PoolCosts:
    """Nanoseconds of processor time. ``per_missed_lookup``: directory included. None: there was nothing to measure it on."""

    per_missed_lookup: float
    per_io: float | None
    per_write_back: float | None
    per_cache_hit: float | None


@dataclass
class _Kind:
    """One kind of run, and what it counted in each round, per missed row: nanoseconds, reads of the device, victims put."""

    pool: Pool
    dirty: bool
    warm_batches: int
    ns: list[float] = field(default_factory=list)
    ios: list[float] = field(default_factory=list)
    write_backs: list[float] = field(default_factory=list)
    next: int = 0

    def round(self, order: np.ndarray, batches: int, batch_rows: int) -> tuple[float, float, float]:
        coming = [self.pool.batch(self._next_ids(order, batch_rows)) for _ in range(batches)]
        flying: deque[int] = deque()
        before, cpu = self._counters(), time.process_time_ns()
        for batch in coming:
            flying.append(self.pool.prefetch(batch, self.dirty))
            if len(flying) > PREFETCHED:
                self.pool.finish(flying.popleft(), self.dirty)
        while flying:
            self.pool.finish(flying.popleft(), self.dirty)
        self.pool.table.volume.flush()
        spent = time.process_time_ns() - cpu
        misses, ios, write_backs = (now - then for now, then in zip(self._counters(), before, strict=True))
        assert misses == batches * batch_rows, "going round the table misses every row"
        return spent / misses, ios / misses, write_backs / misses

    def measure(self, order: np.ndarray, effort: Effort) -> None:
        for what, value in zip((self.ns, self.ios, self.write_backs), self.round(order, effort.batches, effort.batch_rows), strict=True):
            what.append(value)

    def _next_ids(self, order: np.ndarray, rows: int) -> np.ndarray:
        first = self.next if self.next + rows <= len(order) else 0
        self.next = first + rows
        return order[first : self.next]

    def _counters(self) -> tuple[int, int, int]:
        pool, volume = self.pool.native.stats(0), self.pool.table.volume.stats()
        return pool["misses"], int(volume["read_ios"]), pool["write_backs"]


def _full(table: Any) -> Any:
    """Every row is put, in an order of its own: what lies in one block is not used together."""
    for ids in np.array_split(np.random.default_rng(1).permutation(table.row_count), max(1, table.row_count // _PART)):
        table.put(ids, np.ones((len(ids), table.record_bytes), np.uint8))
    table.volume.flush()
    return table


def _log_bytes(effort: Effort) -> int:
    put = effort.rows + (1 + effort.rounds) * effort.batches * effort.batch_rows
    return put * LOG_BYTES_A_RECORD + SPARE_LOG_BYTES


def _kinds(paths: Sequence[str], pmem_path: str | None, effort: Effort, opened: ExitStack, say: Said) -> dict[str, _Kind]:
    shape = {"row_count": effort.rows, "record_bytes": RECORD_BYTES}

    def kind(volume: Any, table: Callable[[Any], Any], dirty: bool, warm_batches: int) -> _Kind:
        opened.callback(volume.close)
        return _Kind(Pool(table(volume), effort.rows // 8), dirty, warm_batches)

    def home(volume: Any) -> Any:
        return _full(volume.table("t", **shape))

    say("rows in memory behind a pool")
    kinds = {"memory": kind(MemoryVolume(), home, False, effort.batches)}
    if pmem_path:
        below = MemoryVolume()
        home(below)
        caches = (PmemCache(pmem_path, effort.rows),)
        round_the_table = effort.rows // effort.batch_rows
        kinds["cache"] = kind(CachedVolume(below), lambda v: v.cached_table("t", **shape, caches=caches), True, round_the_table)
    for name, dirty in (("ssd", False), ("ssd, dirty", True)) if paths else ():
        say(f"rows on {', '.join(paths)} behind a pool")
        folders = tuple(opened.enter_context(tempfile.TemporaryDirectory(prefix="mtrains_calibrate_", dir=path)) for path in paths)
        kinds[name] = kind(SsdVolume(folders, _log_bytes(effort)), home, dirty, effort.batches)
    return kinds


def measure(paths: Sequence[str], pmem_path: str | None, effort: Effort, say: Said) -> PoolCosts:
    """``paths``: folders that an SSD volume is striped over; none: no SSD. ``pmem_path`` None: no PMem."""
    order = np.random.default_rng(2).permutation(effort.rows)
    with ExitStack() as opened:
        kinds = _kinds(paths, pmem_path, effort, opened, say)
        for name, kind in kinds.items():
            say(f"processor time of a missed row: {name}, the pool fills")
            kind.round(order, kind.warm_batches, effort.batch_rows)
        for round_ in range(effort.rounds):
            for name, kind in kinds.items():
                say(f"processor time of a missed row: {name}, round {round_ + 1}")
                kind.measure(order, effort)
    return _costs(kinds)


def _costs(kinds: dict[str, _Kind]) -> PoolCosts:
    def more(kind: str, than: str) -> float:
        return max(0.0, median(a - b for a, b in zip(kinds[kind].ns, kinds[than].ns, strict=True)))

    per_io = per_write_back = per_cache_hit = None
    if "cache" in kinds:
        per_cache_hit = more("cache", "memory")
    if "ssd" in kinds:
        per_io = more("ssd", "memory") / median(kinds["ssd"].ios)
        per_write_back = more("ssd, dirty", "ssd") / median(kinds["ssd, dirty"].write_backs)
    return PoolCosts(median(kinds["memory"].ns), per_io, per_write_back, per_cache_hit)
