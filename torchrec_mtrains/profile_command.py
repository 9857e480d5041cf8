"""``mtrains profile``: how the tables of a data source are used, as a file for the planner, a table and a page to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .command import require_writable, typed_errors
from .data_options import DATA_OPTIONS, data_source, with_options

ENDLESS_BATCHES = 1000
"""Read of data without end where ``--batches`` does not say how many."""


@click.command()
@click.argument("data", metavar="DATA")
@with_options(*DATA_OPTIONS)
@click.option(
    "--batches", type=click.IntRange(2), default=None, help=f"Read no more; left out: all of a file, {ENDLESS_BATCHES} of synthetic."
)
@click.option("--sample-share", type=float, default=0.01, show_default=True, help="Of a table's rows to simulate, at least 50,000 rows.")
@click.option("--prefetch-depth", type=click.IntRange(0), default=2, show_default=True, help="Of the pipeline that will train.")
@click.option("--embedding-dim", type=click.IntRange(1), default=32, show_default=True, help="Floats a row, for bandwidths.")
@click.option(
    "--target-samples-per-s", type=click.FloatRange(0, min_open=True), default=100_000.0, show_default=True, help="For bandwidths."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of synthetic data, shuffles and the sample.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), default="access.json", show_default=True, help="The profile.")
@click.option("--report", type=click.Path(dir_okay=False), default=None, help="Also write a page with pictures to this HTML file.")
@typed_errors
def profile(**o: Any) -> None:
    """Measure how DATA uses its tables: demand, reuse, drift, and what slot pools of each size would miss.

    DATA is synthetic, movielens:PATH or criteo:PATH. --batch-size is that of all ranks together.
    """
    from tqdm import tqdm

    from .html_page import write
    from .profile_report import page, summary
    from .profiling import ProfileOptions
    from .profiling import profile as measure
    from .show import console

    require_writable("--output", o["output"])
    require_writable("--report", o["report"])
    source = data_source(o, rank=0, world_size=1)
    batches = ENDLESS_BATCHES if source.endless and o["batches"] is None else o["batches"]
    options = ProfileOptions(batches, o["sample_share"], o["prefetch_depth"], row_bytes=4 * o["embedding_dim"], seed=o["seed"])
    known = min((n for n in (batches, source.train_steps) if n is not None), default=None)
    total = None if known is None else known * source.batch_size
    with tqdm(total=total, unit=" samples", unit_scale=True, dynamic_ncols=True) as bar:
        found = measure(source, options, bar.update)
    found.save(o["output"])
    console().print(summary(found, o["target_samples_per_s"]))
    click.echo(f"profile: {o['output']}")
    if o["report"]:
        click.echo(f"report: {write(page(found, o['target_samples_per_s']), Path(o['report']))}")
