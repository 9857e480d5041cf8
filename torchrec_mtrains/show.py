"""What the CLI puts on a terminal: the plan, a progress bar, and what a job did."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from .data import BatchSource
from .planner import PlanSummary, render_plan
from .sizes import show_bytes
from .tier_table import TierRow, tier_rows
from .train import StepRecord, TrainOptions, TrainResult, hit_ratio, steps_of

_SMOOTHING = 0.1  # guess: weight of the newest step in the progress bar's loss and hit ratio


def quiet() -> None:
    """TorchRec and torch talk about their own insides; only errors of theirs concern the reader of a command's output."""
    warnings.filterwarnings("ignore")
    for name in ("torch", "torch.fx._symbolic_trace", "torchrec", "fbgemm_gpu"):
        logging.getLogger(name).setLevel(logging.ERROR)


def console() -> Console:
    """Standard output, wide enough for tables where it is no terminal."""
    out = Console()
    if not out.is_terminal:
        out.width = 140  # a file or a pipe has no width of its own
    return out


def plan(rows: list[dict[str, Any]], summary: PlanSummary | None = None) -> None:
    """One line a table of the model, and what the planner says of the whole."""
    out = console()
    out.print(render_plan(rows))
    for line in summary.lines() if summary else ():
        out.print(line, highlight=False)


class Progress:
    """A tqdm bar with samples/s, loss and what the tiers of this rank do, over one job, or ``runs`` like it."""

    def __init__(self, source: BatchSource, options: TrainOptions, world_size: int, runs: int = 1) -> None:
        self._samples = source.batch_size * world_size
        self._bar: Any = None
        steps = steps_of(source, options)
        self._total = None if steps is None else steps * runs
        self._loss: float | None = None
        self._tiers: dict[str, float] = {}

    def step(self, record: StepRecord) -> None:
        """Advance by one step."""
        if self._bar is None:
            total = None if self._total is None else self._total * self._samples
            done = (record.number - 1) * self._samples
            self._bar = tqdm(total=total, initial=done, unit=" samples", unit_scale=True, dynamic_ncols=True, mininterval=_interval_s())
        self._loss = _smooth(self._loss, record.loss)
        now = {**record.tiers, "seconds": record.seconds}
        self._tiers = {name: _smooth(self._tiers.get(name), value) for name, value in now.items()}
        self._bar.set_postfix_str(", ".join([f"loss {self._loss:.4f}", *live(self._tiers)]), refresh=False)
        self._bar.update(self._samples)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def live(tiers: dict[str, float]) -> list[str]:
    """What the tiers do, in a few words, from the counters of a step or the mean of several; nothing without tiered tables."""
    ratio = hit_ratio(tiers)
    if ratio is None:
        return []
    words, busy = [f"hit ratio {ratio:.3f}"], tiers["io_busy_seconds"]
    if tiers["read_ios"]:
        words.append(f"{tiers['read_ios'] / tiers['seconds']:,.0f} reads/s")
    if busy:
        words.append(f"queue {tiers['io_flight_seconds'] / busy:.0f}")
    return [*words, f"stalled {tiers['stall_seconds'] / tiers['seconds']:.0%}"]


def _interval_s() -> float:
    return 0.5 if sys.stderr.isatty() else 10.0  # a log has no use for a bar that moves


def _smooth(before: float | None, value: float) -> float:
    return value if before is None else before + _SMOOTHING * (value - before)


def tiers(rows: list[TierRow]) -> Table:
    """Where rows were found, tier by tier."""
    table = Table(title="tiers (this rank)", title_justify="left")
    for name in ("tier", "rows", "bytes", "lookups", "hits", "hit ratio", "reads", "read", "writes", "written"):
        table.add_column(name, justify="left" if name == "tier" else "right")
    for r in rows:
        table.add_row(
            r.tier,
            f"{r.rows:,}",
            show_bytes(r.bytes),
            f"{r.lookups:,}",
            f"{r.hits:,}",
            f"{r.hits / r.lookups:.3f}" if r.lookups else "",
            f"{r.reads:,}",
            show_bytes(r.read_bytes),
            f"{r.writes:,}",
            show_bytes(r.written_bytes),
        )
    return table


def result(done: TrainResult) -> None:
    """The end of a job: tiers, speed, quality, memory."""
    out = console()
    out.print(tiers(tier_rows(done)))
    for line in summary(done):
        out.print(line, highlight=False)


def summary(done: TrainResult) -> list[str]:
    """The job in a few sentences."""
    if not done.steps:
        lines = [f"nothing left to train: {done.first_step:,} steps were trained before"]
    else:
        lines = [
            f"trained {len(done.steps):,} steps of {done.batch_size * done.world_size:,} samples in {done.train_seconds:.1f} s "
            f"({done.samples_per_second:,.0f} samples/s), last loss {done.steps[-1].loss:.6f}"
        ]
    if done.checkpoints:
        longest = max(done.checkpoints, key=lambda c: c.seconds)
        wanted = sum(c.wanted for c in done.checkpoints)
        lines.append(
            f"checkpoints: {len(done.checkpoints):,}, {wanted:,} of them because a volume was short of room; "
            f"the longest took {longest.seconds * 1e3:.0f} ms, at step {longest.step:,}"
        )
    if done.held_out_samples:
        lines.append(f"held out: {done.held_out_samples:,} samples, AUC {done.auc:.6f}, loss {done.held_out_loss:.6f}")
    lines.append(f"peak resident memory {show_bytes(done.peak_rss_bytes)}")
    if done.disk is not None:
        lines.append(
            f"device {done.disk.device}, by every process on it meanwhile: read {show_bytes(done.disk.read_bytes)} in "
            f"{done.disk.reads:,} requests, written {show_bytes(done.disk.written_bytes)} in {done.disk.writes:,}"
        )
    return lines
