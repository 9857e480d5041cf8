"""What a step costs: milliseconds that a table's shard keeps each resource of a rank busy, and the step that follows.

A step is training of one batch and, beside it, prefetching of later ones::

    cpu     the training thread: dense compute, lookups and updates of the stock TBE, communication, overhead of modules
    tiers   the threads that prefetch: directory, misses, reads, write-backs. Where torch's threads take all cores, this is time of the
            training thread, and counted there: a copy ends when its slowest thread does. So is a part of the SSD's time, which
            then waits for a core to be driven by. Where a pool cannot hold the rows of two batches, nothing is prefetched into it,
            and all of this is the training thread's
    ddr     bytes of rows, read and written                                  ┐
    pmem    records that caches give (hits) and take (every victim)          │ devices, shared by the ranks of a host
    ssd     reads of single records at the device's rate, and the log's      │
            writes, cleaning included, at the rate of large blocks           ┘

    prefetched       step = the largest of them (a device: of all ranks of its host)
    not prefetched   step = their sum

Everything is linear in what tables do, so that the busy times of a rank are sums over its tables; no time is ever negative, and the more
rows a pool or cache has, the less busy every resource (tests/test_perf_model.py). Not seen: queues that are not deep (a step of few misses
is cheap anyway, and prefetched), and bandwidth that differs by the order of accesses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigurationError
from ..lookahead import LOOKAHEAD_BYTES
from . import charges
from .access_profile import MissCurve
from .checkpoint_schedule import CheckpointSchedule
from .hardware_profile import BlockDeviceProfile, HardwareProfile

Floats = NDArray[np.float64]

RESOURCES = ("cpu", "tiers", "ddr", "pmem", "ssd", "gpu", "pcie")  # the last two: gpu_perf_model.py
SHARED = np.array([False, False, True, True, True, False, False])
CPU, TIERS, DDR, PMEM, SSD, GPU, PCIE = range(7)

IN_FLIGHT_BATCHES = 2  # that must be in a pool at once, so that one is read while the other trains
QUEUE_DEPTH = 256  # reads in flight of one volume: kernels/csrc/log_volume.h
_WRITE_BYTES = 1 << 20  # of a log's appends
_NOT_OVERLAPPED = 0.3  # of the SSD's time, where its thread has no core: fitted to 36 jobs on 2 cores (docs/calibrate.md)
_MORE_THAN_IN_FLIGHT = 1.03  # the fullest of batches, and of between what a profile counts: 1 to 2% (docs/calibrate.md)
_READ_AND_WRITTEN = 3  # times that a row passes through memory in a step: forward, and read and written by the optimizer


@dataclass(frozen=True)
class ShardUse:
    """What one step does to a shard of ``rows``: all ranks' lookups that fall into it, and the rows among them.

    ``curve``: of the whole table, which has ``table_rows``; the shard has ``share`` of its uses. ``ssd_curve``: what of it is read from
    an SSD, where rows that come along with neighbours need no read of their own (``neighbours.py``); None: all. ``comms_ms``: what the
    shard's communication takes its rank. ``compute_ms``: what else the training thread does for it. ``in_flight``: distinct rows of the
    batch that trains and the next; left out, as if they had none in common.
    """

    rows: int
    lookups: float
    unique_rows: float
    weight_bytes: int
    record_bytes: int
    curve: MissCurve
    table_rows: int
    share: float = 1.0
    ssd_curve: MissCurve | None = None
    comms_ms: float = 0.0
    compute_ms: float = 0.0
    in_flight: float = math.inf

    @property
    def rows_in_flight(self) -> float:
        """Rows of the batch that trains and of the next: a pool of fewer, or of hardly more, has no room to prefetch."""
        return min(float(self.rows), IN_FLIGHT_BATCHES * self.unique_rows, _MORE_THAN_IN_FLIGHT * self.in_flight)

    def __deepcopy__(self, memo: Any) -> ShardUse:
        return self  # options are copied often, and this never changes

    def misses(self, rows_held: Any) -> Floats:
        """Rows a step that are not among so many of the shard. Shapes: any → the same."""
        return self._at(rows_held, self.curve.misses_per_batch)

    def reads(self, pool_rows: Any, cache_rows: Any = 0) -> Floats:
        """Of those misses, the ones that an SSD below a pool and a cache reads. Neighbours come into the pool, so no more than it has room
        for. Shapes: any, any → the same."""
        if self.ssd_curve is None:
            return self.misses(np.add(pool_rows, cache_rows))
        over, held = self.ssd_curve.misses_per_batch, np.add(pool_rows, cache_rows)
        spared = np.minimum(self.misses(pool_rows) - self._at(pool_rows, over), self.misses(held) - self._at(held, over))
        return np.asarray(self.misses(held) - spared)

    def write_backs(self, rows_held: Any) -> Floats:
        """Changed rows a step that leave those. Shapes: any → the same."""
        return self._at(rows_held, self.curve.write_backs_per_batch)

    def _at(self, rows_held: Any, values: Sequence[float]) -> Floats:
        held = np.minimum(np.asarray(rows_held, np.float64), self.rows) * (self.table_rows / self.rows)
        return np.asarray(np.interp(np.log1p(held), np.log1p(np.array(self.curve.pool_rows, np.float64)), values) * self.share)


@dataclass(frozen=True)
class StepPrediction:
    """``busy_ms``: of every resource by rank, a device's with all ranks of its host. Shape (ranks, resources)."""

    busy_ms: Floats
    prefetched: bool = True

    @property
    def rank_ms(self) -> Floats:
        """Each rank's step. Shape (ranks,)."""
        return np.asarray(self.busy_ms.max(axis=1) if self.prefetched else self.busy_ms.sum(axis=1))

    @property
    def step_ms(self) -> float:
        """The step of the slowest rank."""
        return float(self.rank_ms.max())

    @property
    def bottleneck(self) -> str:
        """The busiest resource of the slowest rank."""
        return RESOURCES[int(self.busy_ms[int(self.rank_ms.argmax())].argmax())]

    @property
    def busy_share(self) -> dict[str, float]:
        """Of the step, by resource, where it is busiest."""
        return {name: float(self.busy_ms[:, i].max() / self.step_ms) if self.step_ms else 0.0 for i, name in enumerate(RESOURCES)}


@dataclass(frozen=True)
class PerfModel:
    """A machine, and how ``ranks_per_host`` ranks train on it. ``dense_ms``: a step's compute outside the tables. ``lookahead_bytes``: the
    pipeline's."""

    hardware: HardwareProfile
    ranks_per_host: int = 1
    dense_ms: float = 0.0
    prefetched: bool = True
    checkpoints: CheckpointSchedule = field(default_factory=CheckpointSchedule)
    lookahead_bytes: int = LOOKAHEAD_BYTES

    def __deepcopy__(self, memo: Any) -> PerfModel:
        return self

    @cached_property
    def base_ms(self) -> Floats:
        """What a rank is busy with besides tables. Shape (resources,)."""
        base = np.zeros(len(RESOURCES))
        base[CPU] = self.dense_ms + 1e-3 * self.hardware.kernel.step_overhead_us_per_group
        return base

    def base_of(self, *, tiered: bool) -> Floats:
        """The same of a plan with, or without tables below memory. Shape (resources,)."""
        return self.base_ms

    @cached_property
    def _ssd_ms_of(self) -> dict[int, tuple[float, float]]:
        return {}  # by record bytes, as they are asked for

    @property
    def memory_bytes_per_s(self) -> float:
        """Of the memory that tables train in."""
        return self.hardware.ddr.read_bytes_per_s

    @property
    def stock_group_ms(self) -> float:
        """What the training thread does for tables in memory as a group of their own, beside tiered ones."""
        return 1e-3 * self.hardware.kernel.step_overhead_us_per_stock_group

    @cached_property
    def _threads(self) -> float:
        return min(self.hardware.kernel.tbe_threads, self.hardware.cores / self.ranks_per_host)

    @cached_property
    def core_to_spare(self) -> bool:
        """Whether prefetching has a core beside torch's threads."""
        return self.hardware.cores / self.ranks_per_host - self._threads >= 1

    def crowded(self, use: ShardUse, pool_rows: Any) -> NDArray[np.bool_]:
        """Whether a pool of that size has no room for a batch beside the one that trains, so that its reads are waited for. Shapes: any →
        the same."""
        return self.prefetched & (np.asarray(pool_rows) < use.rows_in_flight)

    def in_memory(self, use: ShardUse) -> Floats:
        """Busy times of a shard that is whole in memory. Shape (resources,)."""
        return self._stock(use)

    def tiered(self, use: ShardUse, pool_rows: Any, cache_rows: Any = 0) -> Floats:
        """Busy times of a shard above an SSD, by sizes of its pool and its PMem cache. Shapes: (n,), (n,) → (n, resources)."""
        pool, cache = np.broadcast_arrays(*np.atleast_1d(np.asarray(pool_rows, np.float64), np.asarray(cache_rows, np.float64)))
        missed = use.misses(pool)  # or brought by a neighbour: admitted all the same
        cold, written = np.minimum(missed, use.reads(pool, cache)), use.write_backs(pool + cache)  # a cache is exclusive
        hits = np.where(cache > 0, missed - cold, 0.0)
        kernel, busy = self.hardware.kernel, np.tile(self._stock(use), (len(pool), 1))
        busy[:, CPU] += kernel.step_overhead_us_per_table * 1e-3
        no_room = self.crowded(use, pool)
        ns = use.lookups * kernel.cpu_ns_per_lookup + missed * kernel.cpu_ns_per_miss
        ns = ns + cold * self._measured("cpu_ns_per_io", cold) + written * self._measured("cpu_ns_per_write_back", written)
        ns = ns + hits * self._measured("cpu_ns_per_cache_hit", hits)
        aside = ~no_room & self.core_to_spare
        busy[:, TIERS] += np.where(aside, ns * 1e-6, 0.0)
        busy[:, CPU] += np.where(aside, 0.0, ns * 1e-6)
        busy[:, DDR] += 1e3 * 2 * use.record_bytes * (missed + written) / self.hardware.ddr.read_bytes_per_s
        if cache.any():
            if self.hardware.pmem is None:
                raise ConfigurationError(
                    "the plan has PMem, and the hardware profile none; measure it with `mtrains calibrate --pmem-path`"
                )
            victims = np.where(cache > 0, missed, 0.0)
            moved = hits / self.hardware.pmem.read_bytes_per_s + victims / self.hardware.pmem.write_bytes_per_s
            busy[:, PMEM] += 1e3 * use.record_bytes * moved
        ssd_ms = self._ssd_ms(use.record_bytes, cold, written)
        busy[:, SSD] += ssd_ms
        if self.prefetched:
            busy[:, CPU] += ssd_ms * np.where(no_room, 1.0, 0.0 if self.core_to_spare else _NOT_OVERLAPPED)
        return busy

    def predict(self, busy_ms: Floats) -> StepPrediction:
        """The step of ranks that are so busy each, host after host, base included. Shape (ranks, resources)."""
        busy = busy_ms.copy()
        for first in range(0, len(busy), self.ranks_per_host):
            host = slice(first, first + self.ranks_per_host)
            busy[host, SHARED] = busy_ms[host][:, SHARED].sum(axis=0)
        return StepPrediction(busy, self.prefetched)

    def _stock(self, use: ShardUse) -> Floats:
        kernel, busy = self.hardware.kernel, np.zeros(len(RESOURCES))
        tbe_s = kernel.tbe_forward_s(use.lookups, use.weight_bytes) + kernel.tbe_backward_s(use.lookups, use.weight_bytes)
        busy[CPU] = 1e3 * tbe_s * kernel.tbe_threads / self._threads + use.comms_ms + use.compute_ms
        moved = use.lookups * use.weight_bytes + (_READ_AND_WRITTEN - 1) * use.unique_rows * use.record_bytes
        busy[DDR] = 1e3 * moved / self.hardware.ddr.read_bytes_per_s
        return busy

    def _measured(self, cost: str, count: Floats) -> float:
        value = getattr(self.hardware.kernel, cost)
        if value is None and count.any():
            raise ConfigurationError(
                f"the hardware profile has no {cost}: its calibration saw no such device; give `mtrains calibrate` its path"
            )
        return float(value or 0.0)

    def _ssd_ms(self, record_bytes: int, reads: Floats, written: Floats) -> Floats:
        ssd = self.hardware.ssd
        if ssd is None:
            if reads.any():
                raise ConfigurationError("the plan has an SSD, and the hardware profile none; measure it with `mtrains calibrate --path`")
            return np.zeros(len(reads))
        if record_bytes not in self._ssd_ms_of:
            self._ssd_ms_of[record_bytes] = self._ssd_ms_a_row(ssd, record_bytes)
        read_ms, written_ms = self._ssd_ms_of[record_bytes]
        return np.asarray(reads * read_ms + written * written_ms)

    def _ssd_ms_a_row(self, ssd: BlockDeviceProfile, record_bytes: int) -> tuple[float, float]:
        """What a row read, and one written, keeps the device busy."""
        block = charges.block_bytes(record_bytes)
        per_record = block / charges.records_per_block(record_bytes)  # bytes of the log, a row
        amplification = self.checkpoints.write_amplification
        appended = per_record * amplification / ssd.bytes_per_s(_WRITE_BYTES, QUEUE_DEPTH, 0.0)
        cleaned = per_record * (amplification - 1) / ssd.bytes_per_s(_WRITE_BYTES, QUEUE_DEPTH, 1.0)
        return 1e3 / ssd.operations_per_s(block, QUEUE_DEPTH * self.ranks_per_host, 1.0), 1e3 * (appended + cleaned)
