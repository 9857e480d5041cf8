"""Checkpoints of a job: tables on an SSD commit in place, everything else goes through ``torch.distributed.checkpoint``.

A checkpoint of step N is made in three stages, each on every rank, and a failure of one rank fails it on all:

1. *Folder.* Rank 0 makes ``DIR/step_N``.
2. *Prepare.* Every rank flushes its pools and commits epoch N in its volumes; then ``torch.distributed.checkpoint`` writes
   dense parameters, stock tables, tiered tables whose home does not outlive the process, optimizer states and every rank's
   RNG state into the folder. Beside it goes which rows are in the slot pools (``warm_restart``). ``about.json`` says which
   volumes belong to the checkpoint, and names this commit as no other is named.
3. *Commit.* All of that is synced; then ``DIR/LATEST``, which names the folder, is replaced by write-aside, fsync and rename.

``LATEST`` alone decides what opens. A job killed at any instant leaves the checkpoint before, whose epoch the volumes still
keep, or the new one. What is loaded is therefore one step of the whole job, on every rank.

Hyperparameters (learning rates, schedules) are the program's, as in TorchRec's keyed optimizers; what else a program wants
back travels in ``extra_state``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from . import warm_restart
from .checkpoint_folder import about_of_latest, commit_folder, latest_step, name_of
from .errors import ConfigurationError, MTrainsError, UnsupportedError, VolumeIoError, VolumeMismatchError
from .groups import tiered_groups
from .kernels import durability
from .kernels.tiered_tbe import TieredTBE


@dataclass(frozen=True)
class Checkpoint:
    """What a loaded checkpoint was saved with, and how many rows this rank read back into its slot pools."""

    step: int
    extra_state: Any
    warm_rows: int = 0


def save_checkpoint(
    dmp: DistributedModelParallel,
    directory: str | os.PathLike[str],
    *,
    step: int,
    dense_optimizer: Optimizer | None = None,
    extra_state: Any = None,
    keep_checkpoints: int = 2,
) -> None:
    """Commit a checkpoint of the whole job. Called on every rank, between steps, with the same arguments.

    ``step``: number of trained batches, above that of the checkpoint before. ``extra_state``: anything JSON holds.
    ``keep_checkpoints``: so many folders of torch.distributed.checkpoint are kept.

    Raises, on every rank: VolumeFullError, VolumeIoError (the checkpoint before is untouched); ConfigurationError;
    UnsupportedError for a model whose ``state_dict`` holds something else than tensors.
    """
    root = Path(directory)
    folder = root / name_of(step)
    groups = tiered_groups(dmp)
    state = _state(dmp, dense_optimizer, groups)
    first = dist.get_rank() == 0

    def prepare_folder() -> None:
        _check(root, step, keep_checkpoints, state)
        if first:
            root.mkdir(parents=True, exist_ok=True)
            if folder.exists():
                shutil.rmtree(folder)  # left behind by a job that was killed before its commit
            folder.mkdir()

    _together("make the folder", root, prepare_folder)

    def prepare_volumes() -> None:
        durability.checkpoint(groups, step)
        warm_restart.write(warm_restart.file_of(folder, dist.get_rank()), groups)

    _together("commit the volumes", root, prepare_volumes)
    _dcp("write", root, lambda: dcp.save(state, checkpoint_id=folder))
    homes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(homes, _homes(groups))

    def commit() -> None:
        if first:
            commit_folder(folder, step, homes, extra_state, keep_checkpoints)

    _together("commit", root, commit)


def load_checkpoint(
    dmp: DistributedModelParallel,
    directory: str | os.PathLike[str],
    *,
    dense_optimizer: Optimizer | None = None,
    warm: bool = True,
) -> Checkpoint:
    """Take the whole job back to the last committed checkpoint. Called on every rank, before the first step or between steps.

    ``warm``: read the rows that were in the slot pools back into them. No bit depends on it.

    Raises, on every rank: ConfigurationError when there is none; VolumeMismatchError when it belongs to another model, another
    number of ranks or other volumes; DamagedRecordError.
    """
    root = Path(directory)
    groups = tiered_groups(dmp)
    found: list[tuple[Path, dict[str, Any]]] = []

    def find() -> None:
        found.append(about_of_latest(root))
        folder, about = found[0]
        if about["world_size"] != dist.get_world_size():
            raise VolumeMismatchError(
                f"checkpoint {folder} was saved by {about['world_size']} ranks, this job has {dist.get_world_size()}; start as many"
            )
        asked, opened = about["homes"][dist.get_rank()], _homes(groups)
        if asked != opened:
            raise VolumeMismatchError(
                f"checkpoint {folder}: volumes and their tables were {asked}, this job has opened {opened}; name the same SSD paths, plan "
                "the same tables for them as the job that saved it, and close an earlier job of this process first"
            )
        durability.restore(groups, about["step"])

    _together("open", root, find)
    folder, about = found[0]
    if isinstance(dense_optimizer, KeyedOptimizer) and not all(dense_optimizer.state.get(p) for p in dense_optimizer.params.values()):
        dense_optimizer.init_state()  # what it does to parameters is overwritten below
    state = _state(dmp, dense_optimizer, groups)
    _dcp("load", root, lambda: dcp.load(state, checkpoint_id=folder))
    if dense_optimizer is not None:
        dense_optimizer.zero_grad()
    torch.set_rng_state(state["rng"][str(dist.get_rank())])
    if "device_rng" in state:
        torch.cuda.set_rng_state(state["device_rng"][str(dist.get_rank())], dmp.device)
    for i, group in enumerate(groups):
        if group.counts_steps:
            group.set_optimizer_steps(int(state["optimizer_steps"][_steps_key(i)]))
    warmed: list[int] = [0]

    def fill_pools() -> None:
        warmed[0] = warm_restart.warm(warm_restart.file_of(folder, dist.get_rank()), groups)

    if warm:
        _together("fill the slot pools", root, fill_pools)
    return Checkpoint(int(about["step"]), about["extra_state"], warmed[0])


def wants_checkpoint(dmp: DistributedModelParallel) -> bool:
    """Whether an SSD volume of any rank is short of room that a checkpoint would give back: commit one before the next step.

    Called on every rank, between steps; every rank gets the same answer.
    """
    wish = durability.wants_checkpoint(tiered_groups(dmp))
    if dist.get_world_size() == 1:
        return wish
    wishes = torch.tensor([int(wish)], device=dmp.device)
    dist.all_reduce(wishes, dist.ReduceOp.MAX)
    return bool(wishes.item())


def trickle(dmp: DistributedModelParallel, *, steps_left: int) -> int:
    """Write a part of the changed rows ahead of the checkpoint that is due in ``steps_left`` steps, so that it is short.

    Called after every step, on every rank or some; it does something in the last few steps before the checkpoint alone. No bit
    depends on it. Returns the rows written by this rank. Raises: VolumeFullError, VolumeIoError.
    """
    return durability.trickle(tiered_groups(dmp), steps_left)


def _homes(groups: Sequence[TieredTBE]) -> dict[str, list[str]]:
    """The names of the tables in every durable volume of this rank, by the volume's id."""
    names: dict[str, list[str]] = {volume.id: [] for volume in durability.volumes(groups)}
    for group in groups:
        for i, table in enumerate(group._home_tables):
            if group.durable(i):
                names[table.volume.id].append(table.name)
    return {volume: sorted(tables) for volume, tables in names.items()}


# -- what goes through torch.distributed.checkpoint


def _state(dmp: DistributedModelParallel, dense: Optimizer | None, groups: Sequence[TieredTBE]) -> dict[str, Any]:
    """Tensors that alias the job's own, so that loading in place loads the job. Without the tables that commit in place."""
    durable = tuple(f".{t.name}.weight" for g in groups for i, t in enumerate(g.tables) if g.durable(i))

    def others(entries: Any) -> dict[str, Any]:
        return {key: value for key, value in entries.items() if not f".{key}".endswith(durable)} if durable else dict(entries)

    device = dmp.device if dmp.device.type == "cuda" else None
    parts = {
        "model": others(dmp.state_dict()),
        "fused_optimizer": others(dmp.fused_optimizer.state_dict()["state"]),
        "dense_optimizer": {} if dense is None else {str(key): value for key, value in dense.state_dict()["state"].items()},
        "rng": {str(dist.get_rank()): torch.get_rng_state()},
        "device_rng": {} if device is None else {str(dist.get_rank()): torch.cuda.get_rng_state(device)},
        "optimizer_steps": {_steps_key(i): torch.tensor([g.optimizer_steps]) for i, g in enumerate(groups) if g.counts_steps},
    }
    # What is empty on this rank may not be on others, and then an empty dict cannot be loaded.
    return {name: part for name, part in parts.items() if part}


def _steps_key(group: int) -> str:
    return f"{dist.get_rank()}.{group}"


def _check(root: Path, step: int, keep_checkpoints: int, state: dict[str, Any]) -> None:
    if keep_checkpoints < 1:
        raise ConfigurationError(f"keep_checkpoints must be at least 1, got {keep_checkpoints}")
    before = latest_step(root)
    if step < 0 or (before is not None and step <= before):
        raise ConfigurationError(
            f"checkpoint {root} already holds step {before}, so step must be above it, got {step}; load it first, or name another folder"
        )
    strange = [key for key, value in state["model"].items() if not isinstance(value, (torch.Tensor, ShardedTensor, DTensor))]
    if strange:
        raise UnsupportedError(f"checkpoint {root}: the model's state_dict holds more than tensors: {strange}; keep that in extra_state")


# -- ranks


def _together(what: str, root: Path, action: Callable[[], None]) -> None:
    """Run ``action`` on every rank. One rank's failure is raised on all, instead of leaving the others in the next collective."""
    error: MTrainsError | None = None
    try:
        action()
    except MTrainsError as e:
        error = e
    except OSError as e:
        error = VolumeIoError(
            f"checkpoint {root}: could not {what}: {e.strerror or e}; the checkpoint before is untouched. Make room or name another folder"
        )
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else (type(error), str(error)))
    for rank, failure in enumerate(errors):
        if failure is not None:
            if rank == dist.get_rank() and error is not None:
                raise error
            kind, message = failure
            raise kind(f"rank {rank}: {message}") from error


@contextlib.contextmanager
def _as_typed(what: str, root: Path) -> Any:
    try:
        yield
    except CheckpointException as e:
        rank, (cause, _) = next(iter(e.failures.items()))
        if isinstance(cause, MTrainsError):
            raise type(cause)(f"rank {rank}: {cause}") from e
        if isinstance(cause, OSError):
            raise VolumeIoError(
                f"checkpoint {root}: could not {what} on rank {rank}: {cause.strerror or cause}; the checkpoint before is untouched. "
                "Make room or name another folder"
            ) from e
        if what == "load":
            raise VolumeMismatchError(
                f"checkpoint {root} does not fit this model (rank {rank}): {cause}. Tables, dimensions and optimizers must be those of "
                "the job that saved it"
            ) from e
        raise


def _dcp(what: str, root: Path, action: Callable[[], Any]) -> None:
    with _as_typed(what, root):
        action()
