"""Which tables stay in memory: TorchRec's proposals as long as everything fits, then the levels of ``levels.py``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.types import Enumerator, Proposer, ShardingOption, Storage, StorageReservation, Topology

from .enumerators import FUSED, ROW_WISE, TABLE_WISE
from .estimators import charged
from .levels import Table, breakpoints
from .sharding_options import TieredShardingOption


class TieredProposer(Proposer):
    """Proposes what TorchRec's ``in_memory`` proposers would, without any tier; when none of that fits, one proposal a level.

    The levels go down from "every table in memory" to "every table at its smallest pool", and the first that fits ends the search.
    ``storage_reservation`` is the planner's: it knows what of each rank's memory is left for tables.
    """

    def __init__(self, storage_reservation: StorageReservation, in_memory: Sequence[Proposer] | None = None) -> None:
        self._storage_reservation = storage_reservation
        # TorchRec's own defaults
        self._in_memory = in_memory or (GridSearchProposer(), GreedyProposer(), GreedyProposer(use_depth=False), UniformProposer())
        self._search: Iterator[list[ShardingOption]] = iter(())

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Takes the options of all tables."""
        reserved = self._storage_reservation.last_reserved_topology
        assert reserved is not None, "the planner reserves storage before it proposes"
        self.capacity: list[Storage] = [device.storage for device in reserved.devices]
        options: dict[str, list[ShardingOption]] = defaultdict(list)
        for option in search_space:
            options[option.fqn].append(option)
        self.tables = [self._table(of_table) for of_table in options.values()]
        self.stock = [_in_memory(of_table) for of_table in options.values()]
        self._enumerator, self._fits = enumerator, False
        self._search = self._proposals()

    def propose(self) -> list[ShardingOption] | None:
        """The next proposal, or None when the search is over."""
        return next(self._search, None)

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

    def _proposals(self) -> Iterator[list[ShardingOption]]:
        everything = sum(self.capacity, Storage(0, 0, 0))
        if all(self.stock) and sum(min(o.total_storage.ddr for o in of_table) for of_table in self.stock) <= everything.ddr:
            yield from self._without_tiers()
        if self._fits or any(table.in_memory is None and table.tiered is None for table in self.tables):
            return
        for level in breakpoints(table.full_level for table in self.tables):
            if total_at(self.tables, level).fits_in(everything):
                yield [table.at(level) for table in self.tables]
                if self._fits:
                    return

    def _without_tiers(self) -> Iterator[list[ShardingOption]]:
        for proposer in self._in_memory:
            proposer.load([o for of_table in self.stock for o in of_table], self._enumerator)
            while proposal := proposer.propose():
                yield proposal
                proposer.feedback(*self._answer)

    def _table(self, options: list[ShardingOption]) -> Table:
        """In memory: the fused option of least DDR whose shards each fit a rank, table-wise first. Above the SSD: table-wise where
        that fits a rank, else row-wise."""
        rank = Storage(*(max(getattr(s, tier) for s in self.capacity) for tier in ("hbm", "ddr", "ssd")))

        def fits_a_rank(option: ShardingOption) -> bool:
            return all(shard.storage.fits_in(rank) for shard in option.shards)

        stock = [o for o in map(charged, _in_memory(options)) if fits_a_rank(o)]
        fused = [o for o in stock if o.compute_kernel == FUSED] or stock
        tiered = [o for o in options if isinstance(o, TieredShardingOption)]
        return Table(
            in_memory=min(fused, key=lambda o: (o.total_storage.ddr, o.sharding_type != TABLE_WISE, o.total_perf), default=None),
            tiered=min(tiered, key=lambda o: (not fits_a_rank(o), (o.sharding_type == ROW_WISE) == fits_a_rank(o)), default=None),
            name=options[0].name,
        )


def _in_memory(options: list[ShardingOption]) -> list[ShardingOption]:
    return [o for o in options if not isinstance(o, TieredShardingOption)]


def total_at(tables: Sequence[Table], level: float) -> Storage:
    """Storage of all shards of all tables at a level."""
    return sum((table.storage_at(level) for table in tables), Storage(0, 0, 0))
