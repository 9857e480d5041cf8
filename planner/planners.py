"""``TieredShardingPlanner``: TorchRec's planner with an SSD below the tables that do not fit in memory."""

from __future__ import annotations

import pickle
from typing import Any

import torch.distributed as dist
from rich.table import Table as RichTable
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    Partitioner,
    PlannerError,
    Proposer,
    ShardingOption,
    StorageReservation,
)
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from ..errors import ConfigurationError
from ..lookahead import LOOKAHEAD_BYTES
from .access_profile import AccessProfile
from .assumed_hardware import assumed_hardware
from .chains import with_chains
from .checkpoint_schedule import CheckpointSchedule
from .enumerators import TieredEnumerator
from .explanations import PlanSummary, alternative, summary
from .gpu_enumerator import GpuEnumerator
from .gpu_perf_model import GpuPerfModel
from .gpu_proposer import GpuProposer
from .hardware_profile import HardwareProfile
from .partitioners import TieredPartitioner
from .perf_model import PerfModel, StepPrediction
from .proposers import TieredProposer
from .search import SearchResult, predicted
from .shortages import shortage
from .stats import TieredStats, plan_rows, render_plan
from .storage_reservations import DdrStorageReservation
from .topology import TieredTopology


class TieredShardingPlanner(EmbeddingShardingPlanner):
    """Plans as TorchRec does while every table fits in the ranks' DDR budgets; beyond, searches for the plan whose predicted step is
    fastest (``search.py``): which tables stay in memory, which go above the SSD, with what pools and PMem caches, on which ranks.

    Arguments are ``EmbeddingShardingPlanner``'s, and these. ``hardware``: the machine, as ``mtrains calibrate`` measured it; left out, an
    assumed one. ``access``: how the tables are used, as ``mtrains profile`` measured it; left out, Zipf's law. ``dense_ms``: a step's
    compute outside the tables. ``prefetched``: whether rows of coming batches are fetched meanwhile. ``lookahead_bytes``: the
    pipeline's. ``checkpoints``: how often training
    commits one. ``search_seconds``: about how long to look for a plan with tiers.
    Defaults of our own: ``storage_reservation`` keeps nothing from the tables (``DdrStorageReservation(ddr_bytes)`` keeps some for the
    dense model); ``proposer`` is the list of TorchRec proposers to ask for a plan without tiers; ``stats`` logs the plan as ``describe``
    renders it. ``batch_size`` is per rank.

    Raises, from ``plan``: InsufficientStorageError, naming the tier that is short and by how many bytes; ConfigurationError for
    constraints that leave a table no way to be kept, and for an access profile of other tables.
    """

    def __init__(
        self,
        topology: TieredTopology,
        batch_size: int | None = None,
        constraints: dict[str, ParameterConstraints] | None = None,
        hardware: HardwareProfile | None = None,
        access: AccessProfile | None = None,
        dense_ms: float = 0.0,
        prefetched: bool = True,
        lookahead_bytes: int = LOOKAHEAD_BYTES,
        checkpoints: CheckpointSchedule | None = None,
        search_seconds: float | None = None,
        storage_reservation: StorageReservation | None = None,
        proposer: Proposer | list[Proposer] | None = None,
        partitioner: Partitioner | None = None,
        **planner_kwargs: Any,
    ) -> None:
        enumerator = planner_kwargs.pop("enumerator", None)
        if enumerator is not None and not isinstance(enumerator, TieredEnumerator):
            raise ConfigurationError(
                f"TieredShardingPlanner: enumerator must be a TieredEnumerator, got {type(enumerator).__name__}: the search goes by what "
                "it says of each option; leave it out, or subclass TieredEnumerator"
            )
        reservation = storage_reservation or DdrStorageReservation()
        on_gpu = topology.compute_device == "cuda"
        self._model = (GpuPerfModel if on_gpu else PerfModel)(
            hardware or assumed_hardware(topology),
            topology.ranks_per_host,
            dense_ms,
            prefetched,
            checkpoints or CheckpointSchedule(),
            lookahead_bytes,
        )
        self._tiered_proposer = (GpuProposer if on_gpu else TieredProposer)(
            reservation,
            self._model,
            [proposer] if isinstance(proposer, Proposer) else proposer,
            search_seconds,
        )
        planner_kwargs.setdefault("stats", [TieredStats(self._model, self.described, self.summarized)])
        super().__init__(
            topology=topology,
            batch_size=batch_size,
            constraints=constraints,
            storage_reservation=reservation,
            proposer=self._tiered_proposer,
            partitioner=TieredPartitioner(partitioner),
            enumerator=enumerator
            or (GpuEnumerator if on_gpu else TieredEnumerator)(topology, batch_size or BATCH_SIZE, constraints, self._model, access),
            **planner_kwargs,
        )
        self._tiered_topology = topology
        self._planned: tuple[ShardingPlan | None, list[dict[str, Any]], PlanSummary | None] = (None, [], None)
        self._notes = [
            *([] if hardware else ["assumed hardware: nobody measured this machine; `mtrains calibrate` does, and give its profile"]),
            *([] if access else ["assumed accesses: Zipf's law; `mtrains profile` measures them, and give its profile"]),
        ]

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        """The plan, on one rank: tiered tables are ``TieredParameterSharding``, the others as TorchRec plans them."""
        self._best_plan = None
        try:
            plan = super().plan(module, sharders)
        except PlannerError as error:
            raise self._reason(error) from error
        best_plan: list[ShardingOption] = self._best_plan or []
        plan = with_chains(plan, best_plan, self._tiered_topology)
        self._planned = (plan, self.described(best_plan), self.summarized(best_plan))
        return plan

    def collective_plan(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]] | None = None, pg: dist.ProcessGroup | None = None
    ) -> ShardingPlan:
        """``plan`` on rank 0, sent to all. An error of rank 0 is raised on every rank, so that none waits for a plan."""
        if pg is None:
            assert dist.is_initialized(), "call torch.distributed.init_process_group() first, or plan() without one"
            pg = dist.group.WORLD
        assert pg is not None
        answer: list[Any] = [None]
        if pg.rank() == 0:
            try:
                self.plan(module, get_default_sharders() if sharders is None else sharders)
                answer = [self._planned]
            except Exception as error:
                answer = [_sendable(error)]
        if pg.size() > 1:
            dist.broadcast_object_list(answer, dist.get_global_rank(pg, 0), group=pg)
        if isinstance(answer[0], Exception):
            raise answer[0]
        self._planned = answer[0]
        assert self._planned[0] is not None
        return self._planned[0]

    def plan_rows(self, plan: ShardingPlan) -> list[dict[str, Any]]:
        """The plan, one dict a table: table, sharding, kernel, ranks, rows, pool_rows and cache_rows (a shard; None where there is
        none), hbm_bytes, ddr_bytes, pmem_bytes and ssd_bytes (of all shards), lookups (a step's, of all ranks), hit_ratio (predicted,
        of a tiered table's pools), why.

        Raises: ConfigurationError for a plan that is not the last one this planner made.
        """
        if plan is not self._planned[0]:
            raise ConfigurationError("plan_rows explains the last plan that this planner made, got another one; plan again")
        return self._planned[1]

    def summary(self, plan: ShardingPlan) -> PlanSummary:
        """The predicted step, its bottleneck, and what more memory would buy, on every rank.

        Raises: ConfigurationError for a plan that is not the last one this planner made.
        """
        if plan is not self._planned[0]:
            raise ConfigurationError("summary explains the last plan that this planner made, got another one; plan again")
        assert self._planned[2] is not None
        return self._planned[2]

    @property
    def search_result(self) -> SearchResult | None:
        """What the search for the last plan found, on the rank that planned; None where everything was in memory."""
        return self._tiered_proposer.result

    @property
    def prediction(self) -> StepPrediction:
        """The step of the last plan, predicted, on the rank that planned."""
        return predicted(self._best_plan or [], self._model, self._topology.world_size)

    def describe(self, plan: ShardingPlan) -> RichTable:
        """The plan as people read it."""
        return render_plan(self.plan_rows(plan), self._topology)

    def described(self, options: list[ShardingOption]) -> list[dict[str, Any]]:
        """Rows as ``plan_rows`` returns them, of placed options."""
        proposer = self._tiered_proposer
        fqns = [option.fqn for option in proposer.first_options]
        other = dict(zip(fqns, zip(proposer.footprint.tables, proposer.stock, strict=True), strict=True))
        alternatives = {
            o.fqn: alternative(o, other[o.fqn][0], self._model, allowed_in_memory=bool(other[o.fqn][1])) for o in options if o.fqn in other
        }
        return plan_rows(options, self._tiered_topology.pmem is not None, alternatives)

    def summarized(self, options: list[ShardingOption]) -> PlanSummary:
        """The summary of placed options."""
        prediction = predicted(options, self._model, self._topology.world_size)
        memory = "hbm" if self._topology.compute_device == "cuda" else "ddr"
        return summary(prediction, self._tiered_proposer.result, self._notes, memory)

    def _reason(self, error: PlannerError) -> PlannerError:
        proposer = self._tiered_proposer
        if self._best_plan is not None or not proposer.footprint.tables:
            return error
        if isinstance(proposer, GpuProposer):
            return proposer.shortage()
        short = proposer.capacity_short, proposer.in_memory_short
        return shortage(proposer.footprint, proposer.stock, proposer.capacity.storage, *short) or error


def _sendable(error: Exception) -> Exception:
    """The error as other ranks can get it: one that cannot be pickled would leave them waiting."""
    error.__cause__ = None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__} on the rank that plans: {error}")
    return error
