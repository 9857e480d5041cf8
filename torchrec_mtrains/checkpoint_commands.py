"""``mtrains checkpoint push|pull`` and ``mtrains inspect``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from .command import Failed, typed_errors
from .sizes import show_bytes

if TYPE_CHECKING:
    from .checkpoint_transfer import Transfer

_SSD = click.option("--ssd", multiple=True, metavar="PATH", help="The job's SSD paths: all of them, in its order.")
_CHECKPOINT = click.option(
    "--checkpoint", "directory", required=True, type=click.Path(file_okay=False), help="The job's folder of checkpoints."
)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    with tqdm(total=0, desc=what, unit="B", unit_scale=True, unit_divisor=1024, dynamic_ncols=True, delay=0.2) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


@click.group()
def checkpoint() -> None:
    """Ship committed checkpoints to another folder, and bring them back."""


def _say(done: Transfer, verb: str) -> None:
    ranks = ", ".join(map(str, done.ranks)) or "none has volumes"
    click.echo(
        f"{verb} {done.checkpoint} (volumes of ranks: {ranks}): {show_bytes(done.moved_bytes)} moved, {show_bytes(done.known_bytes)} "
        "were there already"
    )
    if done.missing_ranks:
        click.echo(f"not published yet: push ranks {', '.join(map(str, done.missing_ranks))} from their hosts")
    if done.removed_bytes:
        click.echo(
            f"removed {show_bytes(done.removed_bytes)}, of checkpoints that are not kept: {', '.join(done.removed) or 'unfinished ones'}"
        )
    if done.not_removed:
        click.echo(f"removed nothing: {done.not_removed}")


@checkpoint.command()
@click.argument("dest", type=click.Path(file_okay=False))
@_CHECKPOINT
@_SSD
@click.option(
    "--keep", type=click.IntRange(0), default=None, help="Published checkpoints that DEST keeps; left out: as many as the job; 0: all."
)
@typed_errors
def push(dest: str, directory: str, ssd: tuple[str, ...], keep: int | None) -> None:
    """Ship the latest checkpoint to the folder DEST: what DEST has already is not sent again. May run beside the job."""
    from .checkpoint_transfer import push as run

    with _bar("push") as progress:
        done = run(directory, ssd, dest, progress, keep=keep)
    _say(done, "pushed")


@checkpoint.command()
@click.argument("dest", type=click.Path(file_okay=False))
@_CHECKPOINT
@_SSD
@click.option("--rank", "ranks", multiple=True, type=click.IntRange(0), help="A rank of this host; all of them if left out.")
@typed_errors
def pull(dest: str, directory: str, ssd: tuple[str, ...], ranks: tuple[int, ...]) -> None:
    """Bring the checkpoint that DEST has published back, verified, to empty paths; train --resume goes on from it."""
    from .checkpoint_transfer import pull as run

    with _bar("pull") as progress:
        done = run(dest, directory, ssd, ranks=ranks or None, progress=progress)
    _say(done, "pulled")


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False))
@click.option("--epoch", type=click.IntRange(0), default=None, help="The checkpoint to look at; the newest if left out.")
@click.option("--verify", is_flag=True, help="Check every record of every kept checkpoint.")
@typed_errors
def inspect(paths: tuple[str, ...], **o: Any) -> None:
    """Print what the volume in PATHS (the folders rank_N of one rank, in the job's order) holds. Changes nothing."""
    from . import volume_report

    with _bar("read") as progress:
        report = volume_report.look(paths, epoch=o["epoch"], verify=o["verify"], progress=progress)
    volume_report.show(report)
    if report.damage_count:
        raise Failed(f"{report.damage_count} damaged places; restore the volume from a copy (mtrains checkpoint pull)")
