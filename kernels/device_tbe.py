"""``DeviceTBE``: a ``TieredTBE`` whose pools are on a GPU, or, for tests, the same tensor code on a CPU.

The stock TBE has its tables, the pools, in HBM. Below them a table's ``DdrCache`` is memory of the host that the device has
mapped (``DevicePool``); the rest of the chain is native, as on a CPU. A chain always has that tier here, since every record comes and
goes through it: where a chain names no ``DdrCache`` first, it has as many rows as the pool, and under a ``DdrHome`` as many as the table,
whose volume then only knows initial values and what was flushed. A group whose pools have a slot for every row needs none of that
(``ResidentPool``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor

from .. import errors
from ..tiers import Cache, DdrCache, DdrHome
from .device_below import DeviceTable
from .device_directory import WINDOW
from .device_ids import Batch
from .device_planes import Planes
from .device_pool import DevicePool
from .device_resident import ResidentPool, ResidentTable
from .tickets import Ids, Ticket
from .tiered_tbe import STATES, TieredTable, TieredTBE

DEVICE_STATES: dict[EmbOptimType, tuple[tuple[str, bool], ...]] = {
    **STATES,
    EmbOptimType.ADAM: (("momentum1", False), ("exp_avg_sq", False)),
    EmbOptimType.PARTIAL_ROWWISE_ADAM: (("momentum1", False), ("exp_avg_sq", True)),
    EmbOptimType.LAMB: (("momentum1", False), ("exp_avg_sq", False)),
}
"""As ``STATES``, of what the stock TBE has on a GPU besides; named as in TorchRec's state dicts. Each trains bit for bit like
stock (benchmarks/gpu.py)."""


class DeviceTBE(TieredTBE):
    """A group of tiered tables on ``device``. Everything else, and the errors, as ``TieredTBE``; what a prefetched batch's ids or offsets
    are refused for, its forward may raise. Of announced rows that are in no place nothing is remembered; bad ids are passed over there.

    Raises: ConfigurationError for a first ``DdrCache`` with fewer rows than the pool, or too little memory.
    """

    announced_limit = WINDOW

    def __init__(self, tables: Sequence[TieredTable], *args: Any, device: torch.device, **kwargs: Any) -> None:
        # A device of no number is the current one, which may be another later.
        self.device = torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
        self.optimizers = DEVICE_STATES if device.type == "cuda" else STATES
        super().__init__(tables, *args, **kwargs)

    def _make_tbe(self) -> None:
        super()._make_tbe()
        self._host_places = [self._host_places_of(t, pool) for t, pool in zip(self.tables, self.pool_rows, strict=True)]

    def _host_places_of(self, table: TieredTable, pool_rows: int) -> int:
        cache = table.chain.caches[0] if table.chain.caches else None
        if isinstance(cache, DdrCache):
            rows = min(cache.rows, max(1, table.rows))
            if rows < pool_rows:
                raise errors.ConfigurationError(
                    f"table {table.name!r}: on a GPU every record comes and goes through the DdrCache, so it has at least as many rows as "
                    f"the pool; got rows={cache.rows} below pool_rows={pool_rows}. Raise rows, or leave the DdrCache out"
                )
            return rows
        return max(1, table.rows) if isinstance(table.chain.home, DdrHome) and cache is None else pool_rows

    def _native_caches(self, table: TieredTable) -> tuple[Cache, ...]:
        caches = table.chain.caches
        return caches[1:] if caches and isinstance(caches[0], DdrCache) else caches

    def _make_pool(self) -> None:
        if self._evicting:
            self._pool: DevicePool | ResidentPool = self._pool_above_host_places()
            return
        tables = [
            ResidentTable(t.name, below.volume._native, below._id, t.rows, self._record_parts(i, self._parts), below is not home)
            for i, (t, below, home) in enumerate(zip(self.tables, self._below_pools, self._home_tables, strict=True))
        ]
        self._pool = ResidentPool(tables, self._tables_of_features, self._batch_ids.rewrites_bad, self.device)

    def _pool_above_host_places(self) -> DevicePool:
        planes = Planes(self._parts, self.table_of_shard, self._host_places)
        tables = [
            DeviceTable(
                t.name,
                below.volume._native,
                below._id,
                t.rows,
                self.pool_rows[i],
                self._host_places[i],
                self._record_parts(i, self._parts),
                self._record_parts(i, planes.lower_parts),
                has_all=t.rows > 0 and isinstance(t.chain.home, DdrHome) and not t.chain.caches,
            )
            for i, (t, below) in enumerate(zip(self.tables, self._below_pools, strict=True))
        ]
        return DevicePool(tables, self._tables_of_features, planes, self.device)

    def _record_parts(self, table: int, parts: list[list[Tensor]]) -> list[Tensor]:
        return [parts[s][p] for s, p in self._record(table)]

    # -- batches

    def _as_pool_reads(self, indices: Tensor, read: Tensor, starts: Tensor, stride: int) -> Ids:
        return Ids(Batch(read, starts, stride), read, indices)

    def _begin_hard(self, ids: Ids, dirty: bool, announced: int, lost: int) -> Ticket:
        return Ticket(*self._pool.begin(ids.batch, True, dirty, announced, lost), ids, dirty)

    def _begin_soft(self, ids: Ids, dirty: bool, announced: int, lost: int = 0) -> Ticket:
        return Ticket(*self._pool.begin(ids.batch, False, dirty, announced, lost), ids, dirty)

    def _gave_way(self, ticket: Ticket) -> bool:
        return self._pool.gave_way(ticket.seq)

    def _rows_of_a_batch(self, table: int) -> float:
        return self._pool.rows_of_a_batch(table)  # which does not wait for the device

    def _all_there(self) -> bool:
        return False  # the device uses a batch while others train

    # -- rows, as users see them

    def read_rows(self, shard: int, first_row: int, row_count: int) -> list[Tensor]:
        table = self.table_of_shard[shard]
        values = self._pool.read(table, first_row, row_count)
        return [value for value, (s, _) in zip(values, self._record(table), strict=True) if s == shard]

    def _write_record(self, table: int, first_row: int, count: int, record: list[Tensor | None]) -> None:
        self._pool.write(table, first_row, count, record)

    # -- looking in

    def _cache_tiers_of(self, table: int) -> list[dict[str, Any]]:
        stats, record_bytes = self._pool.host_stats(table), self._home_tables[table].record_bytes
        moved = {"read_bytes": stats["hits"] * record_bytes, "written_bytes": stats["inserted_rows"] * record_bytes}
        return [{"tier": "DdrCache", **stats, **moved}, *super()._cache_tiers_of(table)]
