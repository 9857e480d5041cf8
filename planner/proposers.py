"""What to propose: TorchRec's plans as long as everything fits, then the one that ``search`` finds."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache

from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.types import Enumerator, Proposer, ShardingOption, Storage, StorageReservation, Topology

from ..errors import ConfigurationError
from . import charges
from .candidates import placeable
from .enumerators import FUSED, ROW_WISE, TABLE_WISE
from .estimators import beside_tiers, charged
from .footprint import Footprint, Table
from .partitioners import NoRoomError, place_by_room
from .perf_model import PerfModel
from .search import Capacity, SearchResult, search
from .sharding_options import TieredShardingOption
from .storage import bytes_in
from .waiting_ids import WaitingIds


class TieredProposer(Proposer):
    """Proposes what TorchRec's ``in_memory`` proposers would, without any tier; when none of that fits, the plan with the fastest step that
    ``search`` finds, its shards already placed (``TieredPartitioner`` leaves them where they are).

    ``storage_reservation`` is the planner's: it knows what of each rank's memory is left for tables. ``search_seconds`` None: half a
    second, and a fiftieth more a table.
    """

    def __init__(
        self,
        storage_reservation: StorageReservation,
        model: PerfModel,
        in_memory: Sequence[Proposer] | None = None,
        search_seconds: float | None = None,
    ) -> None:
        self._storage_reservation, self._model = storage_reservation, model
        self._search_seconds = search_seconds
        # TorchRec's own defaults
        self._in_memory = in_memory or (GridSearchProposer(), GreedyProposer(), GreedyProposer(use_depth=False), UniformProposer())
        self._proposals: Iterator[list[ShardingOption]] = iter(())
        self.result: SearchResult | None = None
        self.footprint = Footprint([])
        self.first_options: list[ShardingOption] = []

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Takes the options of all tables."""
        reserved = self._storage_reservation.last_reserved_topology
        if reserved is None:
            raise ConfigurationError(
                "TieredProposer: its storage_reservation has reserved nothing yet; give the planner the same one as the proposer, so that "
                "both know what is left for tables"
            )
        self._ssd, self._blocks = getattr(reserved, "ssd", None), _block_sizes(search_space)
        storage = [copy.copy(device.storage) for device in reserved.devices]
        self._whole = [copy.copy(s) for s in storage]
        self._in_memory_bytes = sum(s.hbm if s.hbm else s.ddr for s in storage)
        waiting = getattr(enumerator, "waiting_ids", WaitingIds())
        for of_rank in storage:
            of_rank.ssd = max(0, of_rank.ssd - self._kept_by_volume)
            of_rank.ddr -= waiting.of_rank  # below 0 where not even ids fit: what is short includes theirs
        self.capacity = Capacity(storage, min(bytes_in(s, "pmem") for s in storage))
        options: dict[str, list[ShardingOption]] = defaultdict(list)
        for option in search_space:
            options[option.fqn].append(option)
        self.first_options = [of_table[0] for of_table in options.values()]
        self.stock = [_in_memory(of_table) for of_table in options.values()]
        ways = [[_beside_tiers(o) for o in of_table if placeable(o)] for of_table in options.values()]
        self._ways, self._names = ways, [of_table[0].name for of_table in options.values()]
        self._tables = [[o for o in of_table if self._fits_a_rank(o)] for of_table in ways]
        self.footprint = Footprint([self._table(of_table[0].name, mine) for of_table, mine in zip(options.values(), ways, strict=True)])
        self._enumerator, self._fits, self.result = enumerator, False, None
        self._proposals = self._in_turn()

    def propose(self) -> list[ShardingOption] | None:
        """The next proposal, or None when there is no other."""
        return next(self._proposals, None)

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        """What became of the last proposal."""
        self._answer = (partitionable, plan, perf_rating, storage_constraint)
        self._fits |= partitionable

    @property
    def _seconds(self) -> float:
        """Of work that the search may be."""
        return 0.5 + 0.02 * len(self._tables) if self._search_seconds is None else self._search_seconds

    @property
    def in_memory_short(self) -> float:
        """DDR that is short for a plan without tiers, in which nothing waits: at least so much of all ranks together."""
        if not all(self._placeable_stock):
            return math.inf
        least = sum(min(charged(o).total_storage.ddr for o in of_table) for of_table in self._placeable_stock)
        return least - sum(storage.ddr for storage in self._whole)

    @property
    def _placeable_stock(self) -> list[list[ShardingOption]]:
        return [[o for o in of_table if placeable(o)] for of_table in self.stock]

    def capacity_short(self, short_bytes: int) -> int:
        """By how much ``capacity_bytes`` of the SSD is short where its tables are by so much."""
        if self._ssd is None or not self._blocks:
            return short_bytes
        capacity, keep = self._ssd.capacity_bytes, self._model.checkpoints.keep
        have = charges.bytes_for_tables(capacity, self._blocks, keep)
        return charges.capacity_for(have + short_bytes, self._blocks, keep) - capacity

    @property
    def _kept_by_volume(self) -> int:
        """What a volume with blocks of all these sizes and checkpoints keeps to itself beyond one that the topology knows of."""
        if self._ssd is None or not self._blocks:
            return 0
        known = charges.bytes_for_tables(self._ssd.capacity_bytes, {charges.PAGE_BYTES}, keep=0)
        return known - charges.bytes_for_tables(self._ssd.capacity_bytes, self._blocks, self._model.checkpoints.keep)

    def _in_turn(self) -> Iterator[list[ShardingOption]]:
        if all(self.stock) and sum(min(o.total_storage.ddr for o in of_table) for of_table in self.stock) <= self._in_memory_bytes:
            yield from self._without_tiers()
        if self._fits:
            return
        by_room = cache(self._by_room)
        if all(self._tables) and (len(self.capacity.storage) > 1 or by_room() is not None):
            self.result = search(self._tables, self.capacity, self._model, self._seconds, by_room)
        if self.result is not None:
            yield self.result.options
        elif (least := self._least_in_memory()) is not None:
            yield least

    def _without_tiers(self) -> Iterator[list[ShardingOption]]:
        for proposer in self._in_memory:
            proposer.load([o for of_table in self.stock for o in of_table], self._enumerator)
            while proposal := proposer.propose():
                yield proposal
                proposer.feedback(*self._answer)

    def _least_in_memory(self) -> list[ShardingOption] | None:
        """Every table in memory as it takes least: TorchRec's proposers, which look for speed, may pass over it; beside tiers ids wait."""
        if self.in_memory_short > 0:
            return None
        least = [min(map(charged, of_table), key=lambda o: o.total_storage.ddr) for of_table in self._placeable_stock]
        try:
            place_by_room(least, self._whole)
        except NoRoomError:
            return None
        return least

    def _by_room(self) -> list[ShardingOption] | None:
        """The member of the footprint with most in memory that can be placed."""
        everything = sum(self.capacity.storage, Storage(0, 0, 0))
        totals = self.footprint.totals()
        for staying, total in zip(reversed(range(len(totals))), totals, strict=True):
            if total.fits_in(everything):
                try:
                    member = self.footprint.member(staying)
                    place_by_room(member, self.capacity.storage)
                    return member
                except NoRoomError:
                    pass
        return None

    def _fits_a_rank(self, option: ShardingOption) -> bool:
        rank = Storage(*(max(getattr(s, tier) for s in self.capacity.storage) for tier in ("hbm", "ddr", "ssd")))
        return all(shard.storage.fits_in(rank) for shard in option.shards)

    def _table(self, name: str, ways: Sequence[ShardingOption]) -> Table:
        """In memory: the fused option of least DDR whose shards each fit a rank, table-wise first. Above the SSD: table-wise where that
        fits a rank, else row-wise."""
        stock = [o for o in _in_memory(ways) if self._fits_a_rank(o)]
        fused = [o for o in stock if o.compute_kernel == FUSED] or stock
        tiered = [o for o in ways if isinstance(o, TieredShardingOption)]

        def worse(o: TieredShardingOption) -> tuple[bool, bool, int]:
            fits = self._fits_a_rank(o)
            return not fits, (o.sharding_type == ROW_WISE) == fits, o.pool_rows

        return Table(
            name,
            min(fused, key=lambda o: (o.total_storage.ddr, o.sharding_type != TABLE_WISE, o.total_perf), default=None),
            min(tiered, key=worse, default=None),
        )


def _block_sizes(options: Sequence[ShardingOption]) -> set[int]:
    """Of the logs of all tables that may be above an SSD."""
    return {charges.block_bytes(o.record_bytes) for o in options if isinstance(o, TieredShardingOption) and o.total_storage.ssd}


def _beside_tiers(option: ShardingOption) -> ShardingOption:
    return option if isinstance(option, TieredShardingOption) else beside_tiers(option)


def _in_memory(options: Sequence[ShardingOption]) -> list[ShardingOption]:
    return [o for o in options if not isinstance(o, TieredShardingOption)]
