"""The main job: a DLRM on one of the data sources, trained by ``TieredTrainPipeline``, measured from within.

One call of ``train`` is one job: plan, shard, resume if asked, train, save, evaluate on the held-out split. What happened
comes back as a ``TrainResult``, which ``report`` turns into a page and the CLI into tables.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.models.dlrm import DLRMTrain

from . import placement, tier_counters
from .checkpoint import load_checkpoint, save_checkpoint, trickle, wants_checkpoint
from .checkpoint_folder import latest_step
from .data import BatchSource
from .errors import ConfigurationError
from .groups import tiered_groups
from .job_model import MarkedOptimizer, ModelOptions, build_model, dense_optimizer, parallelize
from .kernels import durability
from .meters import DiskCounters, StepClock, disk_counters, peak_rss_bytes
from .placement import PlacementOptions
from .planner import CheckpointSchedule, PlanSummary
from .train_pipeline import TieredTrainPipeline


@dataclass(frozen=True)
class TrainOptions:
    """One job. ``steps`` counts from the data's beginning, so a resumed job trains what is left of them."""

    model: ModelOptions
    placement: PlacementOptions
    steps: int | None = None
    checkpoint: str | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    warm_restart: bool = True
    prefetch_depth: int = 2
    lookahead: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ConfigurationError(f"steps must be at least 1, got {self.steps}")
        if self.resume and self.checkpoint is None:
            raise ConfigurationError("--resume needs --checkpoint DIR, the folder to resume from")
        if self.checkpoint_every is not None and (self.checkpoint_every < 1 or self.checkpoint is None):
            raise ConfigurationError("--checkpoint-every needs --checkpoint DIR and at least 1 step")


@dataclass
class StepRecord:
    """One trained batch on this rank, the ``number``-th since the data's beginning.

    ``tiers`` holds the step's increments of the tables' and volumes' counters, summed.
    """

    number: int
    loss: float
    seconds: float
    phases: dict[str, float]
    tiers: dict[str, float]


@dataclass(frozen=True)
class CheckpointRecord:
    """One committed checkpoint, how long training stood still for it, and whether a volume short of room asked for it."""

    step: int
    seconds: float
    wanted: bool


@dataclass
class TrainResult:
    """What a job did, on this rank. Bytes and seconds unless a name says otherwise."""

    data: str
    batch_size: int
    world_size: int
    options: TrainOptions
    plan: list[dict[str, Any]]
    first_step: int
    steps: list[StepRecord] = field(default_factory=list)
    checkpoints: list[CheckpointRecord] = field(default_factory=list)
    train_seconds: float = 0.0
    auc: float | None = None
    held_out_loss: float | None = None
    held_out_samples: int = 0
    tables: list[dict[str, Any]] = field(default_factory=list)
    caches: list[dict[str, Any]] = field(default_factory=list)
    volumes: list[dict[str, Any]] = field(default_factory=list)
    disk: DiskCounters | None = None
    peak_rss_bytes: int = 0

    @property
    def losses(self) -> list[float]:
        """The training loss of every step."""
        return [step.loss for step in self.steps]

    @property
    def samples_per_second(self) -> float:
        """Over all ranks."""
        return len(self.steps) * self.batch_size * self.world_size / max(self.train_seconds, 1e-9)

    @property
    def hit_ratio(self) -> float | None:
        """Share of lookups that found their row in a pool; None with no tiered table."""
        return hit_ratio(self.tiers_total())

    def tiers_total(self) -> dict[str, float]:
        """The counters of all steps together."""
        total: dict[str, float] = {}
        for step in self.steps:
            for name, value in step.tiers.items():
                total[name] = total.get(name, 0) + value
        return total


def hit_ratio(counters: dict[str, float]) -> float | None:
    """Lookups that did not miss, as a share; None without lookups."""
    lookups = counters.get("lookups", 0)
    return 1 - counters.get("misses", 0) / lookups if lookups else None


class Job:
    """A sharded model, its optimizers and its pipeline, ready to train."""

    def __init__(self, source: BatchSource, options: TrainOptions, pg: dist.ProcessGroup) -> None:
        self.source, self.options, self.pg = source, options, pg
        self.clock = StepClock()
        _check_checkpoint(options)
        model, placed = placed_model(source, options, pg)
        self.plan, self.plan_summary = placed.rows, placed.summary
        self.dmp: DistributedModelParallel = parallelize(model, placed.plan, placed.sharders)
        self.dense = dense_optimizer(self.dmp, options.model)
        self.optimizer = MarkedOptimizer(
            [self.dmp.fused_optimizer, self.dense],
            before=lambda: self.clock.lap("backward and update"),
            after=lambda: self.clock.lap("dense optimizer"),
        )
        self._mark_phases(model)
        self.pipeline = TieredTrainPipeline(
            self.dmp,
            self.optimizer,
            torch.device("cpu"),
            prefetch_depth=options.prefetch_depth,
            lookahead=options.lookahead,
            lookahead_bytes=options.placement.lookahead_bytes,
        )
        self.trained = 0
        self.checkpoints: list[CheckpointRecord] = []
        if options.resume:
            self._resume()
        self._saved = self.trained if options.resume else None

    def _resume(self) -> None:
        assert self.options.checkpoint is not None
        try:
            found = load_checkpoint(self.dmp, self.options.checkpoint, dense_optimizer=self.dense, warm=self.options.warm_restart)
            self.trained = found.step
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the SSD: the tables are of no use any more."""
        durability.close(tiered_groups(self.dmp))

    def _mark_phases(self, model: DLRMTrain) -> None:
        clock, sparse = self.clock, model.model.sparse_arch

        def lap(phase: str) -> Callable[..., None]:
            return lambda *_: clock.lap(phase)

        model.register_forward_pre_hook(lap("pipeline"))
        sparse.register_forward_pre_hook(lap("dense forward"))
        sparse.register_forward_hook(lap("lookup"))
        model.register_forward_hook(lap("dense forward"))

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            self.clock.lap("pipeline")
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.clock.lap("data")
            yield batch

    def train(self, steps: int | None, on_step: Callable[[StepRecord], None]) -> None:
        """Train until ``steps`` batches have been trained since the data's beginning, or the data ends."""
        left = None if steps is None else max(0, steps - self.trained)
        batches = self._timed(islice(self.source.train_batches(self.trained), left))
        self.dmp.train()
        before = tier_counters.total(self.dmp)
        while True:
            self.clock.start()
            try:
                loss, _, _ = self.pipeline.progress(batches)
            except StopIteration:
                break
            seconds = self.clock.stop("pipeline")
            self.trained += 1
            after = tier_counters.total(self.dmp)
            tiers = {name: value - before.get(name, 0) for name, value in after.items()}
            before = after
            on_step(StepRecord(self.trained, float(loss), seconds, dict(self.clock.seconds), tiers))
            if self.options.checkpoint is not None:
                self._serve_checkpoints()
                before = tier_counters.total(self.dmp)

    def _serve_checkpoints(self) -> None:
        """Between steps: commit a checkpoint when one is due or a volume wants one, else write back a little of what one would."""
        every = self.options.checkpoint_every
        wanted = wants_checkpoint(self.dmp)
        if wanted or (every is not None and self.trained % every == 0):
            self.save(wanted)
        elif every is not None:
            trickle(self.dmp, steps_left=every - self.trained % every)

    def save(self, wanted: bool = False) -> None:
        """Commit a checkpoint of everything that training depends on, unless this step has one."""
        assert self.options.checkpoint is not None
        if self.trained != self._saved:
            start = time.perf_counter()
            save_checkpoint(self.dmp, self.options.checkpoint, step=self.trained, dense_optimizer=self.dense)
            self._saved = self.trained
            self.checkpoints.append(CheckpointRecord(self.trained, time.perf_counter() - start, wanted))

    def evaluate(self) -> tuple[float, float, int]:
        """AUC, mean loss and number of samples over the held-out split of all ranks."""
        self.pipeline.detach()
        self.dmp.eval()
        logits: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        with torch.no_grad():
            for batch in self.source.held_out_batches(self.trained):
                _, (_, logit, label) = self.dmp(batch)
                logits.append(logit)
                labels.append(label)
        self.dmp.train()
        score, truth = gather(logits, self.pg), gather(labels, self.pg)
        if truth.size == 0:
            return math.nan, math.nan, 0
        loss = nn.functional.binary_cross_entropy_with_logits(torch.from_numpy(score), torch.from_numpy(truth))
        return area_under_curve(score, truth), float(loss), truth.size


def _check_checkpoint(options: TrainOptions) -> None:
    """A new job must not go on over the checkpoints of an earlier one."""
    if options.checkpoint is not None and not options.resume and (step := latest_step(options.checkpoint)) is not None:
        raise ConfigurationError(
            f"--checkpoint {options.checkpoint} holds step {step} of an earlier job: go on from it with --resume, or name another folder"
        )


def placed_model(source: BatchSource, options: TrainOptions, pg: Any) -> tuple[DLRMTrain, placement.Placement]:
    """The model, its sharders and its plan: all that ``mtrains plan`` needs."""
    model = build_model(source.tables, source.dense_dim, options.model)
    return model, placement.place(model, source, options.model, options.placement, checkpoint_schedule(source, options), pg)


def checkpoint_schedule(source: BatchSource, options: TrainOptions) -> CheckpointSchedule:
    """How often the job commits a checkpoint: one comes at its end in any case."""
    if options.checkpoint is None:
        return CheckpointSchedule(keep=0)
    known = [steps for steps in (options.checkpoint_every, options.steps, source.train_steps) if steps is not None]
    return CheckpointSchedule(every_steps=min(known, default=None))


def steps_of(source: BatchSource, options: TrainOptions) -> int | None:
    """The number of batches of a whole job; None where only the data's end will tell.

    Raises: ConfigurationError when nobody says and the data never ends.
    """
    if options.steps is None and source.train_steps is None and source.endless:
        raise ConfigurationError(f"{source.name} never ends: say how many steps to train with --steps")
    known = [count for count in (options.steps, source.train_steps) if count is not None]
    return min(known, default=None)


def gather(parts: list[torch.Tensor], pg: dist.ProcessGroup) -> np.ndarray:
    """The ranks' values one after the other. Shapes: parts (n_i,) → (sum of all n_i over all ranks,)."""
    mine = torch.cat(parts) if parts else torch.empty(0)
    if pg.size() == 1:
        return mine.numpy()
    everyone: list[Any] = [None] * pg.size()
    dist.all_gather_object(everyone, mine.numpy(), group=pg)
    return np.concatenate(everyone)


def area_under_curve(score: np.ndarray, truth: np.ndarray) -> float:
    """The exact area under the ROC curve, ties counted half; NaN where only one class occurs.

    Shapes: score (n,), truth (n,) of 0 and 1.
    """
    positive = int(truth.sum())
    negative = truth.size - positive
    if positive == 0 or negative == 0:
        return math.nan
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]
    return float((rank[truth == 1].sum() - positive * (positive + 1) / 2) / (positive * negative))


def train(
    source: BatchSource,
    options: TrainOptions,
    pg: dist.ProcessGroup,
    on_step: Callable[[StepRecord], None] | None = None,
    on_plan: Callable[[list[dict[str, Any]], PlanSummary | None], None] | None = None,
) -> TrainResult:
    """Run one job to its end on this rank.

    Raises: the typed errors of ``errors``: a plan that does not fit, malformed data, a full disk.
    """
    steps, ssd = steps_of(source, options), options.placement.ssd
    disk_before = disk_counters(ssd[0]) if ssd else None
    job = Job(source, options, pg)
    try:
        if on_plan is not None:
            on_plan(job.plan, job.plan_summary)
        result = _train(job, steps, on_step)
        if disk_before is not None and (after := disk_counters(ssd[0])) is not None:
            result.disk = after.since(disk_before)
        result.auc, result.held_out_loss, result.held_out_samples = job.evaluate()
    finally:
        job.close()
    return result


def _train(job: Job, steps: int | None, on_step: Callable[[StepRecord], None] | None) -> TrainResult:
    """Train, save, and read the meters: everything before the held-out split is looked at."""
    result = TrainResult(
        data=job.source.name,
        batch_size=job.source.batch_size,
        world_size=job.pg.size(),
        options=job.options,
        plan=job.plan,
        first_step=job.trained,
    )

    def record(step: StepRecord) -> None:
        result.steps.append(step)
        if on_step is not None:
            on_step(step)

    start = time.perf_counter()
    job.train(steps, record)
    result.train_seconds = time.perf_counter() - start
    if job.options.checkpoint is not None and result.steps:
        job.save()
    result.checkpoints = job.checkpoints
    result.peak_rss_bytes = peak_rss_bytes()
    result.tables, result.caches = tier_counters.tables(job.dmp), tier_counters.caches(job.dmp)
    result.volumes = tier_counters.volumes(job.dmp)
    return result
