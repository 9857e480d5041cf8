"""The ``mtrains`` command: plan and train TorchRec's DLRM with tables in tiers, checkpoints and volumes, and the demo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from . import __version__
from .calibrate_command import calibrate
from .checkpoint_commands import checkpoint, inspect
from .command import require_writable, typed_errors
from .data_options import DATA, DATA_OPTIONS, data_source, with_options
from .errors import ConfigurationError
from .profile_command import profile
from .sizes import parse_bytes

Command = Callable[..., Any]


class _Bytes(click.ParamType):
    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_bytes(value)
        except ConfigurationError as e:
            self.fail(str(e), param, ctx)


class _Widths(click.ParamType):
    name = "widths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            widths = tuple(int(width) for width in value.split(","))
        except ValueError:
            widths = ()
        if not widths or min(widths) < 1:
            self.fail(f"layer widths look like 128,64, got {value!r}", param, ctx)
        return widths


_MODEL = (
    click.option("--embedding-dim", type=int, default=32, show_default=True),
    click.option("--dense-layers", type=_Widths(), default="64", show_default=True, help="Hidden widths of the dense arch."),
    click.option("--over-layers", type=_Widths(), default="64", show_default=True, help="Hidden widths of the over arch."),
    click.option("--optimizer", default="rowwise_adagrad", show_default=True, help="sgd, adagrad or rowwise_adagrad."),
    click.option("--learning-rate", type=float, default=0.05, show_default=True, help="Of the tables."),
    click.option("--dense-learning-rate", type=float, default=None, help="Of the rest; as --learning-rate if left out."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of initial values, synthetic data and shuffles."),
)
_PLACEMENT = (
    click.option("--ssd", multiple=True, metavar="PATH", help="Folder on an SSD for the tables that do not fit; repeat to stripe."),
    click.option("--ddr-budget", type=_Bytes(), default=None, help="Memory for tables, pools and indexes, a rank: 64MiB."),
    click.option("--ssd-capacity", type=_Bytes(), default=None, help="Cap of what a rank keeps on the SSD."),
    click.option("--pmem", default=None, metavar="PATH", help="Folder on PMem, CXL memory or tmpfs for caches in front of the SSD."),
    click.option("--pmem-capacity", type=_Bytes(), default=None, help="What a rank's caches take of --pmem: 16GiB."),
    click.option("--hardware", type=click.Path(dir_okay=False), default=None, help="The machine, as mtrains calibrate measured it."),
    click.option("--access", type=click.Path(dir_okay=False), default=None, help="How tables are used, as mtrains profile measured it."),
    click.option("--pool-rows", type=click.IntRange(1), default=None, help="Every table in tiers, with a slot pool of so many rows."),
    click.option("--in-memory", is_flag=True, help="Every table whole in memory: TorchRec's own plan."),
    click.option("--threads", type=click.IntRange(1), default=None, help="Of torch; its own choice if left out."),
)
_DEVICE = (
    click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where the tables train."),
    click.option("--hbm-budget", type=_Bytes(), default=None, help="With --device cuda: GPU memory for tables, pools and caches, a rank."),
)
_SCHEDULE = (
    click.option("--steps", type=click.IntRange(1), default=None, help="Batches to train, counted from the data's beginning."),
    click.option("--checkpoint", type=click.Path(file_okay=False), default=None, help="Folder for checkpoints; one is made at the end."),
    click.option("--checkpoint-every", type=click.IntRange(1), default=None, metavar="STEPS", help="And one every so many steps."),
)
_JOB = (
    click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --checkpoint."),
    click.option("--cold-restart", is_flag=True, help="With --resume: begin with empty slot pools."),
    click.option("--report", type=click.Path(dir_okay=False), default=None, help="Write the report to this HTML file."),
    click.option("--prefetch-depth", type=click.IntRange(0), default=2, show_default=True, help="Batches whose rows are fetched ahead."),
    click.option("--lookahead", type=click.IntRange(0), default=None, help="Further batches that eviction knows; if left out, what helps."),
    click.option("--plan-only", is_flag=True, help="Print the plan and stop."),
)


def _train_options(o: dict[str, Any]) -> Any:
    from .job_model import ModelOptions
    from .placement import PlacementOptions
    from .train import TrainOptions

    return TrainOptions(
        model=ModelOptions(
            embedding_dim=o["embedding_dim"],
            dense_layers=o["dense_layers"],
            over_layers=o["over_layers"],
            optimizer=o["optimizer"],
            learning_rate=o["learning_rate"],
            dense_learning_rate=o["dense_learning_rate"],
            seed=o["seed"],
        ),
        placement=PlacementOptions(
            in_memory=o["in_memory"],
            ssd=o["ssd"],
            ssd_capacity_bytes=o["ssd_capacity"],
            ddr_budget_bytes=o["ddr_budget"],
            hbm_budget_bytes=o.get("hbm_budget"),
            pool_rows=o["pool_rows"],
            pmem=o["pmem"],
            pmem_capacity_bytes=o["pmem_capacity"],
            hardware=o["hardware"],
            access=o["access"],
        ),
        steps=o["steps"],
        checkpoint=o["checkpoint"],
        checkpoint_every=o["checkpoint_every"],
        resume=o.get("resume", False),
        warm_restart=not o.get("cold_restart", False),
        prefetch_depth=o.get("prefetch_depth", 2),
        lookahead=o.get("lookahead"),
    )


def _plan(o: dict[str, Any]) -> None:
    from . import show
    from .process_group import process_group
    from .train import placed_model

    options = _train_options(o)
    require_writable("--picture", o.get("picture"))
    with process_group() as pg:
        source = data_source(o, pg.rank(), pg.size())
        _, placed = placed_model(source, options, pg)
        if pg.rank() == 0:
            show.plan(placed.rows, placed.summary)
            if o.get("picture"):
                from .planner.explanations import draw

                if placed.summary is None:
                    raise ConfigurationError("--picture draws what memory buys: give --ssd and --ddr-budget, so that the planner decides")
                draw(placed.summary, o["picture"])
                click.echo(f"picture: {o['picture']}")


@click.group()
@click.version_option(__version__, prog_name="mtrains")
def main() -> None:
    """Storage tiers for TorchRec: train embedding tables larger than memory from an SSD."""
    from .spinning import spin_briefly

    spin_briefly()  # before torch comes in
    from .meters import keep_freed_memory_small
    from .show import quiet

    quiet()
    keep_freed_memory_small()


main.add_command(calibrate)
main.add_command(checkpoint)
main.add_command(inspect)
main.add_command(profile)


@main.command()
@with_options(DATA, *DATA_OPTIONS, *_MODEL, *_PLACEMENT, *_DEVICE, *_SCHEDULE)
@click.option("--picture", type=click.Path(dir_okay=False), default=None, help="Draw the predicted step by memory a rank: plan.png.")
@typed_errors
def plan(**o: Any) -> None:
    """Print where every table would live."""
    if (o["device"] == "cuda") != (o["hbm_budget"] is not None):
        raise ConfigurationError("--device cuda and --hbm-budget BYTES go together: without a GPU there is no HBM to share")
    _plan(o)


@main.command()
@with_options(DATA, *DATA_OPTIONS, *_MODEL, *_PLACEMENT, *_SCHEDULE, *_JOB)
@typed_errors
def train(**o: Any) -> None:
    """Train TorchRec's DLRM; under torchrun, on several ranks."""
    if o["plan_only"]:
        _plan(o)
        return
    import torch

    from . import show
    from .process_group import process_group
    from .report import write_report
    from .train import train as run

    if o["threads"]:
        torch.set_num_threads(o["threads"])
    options = _train_options(o)
    require_writable("--report", o["report"])
    if not options.resume:
        require_writable("--checkpoint", options.checkpoint, folder=True)
    with process_group() as pg:
        source = data_source(o, pg.rank(), pg.size())
        first = pg.rank() == 0
        progress = show.Progress(source, options, pg.size()) if first else None
        result = run(source, options, pg, progress.step if progress else None, show.plan if first else None)
        if progress:
            progress.close()
            show.result(result)
            if o["report"]:
                click.echo(f"report: {write_report(result, Path(o['report']))}")


@main.command()
@click.option("--ssd", type=click.Path(), default=None, help="Folder on an SSD; a temporary one if left out.")
@click.option("--out", type=click.Path(file_okay=False), default="demo_out", show_default=True, help="Folder for the reports.")
@click.option("--cache", type=click.Path(file_okay=False), default=".cache/movielens", show_default=True, help="Folder for ml-100k.")
@click.option("--one-row-tables", is_flag=True, help="The same program on tables of one row: what it costs in memory by itself.")
@click.option("--steps", type=click.IntRange(1), default=None, help="Batches of the synthetic part, if not the demo's own number.")
@click.option("--skip-movielens", is_flag=True, help="Synthetic data only.")
@typed_errors
def demo(**o: Any) -> None:
    """Train a synthetic DLRM from the SSD, then ml-100k twice: from the SSD and in memory."""
    from .demo import run

    require_writable("--out", o["out"], folder=True)
    run(**o)


if __name__ == "__main__":
    main()
