"""Which data a command reads: its options, and the source that they name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .errors import ConfigurationError

Command = Callable[..., Any]


def with_options(*options: Command) -> Callable[[Command], Command]:
    """Adds several options to a command, in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


DATA = click.option("--data", required=True, metavar="KIND[:PATH]", help="synthetic, movielens:PATH (.inter) or criteo:PATH (Kaggle TSV).")
DATA_OPTIONS = (
    click.option("--batch-size", type=click.IntRange(1), default=1024, show_default=True, help="Samples a step and rank."),
    click.option("--epochs", type=click.IntRange(1), default=1, show_default=True, help="Passes over a file."),
    click.option("--rows", type=click.IntRange(1), default=None, help="Rows a table: synthetic (200,000) and criteo (100,000)."),
    click.option("--tables", type=click.IntRange(1), default=8, show_default=True, help="Synthetic: number of tables."),
    click.option("--pooling", type=click.IntRange(1), default=4, show_default=True, help="Synthetic: lookups a sample and table."),
    click.option("--calibration", default="meta2021", show_default=True, help="Synthetic: meta2021, meta2022 or uniform."),
    click.option("--held-out-share", type=float, default=0.1, show_default=True, help="Files: the last part in time, never trained on."),
)


def data_source(o: dict[str, Any], rank: int, world_size: int) -> Any:
    """The ``BatchSource`` of the options' values.

    Raises: ConfigurationError for a kind of data that is not known; what the source raises.
    """
    from .data import CriteoSource, MovieLensSource, SyntheticConfig, SyntheticSource

    kind, _, path = o["data"].partition(":")
    where = {"rank": rank, "world_size": world_size}
    if kind == "synthetic" and not path:
        sizes = SyntheticConfig(
            table_count=o["tables"],
            rows=o["rows"] or 200_000,
            pooling=o["pooling"],
            calibration=o["calibration"],
        )
        return SyntheticSource(sizes, o["batch_size"], seed=o["seed"], **where)
    split = {"epochs": o["epochs"], "held_out_share": o["held_out_share"]}
    if kind == "movielens" and path:
        return MovieLensSource(path, o["batch_size"], seed=o["seed"], **split, **where)
    if kind == "criteo" and path:
        return CriteoSource(path, o["batch_size"], rows=o["rows"] or 100_000, **split, **where)
    raise ConfigurationError(f"--data must be synthetic, movielens:PATH or criteo:PATH, got {o['data']!r}")
