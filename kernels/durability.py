"""Checkpoints of tiered groups in place: the volumes of all groups of a rank commit one epoch, or go back to one.

Groups share volumes, so every pool is flushed before the first volume commits, and every volume commits once.
"""

from __future__ import annotations

from collections.abc import Sequence

from .homes import close_homes
from .tiered_tbe import TieredTBE
from .volumes import SsdVolume


def volumes(groups: Sequence[TieredTBE]) -> list[SsdVolume]:
    """The volumes below the groups that outlive the process, each once, in a stable order."""
    return list({id(v): v for g in groups for v in g.durable_volumes()}.values())


def checkpoint(groups: Sequence[TieredTBE], epoch: int) -> None:
    """Makes every row of the durable tables durable under ``epoch``.

    Raises: VolumeFullError, VolumeIoError; the epochs before are untouched.
    """
    for group in groups:
        group.flush()
    for volume in volumes(groups):
        volume.checkpoint(epoch)


def withdraw(groups: Sequence[TieredTBE], epoch: int) -> None:
    """Takes back ``epoch`` in every volume that has committed it: the job as a whole did not."""
    for volume in volumes(groups):
        if volume.epoch == epoch:
            volume.withdraw(epoch)


def restore(groups: Sequence[TieredTBE], epoch: int) -> None:
    """Takes the durable tables back to a kept epoch. Pools are emptied, unwritten.

    Raises: VolumeError when a volume does not keep that epoch; TicketError while forward passes await their backward.
    """
    for group in groups:
        group.forget()
    for volume in volumes(groups):
        volume.restore(epoch)


def close(groups: Sequence[TieredTBE]) -> None:
    """Ends the groups' life on their SSDs: closes the volumes, which another job, or this one resumed, may then open.

    Rows of the last epoch stay; what came after it is lost.
    """
    close_homes(volumes(groups))
