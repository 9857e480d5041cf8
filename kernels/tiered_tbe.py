"""``TieredTBE``: a stock FBGEMM TBE that trains on slot pools, under tables that live in storage tiers.

Life of a batch. ``prefetch`` turns its ids into slots and starts reading what is missing; ``forward`` finds that ticket
by the identity of the ids tensor (or does the same work inline), waits for the reads, and runs the stock TBE on the
slots. From then to the end of its backward the slots are pinned hard. The ticket is released by whichever comes first:
the hook that runs after the fused update, the death of the autograd node, or, without a graph, the end of forward.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn

from .. import errors
from ..lookahead import MOST_BATCHES, useful_batches
from ..tiers import DdrHome, TierChain
from . import _core
from .batch_ids import BatchIds, BatchSizes
from .caches import CachedVolume
from .deferred_init import Columns, UniformInit, column_ranges
from .group_stats import GroupStats
from .homes import open_home, open_table, volume_of
from .prepared_lookup import PreparedLookup
from .row_access import RowAccess
from .spans import span
from .tickets import WAITING_LIMIT, ByIds, Ids, Ticket, Token

BATCH_LIMIT = (1 << 31) - 2
"""Batch numbers in a slot's stamp have 31 bits; beyond, stamps are renumbered."""

MAX_ROWS = (1 << 31) - 2
"""Rows of one table shard: a directory entry is a signed 32-bit slot or miss number."""

_INT32 = torch.int32

# FBGEMM's names of the per-row states of each admitted optimizer, and whether they are one value a row.
STATES: dict[EmbOptimType, tuple[tuple[str, bool], ...]] = {
    EmbOptimType.EXACT_SGD: (),
    EmbOptimType.EXACT_ADAGRAD: (("momentum1", False),),
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: (("momentum1", True),),
}


@dataclass
class TieredTable:
    """Rows of one table: how many, which columns, its chain, where the rows start in the table, initial values (None: zeros).

    Each range of columns is a table of its own in the TBE: column-wise sharding gives a rank several. Their rows are one record
    and share a slot.
    """

    name: str
    rows: int
    columns: Columns
    chain: TierChain
    first_row: int = 0
    init: UniformInit | None = None

    @property
    def dims(self) -> list[int]:
        """The width of each range of columns."""
        return [len(r) for r in column_ranges(self.columns)]


class TieredTBE(RowAccess, GroupStats, nn.Module):
    """A group of tiered tables in one stock TBE.

    The TBE has one table, a *shard* here, for each range of columns of each table, in that order: ``feature_table_map[f]`` is the
    shard of feature ``f``. Remaining keyword arguments go to the stock TBE.

    Raises: UnsupportedError for an optimizer outside the allow-list; ConfigurationError for a shape that cannot work.
    """

    optimizers, announced_limit = STATES, MOST_BATCHES
    device = torch.device("cpu")

    def __init__(
        self,
        tables: Sequence[TieredTable],
        feature_table_map: Sequence[int],
        pooling_mode: PoolingMode,
        weights_precision: SparseType,
        optimizer: EmbOptimType,
        rank: int,
        bounds_check_mode: BoundsCheckMode = BoundsCheckMode.FATAL,
        batch_limit: int = BATCH_LIMIT,
        **tbe_kwargs: Any,
    ) -> None:
        super().__init__()
        if optimizer not in self.optimizers:
            raise errors.UnsupportedError(
                f"optimizer {optimizer.name} is not supported on tiered tables: its per-row state must be able to travel "
                f"with the row. Use one of {', '.join(o.name for o in self.optimizers)}"
            )
        if weights_precision not in (SparseType.FP32, SparseType.FP16):
            raise errors.UnsupportedError(f"weights_precision must be FP32 or FP16 on tiered tables, got {weights_precision}")
        self.tables = list(tables)
        self.state_names = [name for name, _ in self.optimizers[optimizer]]
        self._optimizer, self._batch_limit = optimizer, batch_limit
        self.table_of_shard = [i for i, t in enumerate(self.tables) for _ in t.dims]
        self._check_tables()
        self._options = {
            "feature_table_map": list(feature_table_map),
            "pooling_mode": pooling_mode,
            "weights_precision": weights_precision,
            "optimizer": optimizer,
            "stochastic_rounding": False,
            **tbe_kwargs,
        }
        self._tables_of_features = [self.table_of_shard[s] for s in feature_table_map]
        feature_rows = [self.tables[t].rows for t in self._tables_of_features]
        self._batch_ids = BatchIds(feature_rows, bounds_check_mode, optimizer, self.device)
        self._waiting: ByIds[Ticket] = ByIds()
        self._announced: ByIds[tuple[int, Ids]] = ByIds()  # with their numbers
        self.stall_seconds = 0.0
        """Time that forward passes have waited for their rows to be in slots."""
        self._make_tbe()
        self._evicting = self._tables_that_evict()
        self._open(rank)
        self._make_pool()

    def _make_tbe(self) -> None:
        """The stock TBE, whose tables are the pools."""
        # A pool never needs more slots than its table has rows. Row-wise sharding may leave a rank none: one slot that nothing uses.
        self.pool_rows = [max(1, min(t.chain.pool_rows, t.rows)) for t in self.tables]
        on_gpu = self.device.type == "cuda"
        place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if on_gpu else (EmbeddingLocation.HOST, ComputeDevice.CPU)
        self.tbe = SplitTableBatchedEmbeddingBagsCodegen(
            embedding_specs=[(pool, dim, *place) for pool, t in zip(self.pool_rows, self.tables, strict=True) for dim in t.dims],
            bounds_check_mode=BoundsCheckMode.NONE,  # ids were checked against the true row counts; slots are ours
            device=self.device,
            **self._options,
        )
        self._prepared_lookup = PreparedLookup(self.tbe)
        self._parts = self._pool_parts()
        if not on_gpu:  # nothing is in them yet: FBGEMM makes them as zeros, and a slot is filled before it is used
            areas = {part.untyped_storage().data_ptr(): part.untyped_storage() for of_shard in self._parts for part in of_shard}
            for address, storage in areas.items():
                _core.move_to_huge_pages(address, storage.nbytes())

    def _tables_that_evict(self) -> list[int]:
        return [i for i, t in enumerate(self.tables) if self.pool_rows[i] < t.rows]

    def _check_tables(self) -> None:
        for t in self.tables:
            if t.rows < 0 or t.rows > MAX_ROWS:
                raise errors.ConfigurationError(
                    f"table {t.name!r}: a shard has 0 to {MAX_ROWS} rows, got {t.rows}; shard it row-wise over more ranks"
                )
            for dim in t.dims:
                if dim <= 0 or dim % 4:
                    raise errors.ConfigurationError(
                        f"table {t.name!r}: embedding_dim, or its share in column-wise sharding, must be a multiple of 4, got {dim}"
                    )

    def _open(self, rank: int) -> None:
        """The homes, and the caches in front of them."""
        self._homes = [open_home(t.chain.home, rank) for t in self.tables]
        self._home_tables, self._cached = [], self._cached_volumes()
        self._below_pools = []  # what each pool evicts into: the home's table, or the same behind its caches
        for i, t in enumerate(self.tables):
            name = f"{t.name}@{t.first_row}," + "+".join(str(r.start) for r in column_ranges(t.columns))
            record_bytes = sum(self._part_bytes(i))
            home = open_table(self._homes[i], name, max(1, t.rows), record_bytes, t.init)
            self._home_tables.append(home)
            below = home
            if cached := self._cached.get(id(home.volume)):
                below = cached.cached_table(
                    home.name, row_count=home.row_count, record_bytes=record_bytes, init=t.init, caches=self._native_caches(t)
                )
            self._below_pools.append(below)

    def _make_pool(self) -> None:
        """What turns rows into slots of the TBE, and moves records between it and what is below."""
        self._native_tables = [
            _core.SlotPoolTable(t.name, below.volume._native, below._id, t.rows, pool_rows, self._pool_part_addresses(i))
            for i, (t, below, pool_rows) in enumerate(zip(self.tables, self._below_pools, self.pool_rows, strict=True))
        ]
        self._pool = _core.SlotPool(self._native_tables, self._tables_of_features, self._batch_limit)

    def _pool_part_addresses(self, table: int) -> list[Any]:
        places = [self._parts[s][p].data_ptr() for s, p in self._record(table)]
        return [_core.Part(place, b, b) for place, b in zip(places, self._part_bytes(table), strict=True)]

    def _cached_volumes(self) -> dict[int, CachedVolume]:
        """Caches by the identity of the volume below them: one object for all tables over it, so that their reads stay one batch."""
        cached = {id(volume_of(h)) for t, h in zip(self.tables, self._homes, strict=True) if self._native_caches(t)}
        return {key: CachedVolume(volume) for key, volume in {id(volume_of(h)): volume_of(h) for h in self._homes}.items() if key in cached}

    def _pool_parts(self) -> list[list[Tensor]]:
        """The pool's arrays per shard: weights (pool_rows, dim), then each state (pool_rows,) or (pool_rows, dim)."""
        weights = self.tbe.split_embedding_weights()
        states = self.tbe.split_optimizer_states() if self.state_names else [[] for _ in weights]
        parts = []
        for table, of_shard, weight in zip(self.table_of_shard, states, weights, strict=True):
            # ``data``: autograd does not count what is written through it between a forward and its backward, to other slots than theirs.
            mine = [part.data for part in (weight, *of_shard)]
            assert all(p.is_contiguous() and p.shape[0] == self.pool_rows[table] for p in mine)
            parts.append(mine)
        return parts

    # -- batches

    def _ids(self, indices: Tensor, offsets: Tensor, batch_sizes: BatchSizes | None) -> Ids:
        """Raises: ConfigurationError."""
        return self._as_pool_reads(indices, *self._batch_ids.read(indices, offsets, batch_sizes))

    def _as_pool_reads(self, indices: Tensor, read: Tensor, starts: Tensor, stride: int) -> Ids:
        batch = _core.Batch(read.data_ptr(), read.dtype is _INT32, read.numel(), starts.data_ptr(), starts.dtype is _INT32, stride)
        return Ids(batch, read, indices, starts)

    def _begin(self, indices: Tensor, offsets: Tensor, batch_sizes: BatchSizes | None, dirty: bool, lost: Ticket | None = None) -> Ticket:
        """``lost``: the ticket that the batch had, whose slots were taken back."""
        number, ids = self._announced.take(indices) or (0, self._ids(indices, offsets, batch_sizes))
        return self._with_room(lambda announced: self._begin_hard(ids, dirty, announced, lost.seq if lost else 0), number)

    def _begin_hard(self, ids: Ids, dirty: bool, announced: int, lost: int) -> Ticket:
        slots, address = self._slots_for(ids)
        return Ticket(self._pool.begin(ids.batch, address, dirty, announced, lost), slots, ids, dirty)

    def _begin_soft(self, ids: Ids, dirty: bool, announced: int, lost: int = 0) -> Ticket:
        """It may give way, now or later."""
        slots, address = self._slots_for(ids)
        return Ticket(self._pool.prefetch(ids.batch, address, dirty, announced, lost), slots, ids, dirty)

    def _begin_those_that_gave_way(self) -> None:
        """There may be room for them now, and their turn is before that of others."""
        for ticket in self._waiting:
            if self._gave_way(ticket):
                again = self._begin_soft(ticket.ids, ticket.dirty, 0, ticket.seq)
                ticket.seq, ticket.slots = again.seq, again.slots

    def _gave_way(self, ticket: Ticket) -> bool:
        return not self._pool.alive(ticket.seq)

    def _slots_for(self, ids: Ids) -> tuple[Tensor, int]:
        """Where the slots of ids will be, and its address for the pool; 0: ids are slots, since every pool has one for each of its rows."""
        if not self._evicting:
            return ids.read.long(), 0
        slots = torch.empty(ids.read.numel(), dtype=torch.int64)
        return slots, slots.data_ptr()

    def _with_room(self, begin: Callable[[int], Any], announced: int = 0) -> Any:
        """``begin(announced)``; where there is no room, once more when dead graphs have let their slots go. A batch is announced once."""
        try:
            return begin(announced)
        except errors.PoolTooSmallError:
            if not self._collect_dead_graphs():
                raise
            return begin(0)

    def _collect_dead_graphs(self) -> bool:
        """A graph whose backward never ran (activation recomputation makes them) may be garbage that Python has not collected yet:
        TorchRec's requests between ranks and their autograd nodes refer to each other. Whether there was anything to look for."""
        if outstanding := self._pool.outstanding > 0:
            gc.collect()
        return outstanding

    def announce(self, indices: Tensor, offsets: Tensor, batch_size_per_feature_per_rank: BatchSizes | None = None) -> bool:
        """Tells which rows a coming batch will use; its prefetch or forward must get the same ``indices`` tensor.

        Rows that announced batches use are evicted after all others, those used last first, and come along where that costs no I/O.
        Advice alone: it changes no result. Batches are expected to begin in the order in which they were announced. Shapes: as ``forward``.
        Returns False, and does nothing, when ``announced_limit`` batches are announced and not begun.
        Raises: IdOutOfRangeError.
        """
        if not self._evicting:
            return True
        ids = self._ids(indices, offsets, batch_size_per_feature_per_rank)
        number = self._pool.announce(ids.batch)
        if number:
            self._announced.put(indices, (number, ids))
        return bool(number)

    def withdraw(self, indices: Tensor) -> None:
        """The batch with these ids, announced or prefetched, will not come after all; nothing, if there is none."""
        if announced := self._announced.take(indices):
            self._pool.withdraw(announced[0])
        elif ticket := self._waiting.take(indices):
            self._pool.release(ticket.seq)

    @property
    def useful_lookahead(self) -> int:
        """How many batches to announce: what the largest pool can use; 0 where pools have a slot for every row, and evict nothing."""
        held = [self.pool_rows[i] / rows for i in self._evicting if (rows := self._rows_of_a_batch(i))]
        return min(self.announced_limit, useful_batches(max(held, default=0))) if self._evicting else 0

    def _rows_of_a_batch(self, table: int) -> float:
        """Distinct rows, on average; 0 before the first batch."""
        stats = self._pool.stats(table)
        return stats["unique_rows"] / max(1, stats["batches"])

    def prefetch(
        self,
        indices: Tensor,
        offsets: Tensor,
        forward_stream: Any = None,
        batch_size_per_feature_per_rank: BatchSizes | None = None,
    ) -> None:
        """Starts bringing a batch's rows into slots, while others train; its forward must get the same ``indices`` tensor, unchanged.

        Shapes: as ``forward``. When there is no room, or every row of the group is in a slot, nothing happens and forward does the work.
        Raises: IdOutOfRangeError; so may forward instead.
        """
        del forward_stream
        if self._all_there():
            return
        if len(self._waiting) >= WAITING_LIMIT:
            self._waiting.keep(lambda t: self._pool.alive(t.seq))
        self._begin_those_that_gave_way()
        number, ids = self._announced.take(indices) or (0, self._ids(indices, offsets, batch_size_per_feature_per_rank))
        self._keep(self._begin_soft(ids, torch.is_grad_enabled(), number), indices)

    def _all_there(self) -> bool:
        """Whether a forward finds all it needs whatever the batch, so that nothing is gained by looking it up before."""
        return bool(self._pool.full)

    def _keep(self, ticket: Ticket, indices: Tensor) -> None:
        """For the forward of these ids; whoever loses it releases it."""
        ticket.unclaimed_in = self._pool
        self._waiting.put(indices, ticket)

    def _claim(self, ticket: Ticket | None, dirty: bool) -> Ticket | None:
        """None, if its slots were taken back."""
        if ticket is None or not self._pool.acquire(ticket.seq, dirty and not ticket.dirty):
            return None
        ticket.unclaimed_in = None
        return ticket

    def _forget_coming(self) -> None:
        """Lets go of what was prefetched and announced."""
        self._waiting.clear()
        for number, _ in self._announced:
            self._pool.withdraw(number)
        self._announced.clear()

    def forward(
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        feature_requires_grad: Tensor | None = None,
        batch_size_per_feature_per_rank: BatchSizes | None = None,
    ) -> Tensor:
        """The stock TBE's lookup, on rows.

        Shapes: ``indices`` (n,) int32 or int64; ``offsets`` (features × batch + 1,), or one element for every bag and one more when
        ``batch_size_per_feature_per_rank`` says how many each feature has.
        Raises: IdOutOfRangeError, PoolTooSmallError (nothing was changed), DamagedRecordError, VolumeFullError.
        """
        batch_sizes = batch_size_per_feature_per_rank
        dirty = torch.is_grad_enabled()
        started = time.perf_counter()
        with span("wait for rows"):
            waiting = self._waiting.take(indices)
            ticket = self._claim(waiting, dirty) or self._begin(indices, offsets, batch_sizes, dirty, waiting)
            try:
                self._pool.wait(ticket.seq)
            except BaseException:
                self._pool.release(ticket.seq)
                raise
        self.__dict__["stall_seconds"] += time.perf_counter() - started  # past ``Module.__setattr__``, which takes microseconds
        try:
            output = self._look_up(ticket.slots.long(), offsets.long(), per_sample_weights, feature_requires_grad, batch_sizes)
        except BaseException:
            self._pool.release(ticket.seq)
            raise
        if output.grad_fn is None:
            self._pool.release(ticket.seq)
        else:
            self._release_after_backward(output.grad_fn, ticket)
        return output

    def _look_up(self, slots: Tensor, offsets: Tensor, weights: Any, features: Any, batch_sizes: Any) -> Tensor:
        """The stock forward, on slots."""
        if weights is None and features is None and batch_sizes is None:
            return self._prepared_lookup(slots, offsets)
        return self.tbe(slots, offsets, weights, features, batch_sizes)

    def _release_after_backward(self, node: Any, ticket: Ticket) -> None:
        pool, seq = self._pool, ticket.seq

        def still_ours(_grads: Any) -> None:
            if not pool.alive(seq):
                raise errors.TicketError(
                    "backward ran a second time through a tiered table (retain_graph=True?): the first one has updated its "
                    "rows and given its slots away. Run forward again"
                )

        def done(_grad_inputs: Any, _grad_outputs: Any) -> None:
            with span("release rows"):
                pool.release(seq)

        node.register_prehook(still_ours)
        node.register_hook(done)
        node.metadata["mtrains"] = Token(pool, ticket)

    # -- what is in the tables, as a whole

    def flush(self) -> None:
        """Hands every changed row to its home."""
        self._pool.flush()
        for volume in {id(t.volume): t.volume for t in self._below_pools}.values():
            volume.flush()

    def durable(self, table: int) -> bool:
        """Whether the table's home outlives the process, so that its checkpoints are committed in place (``durability``)."""
        return not isinstance(self.tables[table].chain.home, DdrHome)

    def durable_volumes(self) -> list[Any]:
        """The volumes that outlive the process, each once."""
        return list({id(h.volume): h.volume for t, h in enumerate(self._home_tables) if self.durable(t)}.values())

    def forget(self) -> None:
        """Empties the pools and caches, unwritten. Raises: TicketError while forward passes await their backward."""
        self._forget_coming()
        self._collect_dead_graphs()
        self._pool.forget()
        for cached in self._cached.values():
            cached.forget()

    def trickle(self, min_age: int, share: float) -> int:
        """Looks at a share of each pool, round after round, and hands rows unused for ``min_age`` batches to their durable homes.

        Returns the rows handed down.
        """
        return sum(self._pool.trickle(i, min_age, math.ceil(share * self.pool_rows[i])) for i in range(len(self.tables)) if self.durable(i))

    def resident_rows(self) -> list[Any]:
        """By table: the rows in its pool in the order of eviction. Shapes: (n,) int64, numpy."""
        return [self._pool.resident_rows(i) for i in range(len(self.tables))]

    def warm(self, table: int, rows: Any) -> int:
        """Reads rows, in the order of eviction, into free slots; of too many the last ones. Returns the rows read.

        Shapes: rows (n,) int64.
        """
        return self._pool.warm(table, rows)

    def resize(self, table: int, pool_rows: int) -> None:
        """Gives a table's pool another size; what fits of the rows in the group's pools stays in them. Their counters begin anew.

        Raises: TicketError while forward passes await their backward.
        """
        resident, learning_rate = self.resident_rows(), self.tbe.get_learning_rate()
        self._forget_coming()
        self.flush()
        self._collect_dead_graphs()
        self._pool.forget()  # unwritten: the homes have every change
        chain = dataclasses.replace(self.tables[table].chain, pool_rows=pool_rows)
        self.tables[table] = dataclasses.replace(self.tables[table], chain=chain)
        steps = self.optimizer_steps
        self._make_tbe()
        self._evicting = self._tables_that_evict()
        self._make_pool()
        self.set_learning_rate(learning_rate)
        self.set_optimizer_steps(steps)
        for i, rows in enumerate(resident):
            self.warm(i, rows)

    def set_learning_rate(self, learning_rate: float) -> None:
        """For the next backward, as the stock TBE's."""
        self.tbe.set_learning_rate(learning_rate)

    @property
    def counts_steps(self) -> bool:
        """Whether an update depends on how many came before: Adam and LAMB correct their moments by it, for all rows alike."""
        return self._optimizer not in STATES

    @property
    def optimizer_steps(self) -> int:
        """The forward passes that the stock TBE has counted."""
        return int(self.tbe.iter_cpu)

    def set_optimizer_steps(self, steps: int) -> None:
        """As a checkpoint had it."""
        self.tbe.iter_cpu.fill_(steps)
        self.tbe.iter.fill_(steps)

    def close(self) -> None:
        """Flushes, closes the caches, and lets go of the homes (a home closes with the last table in it)."""
        self._forget_coming()
        self.flush()
        self.close_caches()

    def close_caches(self) -> None:
        """Gives back the memory of the caches. The tables above them can do nothing any more."""
        for cached in self._cached.values():
            cached.close()
