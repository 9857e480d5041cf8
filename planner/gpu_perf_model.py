"""What a step costs where the pools are in HBM. As ``perf_model.py``, with two more resources::

    gpu     the stream that trains: dense compute, the stock TBE over HBM, communication, the directory of ours, and a part of the time for
            which kernels move rows over the bus, since they hold up what runs beside them
    pcie    rows over the bus, in both directions, of each rank's own

    a row missed in ours     its record comes, and a victim's goes: two records
    a row missed in UVM      two rows of weights, and what its cache takes to find it a place; element-wise optimizer state is not
                             cached: that of every row of a batch comes and goes

The SSD is busy as on a CPU, and so is the host's thread that reads and writes it (``tiers``). Predicted is the largest of them.

The constants were fitted to a run of benchmarks/gpu.py on an H200 and one on an H100 (docs/gpu.md, both of 2026-11-26), whose steps they
give back within 6%: 10 tables of 1M × 128 in FP32, 1.06M lookups of 320 thousand rows, pools of all rows and of 80% and 10% of what is
used, SGD and Adam (tests/test_gpu_planner.py). Steps of stock tables in HBM are those of the device, with launches hidden: a host may take
longer for them, and is not in the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import ConfigurationError
from .hardware_profile import LinkProfile, MemoryProfile
from .perf_model import DDR, GPU, PCIE, RESOURCES, SSD, TIERS, Floats, PerfModel, ShardUse

_TBE_BYTES_PER_S, _TBE_SHARE_OF_HBM = 1.84e12, 0.7  # of rows, at most: what multiprocessors do (H200), what memory gives (H100)
_READ_AND_WRITTEN = 2  # of a batch's rows, by the optimizer
_STEP_MS = 0.035  # of launches, events and hooks of a group of tiered tables
_NS_PER_LOOKUP = 0.146  # of the directory, beside what trains
_ROWS_SHARE_OF_BUS = 0.74  # of the rate of copies in both directions, that kernels have over rows
_HELD_UP = 0.41  # of the time for which rows of ours move, that training takes longer
_UVM_NS_PER_LOOKUP = 3.6
_UVM_NS_PER_MISS = 30.0
_UVM_MISSES = 1.5  # of an LRU cache, ÷ those of our policy with its lookahead


@dataclass(frozen=True)
class GpuPerfModel(PerfModel):
    """``PerfModel`` of hosts with a GPU for each rank.

    Raises: ConfigurationError for a profile without HBM or its link.
    """

    def __post_init__(self) -> None:
        if self.hardware.hbm is None or self.hardware.pcie is None:
            raise ConfigurationError(
                f"the hardware profile of {self.hardware.machine!r} has no {'hbm' if self.hardware.hbm is None else 'pcie'}: planning for "
                "CUDA goes by a GPU's; run `mtrains calibrate` on a machine with one and give its profile"
            )

    @property
    def _hbm(self) -> MemoryProfile:
        assert self.hardware.hbm is not None
        return self.hardware.hbm

    @property
    def _pcie(self) -> LinkProfile:
        assert self.hardware.pcie is not None
        return self.hardware.pcie

    @property
    def memory_bytes_per_s(self) -> float:
        return self._hbm.read_bytes_per_s

    @property
    def stock_group_ms(self) -> float:
        """Nobody has measured one on a GPU."""
        return 0.0

    @cached_property
    def base_ms(self) -> Floats:
        return self.base_of(tiered=True)

    def base_of(self, *, tiered: bool) -> Floats:
        base = np.zeros(len(RESOURCES))
        base[GPU] = self.dense_ms + (_STEP_MS if tiered else 0.0)
        return base

    def over_ddr(self, use: ShardUse, pool_rows: Any) -> Floats:
        """Busy times of a shard with a pool above host memory, by its size. Shapes: (n,) → (n, resources)."""
        pool = np.atleast_1d(np.asarray(pool_rows, np.float64))
        return self._pooled(use, pool, use.misses(pool))

    def tiered(self, use: ShardUse, pool_rows: Any, cache_rows: Any = 0) -> Floats:
        """Busy times of a shard with a pool above a DDR cache above an SSD. Shapes: (n,), (n,) → (n, resources)."""
        pool, cache = np.broadcast_arrays(*np.atleast_1d(np.asarray(pool_rows, np.float64), np.asarray(cache_rows, np.float64)))
        behind = np.minimum(pool + cache, use.rows)
        missed = use.misses(pool)
        cold, written = np.minimum(missed, use.misses(behind)), use.write_backs(behind)
        busy = self._pooled(use, pool, missed)
        busy[:, SSD] += self._ssd_ms(use.record_bytes, cold, written)
        kernel_ns = cold * self._measured("cpu_ns_per_io", cold) + written * self._measured("cpu_ns_per_write_back", written)
        busy[:, TIERS] += (kernel_ns + cold * self.hardware.kernel.cpu_ns_per_miss) * 1e-6
        return busy

    def uvm_cached(self, use: ShardUse, cached_rows: Any, state_bytes: int) -> Floats:
        """Busy times of a shard in UVM caching, with ``state_bytes`` of element-wise state a row. Shapes: (n,) → (n, resources)."""
        cached = np.atleast_1d(np.asarray(cached_rows, np.float64))
        missed = np.minimum(use.unique_rows, _UVM_MISSES * use.misses(cached))
        busy = np.tile(self._stock(use), (len(cached), 1))
        busy[:, GPU] += (use.lookups * _UVM_NS_PER_LOOKUP + missed * _UVM_NS_PER_MISS) * 1e-6
        return self._over_the_bus(busy, 2 * (missed * use.weight_bytes + use.unique_rows * state_bytes), 1.0)

    def _pooled(self, use: ShardUse, pool: Floats, missed: Floats) -> Floats:
        """Where all rows have slots, ids are slots, and nothing is looked up."""
        busy = np.tile(self._stock(use), (len(missed), 1))
        busy[:, GPU] += np.where(pool < use.rows, use.lookups * _NS_PER_LOOKUP * 1e-6, 0.0)
        return self._over_the_bus(busy, 2 * missed * use.record_bytes, _HELD_UP)

    def _over_the_bus(self, busy: Floats, moved_bytes: Floats, held_up: float) -> Floats:
        moving_ms = 1e3 * moved_bytes / (_ROWS_SHARE_OF_BUS * self._pcie.both_bytes_per_s)
        busy[:, GPU] += held_up * moving_ms
        busy[:, PCIE] += moving_ms
        busy[:, DDR] += 1e3 * moved_bytes / self.hardware.ddr.read_bytes_per_s
        return busy

    def _stock(self, use: ShardUse) -> Floats:
        busy = np.zeros(len(RESOURCES))
        moved = use.lookups * use.weight_bytes + _READ_AND_WRITTEN * use.unique_rows * use.record_bytes
        bytes_per_s = min(_TBE_BYTES_PER_S, _TBE_SHARE_OF_HBM * self._hbm.read_bytes_per_s)
        busy[GPU] = 1e3 * moved / bytes_per_s + use.comms_ms + use.compute_ms
        return busy
