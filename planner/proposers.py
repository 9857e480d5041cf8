"""What to propose: TorchRec's plans as long as everything fits, then the one that ``search`` finds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.types import Enumerator, Proposer, ShardingOption, Storage, StorageReservation, Topology

from ..errors import ConfigurationError
from .candidates import placeable
from .enumerators import FUSED, ROW_WISE, TABLE_WISE
from .estimators import charged
from .footprint import Footprint, Table
from .partitioners import NoRoomError, place_by_room
from .perf_model import PerfModel
from .search import Capacity, SearchResult, search
from .sharding_options import TieredShardingOption
from .storage import bytes_in


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
        storage = [device.storage for device in reserved.devices]
        self.capacity = Capacity(storage, min(bytes_in(s, "pmem") for s in storage))
        options: dict[str, list[ShardingOption]] = defaultdict(list)
        for option in search_space:
            options[option.fqn].append(option)
        self.first_options = [of_table[0] for of_table in options.values()]
        self.stock = [_in_memory(of_table) for of_table in options.values()]
        ways = [
            [o if isinstance(o, TieredShardingOption) else charged(o) for o in of_table if placeable(o)] for of_table in options.values()
        ]
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

    def _in_turn(self) -> Iterator[list[ShardingOption]]:
        everything = sum(self.capacity.storage, Storage(0, 0, 0))
        if all(self.stock) and sum(min(o.total_storage.ddr for o in of_table) for of_table in self.stock) <= everything.ddr:
            yield from self._without_tiers()
        if self._fits or not all(self._tables):
            return
        if len(self.capacity.storage) == 1 and self._by_room() is None:
            return
        seconds = 0.5 + 0.02 * len(self._tables) if self._search_seconds is None else self._search_seconds
        self.result = search(self._tables, self.capacity, self._model, seconds, self._by_room)
        if self.result is not None:
            yield self.result.options

    def _without_tiers(self) -> Iterator[list[ShardingOption]]:
        for proposer in self._in_memory:
            proposer.load([o for of_table in self.stock for o in of_table], self._enumerator)
            while proposal := proposer.propose():
                yield proposal
                proposer.feedback(*self._answer)

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


def _in_memory(options: Sequence[ShardingOption]) -> list[ShardingOption]:
    return [o for o in options if not isinstance(o, TieredShardingOption)]
