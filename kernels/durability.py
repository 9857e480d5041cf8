"""Checkpoints of tiered groups in place: the volumes of all groups of a rank commit one epoch, or go back to one.

Groups share volumes, so every pool is flushed before the first volume commits, and every volume commits once.
"""

from __future__ import annotations

from collections.abc import Sequence

from .homes import close_homes
from .tiered_tbe import TieredTBE
from .volumes import PmemVolume, SsdVolume


def volumes(groups: Sequence[TieredTBE]) -> list[SsdVolume | PmemVolume]:
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


def wants_checkpoint(groups: Sequence[TieredTBE]) -> bool:
    """Whether a volume of this rank is short of room that a checkpoint would give back."""
    return any(volume.wants_checkpoint for volume in volumes(groups))


TRICKLE_STEPS = 8
"""Steps before a commit in which rows trickle out: the pools are gone over twice."""

TRICKLE_MIN_AGE = 2
"""Batches for which a row must have gone unused: a row that the next batch changes is written again by the commit."""


def trickle(groups: Sequence[TieredTBE], steps_left: int) -> int:
    """A step's part of what the commit would have to write, ``steps_left`` steps before it. Returns the rows handed down.

    Raises: VolumeFullError, VolumeIoError.
    """
    if not 0 < steps_left <= TRICKLE_STEPS:
        return 0
    return sum(group.trickle(TRICKLE_MIN_AGE, 2 / TRICKLE_STEPS) for group in groups)


def restore(groups: Sequence[TieredTBE], epoch: int) -> None:
    """Takes the durable tables back to a kept epoch. Pools and caches are emptied, unwritten.

    Raises: VolumeError when a volume does not keep that epoch; TicketError while forward passes await their backward.
    """
    for group in groups:
        group.forget()
    for volume in volumes(groups):
        volume.restore(epoch)


def close(groups: Sequence[TieredTBE]) -> None:
    """Ends the groups' life on their devices: closes caches and volumes, which another job, or this one resumed, may then open.

    Rows of the last epoch stay; what came after it is lost.
    """
    for group in groups:
        group.close_caches()
    close_homes(volumes(groups))
