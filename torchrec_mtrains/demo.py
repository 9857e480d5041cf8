"""``mtrains demo``: a synthetic DLRM many times larger than its memory budget, then ml-100k from tiers and in memory."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from . import show
from .data import MovieLensSource, SyntheticConfig, SyntheticSource
from .data.fetch import fetch_ml_100k
from .errors import DataError, VolumeIoError
from .job_model import ModelOptions
from .placement import PlacementOptions
from .process_group import process_group
from .report import write_report
from .sizes import show_bytes
from .tier_table import written_row_bytes
from .train import TrainOptions, TrainResult, train
from .twins import Twins, train_twice

# Sizes of the synthetic part: tables of 8 × 500,000 rows of 516 bytes (128 floats, and row-wise Adagrad's state), 1.9 GiB.
# The budget holds indexes (12 bytes a row: 46 MiB) and pools. "uniform": little is used twice, so that rows really reach the
# SSD; a skewed set of this size would live in the pools.
TABLES, ROWS, POOLING, DIM = 8, 500_000, 8, 128
BATCH_SIZE, STEPS = 1024, 100
DDR_BUDGET_BYTES = 128 << 20
SSD_CAPACITY_BYTES = 4 << 30  # twice the tables
# ml-100k: batches so small that the smallest pools are below 10% of its largest table's rows.
ML_BATCH_SIZE, ML_EPOCHS = 64, 2


@contextmanager
def ssd_folder(asked: str | None) -> Iterator[Path]:
    """An empty folder for volumes, gone afterwards: below ``asked``, or among the temporary files.

    Raises: VolumeIoError when it cannot be made.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="mtrains-demo-", dir=asked)
    except OSError as e:
        raise VolumeIoError(f"demo: no folder can be made in {asked or tempfile.gettempdir()}: {e.strerror}; name one with --ssd") from e
    with folder as name:
        yield Path(name)


def file_system(path: Path) -> str:
    """The type of the file system that holds ``path``, as /proc/mounts names it."""
    device = os.stat(path).st_dev
    found = "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        try:
            if os.stat(mount.replace("\\040", " ")).st_dev == device:
                found = kind
        except OSError:
            continue
    return found


def _memory_disk(path: Path) -> str | None:
    kind = file_system(path)
    if kind in ("tmpfs", "ramfs"):
        return f"{path} is on {kind}, which is memory: the figures below say nothing about an SSD. Name a folder on one with --ssd"
    return None


def synthetic(ssd: Path, pg: dist.ProcessGroup, *, one_row_tables: bool = False, steps: int = STEPS) -> TrainResult:
    """Train the synthetic DLRM. ``one_row_tables``: the same program on tables of one row, to see what it costs by itself."""
    sizes = SyntheticConfig(
        table_count=TABLES,
        rows=1 if one_row_tables else ROWS,
        pooling=POOLING,
        calibration="uniform",
        active_share=1.0 if one_row_tables else 0.9,
        drift=0.0 if one_row_tables else 0.05,
    )
    source = SyntheticSource(sizes, BATCH_SIZE)
    options = TrainOptions(
        model=ModelOptions(embedding_dim=DIM, dense_learning_rate=0.01),
        placement=PlacementOptions(ssd=(str(ssd),), ddr_budget_bytes=DDR_BUDGET_BYTES, ssd_capacity_bytes=SSD_CAPACITY_BYTES),
        steps=steps,
    )
    progress = show.Progress(source, options, pg.size())
    result = train(source, options, pg, progress.step, show.plan)
    progress.close()
    show.result(result)
    return result


def movielens(file: Path, ssd: Path, pg: dist.ProcessGroup, *, batch_size: int = ML_BATCH_SIZE, epochs: int = ML_EPOCHS) -> Twins:
    """Train ml-100k twice and compare. One thread: batches this small have nothing to share out."""
    torch.set_num_threads(1)
    source = MovieLensSource(file, batch_size, epochs=epochs)
    options = TrainOptions(
        model=ModelOptions(embedding_dim=16, dense_learning_rate=0.01), placement=PlacementOptions(ssd=(str(ssd),), pool_rows=1)
    )
    progress = show.Progress(source, options, pg.size(), runs=2)
    twins = train_twice(source, options, pg, progress.step)
    progress.close()
    largest = max(table.rows for table in source.tables)
    show.result(twins.tiered)
    for line in show.summary(twins.in_memory):
        click.echo(f"in memory: {line}")
    click.echo(
        f"equal bit for bit: {len(twins.tiered.steps):,} losses, held-out loss and AUC; pools of {twins.pool_rows} rows "
        f"({twins.pool_rows / largest:.1%} of the largest table's {largest:,})"
    )
    return twins


def figures_of(result: TrainResult) -> dict[str, Any]:
    """What the synthetic part shows, for programs. Bytes; ``volumes`` holds the volumes' own counters, ``device`` the kernel's."""
    return {
        "ddr_budget_bytes": DDR_BUDGET_BYTES,
        "table_bytes": sum(table["rows"] * table["record_bytes"] for table in result.tables),
        "written_row_bytes": written_row_bytes(result),
        "peak_rss_bytes": result.peak_rss_bytes,
        "train_seconds": result.train_seconds,
        "samples_per_second": result.samples_per_second,
        "hit_ratio": result.hit_ratio,
        "volumes": result.volumes,
        "device": None if result.disk is None else asdict(result.disk),
    }


def _of_budget(count: int) -> str:
    return f"{show_bytes(count)} = {count / DDR_BUDGET_BYTES:.1f} × the budget"


def run(ssd: str | None, out: str, cache: str, *, one_row_tables: bool, skip_movielens: bool, steps: int | None) -> None:
    """The whole demo.

    Raises: the typed errors of ``errors``; TwinsDifferError if ml-100k's runs differ.
    """
    with process_group() as pg, ssd_folder(ssd) as folder:
        if warning := _memory_disk(folder):
            click.echo(warning)
        (folder / "synthetic").mkdir()
        click.echo(f"synthetic DLRM from {folder} ({file_system(folder)}), memory budget {show_bytes(DDR_BUDGET_BYTES)}")
        result = synthetic(folder / "synthetic", pg, one_row_tables=one_row_tables, steps=steps or STEPS)
        figures = figures_of(result)
        click.echo(
            f"tables {_of_budget(figures['table_bytes'])}; distinct rows written to the SSD {_of_budget(figures['written_row_bytes'])}, "
            f"{figures['written_row_bytes'] / figures['peak_rss_bytes']:.2f} × peak memory"
        )
        click.echo(f"report: {write_report(result, Path(out) / 'synthetic.html')}")
        (Path(out) / "synthetic.json").write_text(json.dumps(figures, indent=2) + "\n")
        if skip_movielens:
            return
        try:
            file = fetch_ml_100k(cache)
        except DataError as e:
            click.echo(f"ml-100k is left out: {e}")
            return
        (folder / "movielens").mkdir()
        click.echo("\nml-100k, from tiers with the smallest pools and in memory")
        twins = movielens(file, folder / "movielens", pg)
        click.echo(f"report: {write_report(twins.tiered, Path(out) / 'movielens.html')}")
