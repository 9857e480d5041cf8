"""TorchRec's partitioner, with a second look at whether what it placed fits, and a second try where it found no place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.types import (
    PartitionByType,
    Partitioner,
    PlannerError,
    PlannerErrorType,
    Shard,
    ShardingOption,
    Storage,
    Topology,
)

from .estimators import uncharged_bytes
from .sharding_options import TieredShardingOption
from .storage import bytes_in

_BY_ROOM = (PartitionByType.DEVICE.value, PartitionByType.UNIFORM.value)


class TieredPartitioner(Partitioner):
    """Places as ``placer`` does, and refuses a placement in which a rank's DDR is exceeded by optimizer state that TorchRec's
    estimates leave out, or its PMem, which TorchRec's partitioners do not see. A proposal whose shards all have ranks stays as it is. One
    with tiered tables that ``placer``, which balances work, cannot place is placed by room."""

    def __init__(self, placer: Partitioner | None = None) -> None:
        self._placer = placer or GreedyPerfPartitioner()

    def partition(self, proposal: list[ShardingOption], storage_constraint: Topology) -> list[ShardingOption]:
        """The proposal, every shard with its rank. Raises: PlannerError when it does not fit."""
        plan = proposal if all(s.rank is not None for o in proposal for s in o.shards) else self._place(proposal, storage_constraint)
        for tier in ("hbm", "ddr", "ssd", "pmem"):
            need: Counter[int] = Counter()
            for option in plan:
                for shard, missing_bytes in zip(option.shards, uncharged_bytes(option), strict=True):
                    need[shard.rank] += bytes_in(shard.storage, tier) + (missing_bytes if tier == "ddr" else 0)
            for device in storage_constraint.devices:
                have = bytes_in(device.storage, tier)
                if need[device.rank] > have:
                    raise PlannerError(
                        f"rank {device.rank} needs {need[device.rank]} bytes of {tier}, optimizer state included, and has {have}",
                        PlannerErrorType.PARTITION,
                    )
        return plan

    def _place(self, proposal: list[ShardingOption], storage_constraint: Topology) -> list[ShardingOption]:
        try:
            return self._placer.partition(proposal, storage_constraint)
        except PlannerError:
            tiered = any(isinstance(option, TieredShardingOption) for option in proposal)
            if not tiered or any(option.partition_by not in _BY_ROOM for option in proposal):
                raise
            place_by_room(proposal, [device.storage for device in storage_constraint.devices])
            return proposal


class NoRoomError(PlannerError):
    """A shard that no rank has room for: ``tier`` is ``short_bytes`` too small where there is most of it."""

    def __init__(self, name: str, tier: str, need_bytes: int, most_bytes: int) -> None:
        what = f"a shard of table {name!r} needs {need_bytes} bytes of {tier}, no rank has more than {most_bytes} left"
        super().__init__(what, PlannerErrorType.PARTITION)
        self.tier, self.short_bytes = tier, need_bytes - most_bytes


def place_by_room(options: Sequence[ShardingOption], capacity: Sequence[Storage]) -> None:
    """Gives every shard a rank: row-wise tables first, on all ranks, then the largest shards, each where most DDR is left.

    Raises: NoRoomError.
    """
    free = list(capacity)
    singles: list[tuple[ShardingOption, Shard]] = []
    for option in options:
        for i, shard in enumerate(option.shards):
            if option.partition_by == PartitionByType.UNIFORM.value:
                _place(option.name, shard, [i], free)
            else:
                singles.append((option, shard))
    for option, shard in sorted(singles, key=lambda pair: -pair[1].storage.ddr):
        _place(option.name, shard, range(len(free)), free)


def _place(name: str, shard: Shard, ranks: Sequence[int], free: list[Storage]) -> None:
    roomy = [rank for rank in ranks if shard.storage.fits_in(free[rank])]
    if not roomy:
        for tier in ("ddr", "ssd"):
            need, most = getattr(shard.storage, tier), max(getattr(free[rank], tier) for rank in ranks)
            if need > most:
                raise NoRoomError(name, tier, need, most)
        # Some ranks have the DDR, others the SSD: the rank with most DDR lacks SSD.
        rank = max(ranks, key=lambda rank: free[rank].ddr)
        raise NoRoomError(name, "ssd", shard.storage.ssd, free[rank].ssd)
    shard.rank = max(roomy, key=lambda rank: free[rank].ddr)
    free[shard.rank] = free[shard.rank] - shard.storage
