"""TorchRec's hook for rating plans, by our prediction."""

from __future__ import annotations

from torchrec.distributed.planner.types import PerfModel as TorchRecPerfModel
from torchrec.distributed.planner.types import ShardingOption

from .perf_model import PerfModel
from .search import predicted


class PredictedStep(TorchRecPerfModel):
    """For ``EmbeddingShardingPlanner(performance_model=…)``: a plan's rating is its predicted step in milliseconds, where TorchRec's own is
    the largest sum of what its shards cost a rank. Options must come from a ``TieredEnumerator``, which says what a step does to them."""

    def __init__(self, world_size: int, model: PerfModel) -> None:
        self._world_size, self._model = world_size, model

    def rate(self, plan: list[ShardingOption]) -> float:
        """Of a placed plan; smaller is better."""
        return predicted(plan, self._model, self._world_size).step_ms
