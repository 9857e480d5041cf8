"""TorchRec's partitioner, and a second look at whether what it placed fits."""

from __future__ import annotations

from collections import Counter

from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.types import Partitioner, PlannerError, PlannerErrorType, ShardingOption, Topology

from .estimators import uncharged_bytes


class TieredPartitioner(Partitioner):
    """Places as ``placer`` does, and refuses a placement in which a rank's DDR is exceeded by optimizer state that TorchRec's
    estimates leave out."""

    def __init__(self, placer: Partitioner | None = None) -> None:
        self._placer = placer or GreedyPerfPartitioner()

    def partition(self, proposal: list[ShardingOption], storage_constraint: Topology) -> list[ShardingOption]:
        """The proposal, every shard with its rank. Raises: PlannerError when it does not fit."""
        plan = self._placer.partition(proposal, storage_constraint)
        need: Counter[int] = Counter()
        for option in plan:
            for shard, missing_bytes in zip(option.shards, uncharged_bytes(option), strict=True):
                need[shard.rank] += shard.storage.ddr + missing_bytes
        for device in storage_constraint.devices:
            if need[device.rank] > device.storage.ddr:
                raise PlannerError(
                    f"rank {device.rank} needs {need[device.rank]} bytes of DDR with optimizer state, it has {device.storage.ddr}",
                    PlannerErrorType.PARTITION,
                )
        return plan
