"""Where the main job's tables live: all in memory (TorchRec's own plan), or in tiers under a memory budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from .data import BatchSource
from .default_sharders import sharders as tiered_sharders
from .errors import ConfigurationError
from .hand_plan import plan_by_hand, plan_rows, tables_of_rank
from .job_model import ModelOptions, fused_params, stock_plan, stock_sharders
from .job_shape import JobShape
from .lookahead import LOOKAHEAD_BYTES
from .planner import (
    AccessProfile,
    CheckpointSchedule,
    DdrStorageReservation,
    HardwareProfile,
    PlanSummary,
    PmemDevice,
    TieredShardingPlanner,
    TieredTopology,
)
from .planner.charges import SNAPSHOT_AFTER_BYTES, block_bytes, capacity_for
from .tiers import SsdHome, TierChain

_LOOKAHEAD_SHARE = 1 / 16  # of the budget, a guess: ids of coming batches must not take the memory that pools miss less with
_LEAST_CAPACITY_BYTES = 1 << 30  # guess: what a small disk has to spare
# What a volume (write chunks, read buffers, cleaning, the heap's slack) and a batch's missed rows on their way cost beside what the
# planner charges. benchmarks/demo_memory.py, 2 cores AMD EPYC, 2026-11-25, 65,536 lookups a step of which 95% miss: 12 MiB over
# the budget with nothing reserved; 7 to 13 MiB below it with 16 MiB. Here 24 MiB at that size, split by guess.
_VOLUME_BYTES = 16 << 20
_BYTES_PER_LOOKUP = 128


@dataclass(frozen=True)
class PlacementOptions:
    """``in_memory`` keeps every table in memory. Otherwise ``ssd`` names the folders of the volume, ``ddr_budget_bytes`` bounds
    the memory of tables, pools and indexes of a rank, and ``pool_rows`` puts every table in tiers with a pool of so many rows.
    ``pmem`` names a folder for caches in front of the SSD, which take ``pmem_capacity_bytes`` of it on each rank. ``hardware`` and
    ``access`` name the files of ``mtrains calibrate`` and ``mtrains profile`` that the planner goes by. ``hbm_budget_bytes`` plans for
    ranks with a GPU each, whose tables train in so much of its memory, above DDR and, where there is one, the SSD."""

    in_memory: bool = False
    ssd: tuple[str, ...] = ()
    ssd_capacity_bytes: int | None = None
    ddr_budget_bytes: int | None = None
    hbm_budget_bytes: int | None = None
    pool_rows: int | None = None
    pmem: str | None = None
    pmem_capacity_bytes: int | None = None
    hardware: str | None = None
    access: str | None = None

    @property
    def lookahead_bytes(self) -> int:
        """What batches of the lookahead window may hold in memory on a rank; the planner charges it."""
        return LOOKAHEAD_BYTES if self.ddr_budget_bytes is None else min(LOOKAHEAD_BYTES, int(_LOOKAHEAD_SHARE * self.ddr_budget_bytes))

    def __post_init__(self) -> None:
        if self.in_memory and (self.ssd or self.ddr_budget_bytes or self.pool_rows or self.ssd_capacity_bytes or self.pmem):
            raise ConfigurationError(
                "--in-memory keeps whole tables in memory: leave out --ssd, --ssd-capacity, --ddr-budget, --pool-rows and --pmem"
            )
        if self.hbm_budget_bytes is not None and (self.in_memory or self.ddr_budget_bytes is None or self.pool_rows or self.pmem):
            raise ConfigurationError(
                "--hbm-budget goes with --ddr-budget, and with --ssd or without; not with --in-memory, --pool-rows or --pmem"
            )
        if not self.in_memory and not self.ssd and self.hbm_budget_bytes is None:
            raise ConfigurationError("say where the tables live: --ssd PATH with --ddr-budget BYTES for the SSD tier, or --in-memory")
        if self.ssd and (self.ddr_budget_bytes is None) == (self.pool_rows is None):
            raise ConfigurationError("with --ssd give either --ddr-budget BYTES, and the planner decides, or --pool-rows ROWS")
        if (self.hardware or self.access) and self.ddr_budget_bytes is None:
            raise ConfigurationError("--hardware and --access are for the planner, which has nothing to decide without --ddr-budget")
        if (self.pmem is None) != (self.pmem_capacity_bytes is None):
            raise ConfigurationError("--pmem PATH and --pmem-capacity BYTES go together: a cache takes its room when it opens")

    @property
    def pmem_device(self) -> PmemDevice | None:
        """What the planner gets to share among caches."""
        return None if self.pmem is None or self.pmem_capacity_bytes is None else PmemDevice(self.pmem, self.pmem_capacity_bytes)


@dataclass
class Placement:
    """Sharders and plan of a model, and the plan as people read it; a summary where the planner decided."""

    sharders: list[ModuleSharder[nn.Module]]
    plan: ShardingPlan
    rows: list[dict[str, Any]]
    summary: PlanSummary | None = None


def place(
    model: nn.Module, source: BatchSource, model_options: ModelOptions, options: PlacementOptions, checkpoints: CheckpointSchedule, pg: Any
) -> Placement:
    """Sharders and plan for the model. Called on every rank; every rank gets the same plan.

    Raises: the planner's errors when the tables do not fit.
    """
    job = JobShape.of(source, model_options, checkpoints, pg.size())
    if options.in_memory:
        stock = stock_sharders(model_options)
        plan = stock_plan(model, source.tables, stock, job.world_size, pg)
        return Placement(stock, plan, plan_rows(plan, job))
    tiered = tiered_sharders(fused_params=fused_params(model_options))
    home, pmem = ssd_home(job, options) if options.ssd else None, options.pmem_device
    if options.pool_rows is not None:
        assert home is not None, "PlacementOptions has no pools without an SSD"
        plan = plan_by_hand(job, model_options.embedding_dim, options.pool_rows, home, pmem)
        return Placement(tiered, plan, plan_rows(plan, job))
    assert options.ddr_budget_bytes is not None, "PlacementOptions has one of the two"
    planner = TieredShardingPlanner(
        topology=TieredTopology(
            world_size=job.world_size,
            compute_device="cpu" if options.hbm_budget_bytes is None else "cuda",
            ddr_budget_bytes=options.ddr_budget_bytes,
            hbm_budget_bytes=options.hbm_budget_bytes,
            ssd=home,
            pmem=pmem,
            local_world_size=job.world_size,
        ),
        batch_size=source.batch_size,
        storage_reservation=DdrStorageReservation(
            _VOLUME_BYTES + _BYTES_PER_LOOKUP * source.batch_size * sum(t.pooling for t in source.tables)
        ),
        constraints={t.name: ParameterConstraints(pooling_factors=[float(t.pooling)]) for t in source.tables},
        checkpoints=checkpoints,
        hardware=HardwareProfile.load(options.hardware) if options.hardware else None,
        access=AccessProfile.load(options.access) if options.access else None,
        lookahead_bytes=options.lookahead_bytes,
    )
    plan = planner.collective_plan(model, tiered, pg)
    return Placement(tiered, plan, planner.plan_rows(plan), planner.summary(plan))


def ssd_home(job: JobShape, options: PlacementOptions) -> SsdHome:
    """The home that all tiered tables share: if nobody says how large, with room for every table that a rank may get."""
    if options.ssd_capacity_bytes is not None:
        return SsdHome(options.ssd, options.ssd_capacity_bytes)
    large = SsdHome(options.ssd, 2 * SNAPSHOT_AFTER_BYTES)  # with whatever a large volume needs
    need = {t: job.charge(t, TierChain(1, (large,))).ssd for t in job.tables}
    if options.pool_rows is not None:
        most = max(sum(need[t] for t in tables_of_rank(job, rank)) for rank in range(job.world_size))
    else:  # shards are placed where there is most room, so that no rank is ahead of the mean by more than one table
        most = sum(need.values()) // job.world_size + (max(need.values()) if job.world_size > 1 else 0)
    return SsdHome(options.ssd, max(_LEAST_CAPACITY_BYTES, capacity_for(most, {block_bytes(job.record_bytes)}, job.checkpoints.keep)))
