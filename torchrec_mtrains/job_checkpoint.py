"""Checkpoints of the main job: ``torch.distributed.checkpoint`` of everything that training depends on, committed atomically.

``DIR/step_<n>`` holds the model, the tables' and the dense optimizer's state, and ``job.json`` with the number of trained
batches. It is written as ``step_<n>.tmp``, synced and renamed; then ``LATEST``, a file with that name, is replaced in the
same way. A reader believes ``LATEST`` alone, so a job killed at any instant leaves the checkpoint before, or the new one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from .errors import ConfigurationError, VolumeIoError, VolumeMismatchError

LATEST = "LATEST"
KEEP_CHECKPOINTS = 2
FORMAT = 1


def _state(dmp: DistributedModelParallel, dense: KeyedOptimizer) -> dict[str, Any]:
    """Tensors alone: what is not a tensor (learning rates, names) comes from the job's options."""
    return {
        "model": dmp.state_dict(),
        "tables_optimizer": dmp.fused_optimizer.state_dict()["state"],
        "dense_optimizer": dense.state_dict()["state"],
        "rng": {"torch": torch.get_rng_state()},
    }


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _commit(temporary: Path, final: Path) -> None:
    """Make a written folder the latest checkpoint, for good."""
    for path in temporary.rglob("*"):
        _sync(path)
    _sync(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    pointer = final.parent / f"{LATEST}.tmp"
    pointer.write_text(final.name + "\n")
    _sync(pointer)
    pointer.rename(final.parent / LATEST)
    _sync(final.parent)


def _forget_old(directory: Path, latest: str) -> None:
    kept = sorted(p for p in directory.glob("step_*") if p.is_dir() and not p.name.endswith(".tmp"))
    for path in kept[:-KEEP_CHECKPOINTS]:
        if path.name != latest:
            shutil.rmtree(path)


def _agree(error: OSError | None, what: str, directory: Path) -> None:
    """Every rank learns of one rank's failure and raises, instead of waiting in the next collective."""
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else f"{error.strerror or error}")
    failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
    if failed:
        rank, message = failed[0]
        raise VolumeIoError(
            f"checkpoint {directory}: could not {what} on rank {rank}: {message}. The checkpoint before is untouched; make "
            "room or name another folder with --checkpoint"
        ) from error


def _attempt(what: str, directory: Path, action: Any) -> None:
    """Run ``action`` on every rank; raise on all if it failed on one."""
    error: OSError | None = None
    try:
        action()
    except OSError as e:
        error = e
    _agree(error, what, directory)


def save(dmp: DistributedModelParallel, dense: KeyedOptimizer, directory: str, trained: int) -> None:
    """Commit a checkpoint after ``trained`` batches. Called on every rank.

    Raises: VolumeIoError when the file system refuses; the checkpoint before is still there.
    """
    root = Path(directory)
    final = root / f"step_{trained:012d}"
    temporary = root / f"{final.name}.tmp"
    first = dist.get_rank() == 0

    def prepare() -> None:
        if first:
            root.mkdir(parents=True, exist_ok=True)
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir()

    def commit() -> None:
        if first:
            (temporary / "job.json").write_text(json.dumps({"format": FORMAT, "trained": trained}) + "\n")
            _commit(temporary, final)
            _forget_old(root, final.name)

    _attempt("make the folder", root, prepare)
    try:
        dcp.save(_state(dmp, dense), checkpoint_id=temporary)
    except dcp.api.CheckpointException as e:
        rank, (cause, _) = next(iter(e.failures.items()))
        if not isinstance(cause, OSError):
            raise
        raise VolumeIoError(
            f"checkpoint {root}: could not write on rank {rank}: {cause.strerror or cause}. The checkpoint before is "
            "untouched; make room or name another folder with --checkpoint"
        ) from e
    _attempt("commit", root, commit)


def load(dmp: DistributedModelParallel, dense: KeyedOptimizer, directory: str) -> int:
    """Load the latest checkpoint into the model and its optimizers, and return how many batches it has trained.

    Raises: ConfigurationError when there is none; VolumeMismatchError when it belongs to another model.
    """
    root = Path(directory)
    try:
        folder = root / (root / LATEST).read_text().strip()
        about = json.loads((folder / "job.json").read_text())
    except (OSError, ValueError) as e:
        raise ConfigurationError(
            f"checkpoint {root}: nothing to resume from ({e}); start without --resume, or name the right folder"
        ) from e
    if about.get("format") != FORMAT:
        raise VolumeMismatchError(f"checkpoint {folder}: format {about.get('format')} is not {FORMAT}")
    state = _state(dmp, dense)
    try:
        dcp.load(state, checkpoint_id=folder)
    except dcp.api.CheckpointException as e:
        rank, (cause, _) = next(iter(e.failures.items()))
        raise VolumeMismatchError(
            f"checkpoint {folder} does not fit this model (rank {rank}): {cause}. Tables, dimensions and optimizer must "
            "be those of the job that wrote it"
        ) from e
    dmp.load_state_dict(state["model"])
    torch.set_rng_state(state["rng"]["torch"])
    return int(about["trained"])
