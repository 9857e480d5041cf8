"""The folder of a job's checkpoints: one folder a step, and LATEST, which alone decides what opens.

DIR/LATEST                 one line: the name of the step's folder
DIR/step_N/about.json      format, commit (a name that no other commit has), step, world size, homes (by rank: the tables of
                           every durable volume, by the volume's id), extra_state
DIR/step_N/…               what torch.distributed.checkpoint wrote, and which rows were in the slot pools
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .errors import ConfigurationError, VolumeMismatchError

LATEST = "LATEST"
ABOUT = "about.json"
FORMAT = 2


def name_of(step: int) -> str:
    """Of a step's folder."""
    return f"step_{step:012d}"


def about_of_latest(root: Path) -> tuple[Path, dict[str, Any]]:
    """The folder that LATEST names, and its about.json.

    Raises: ConfigurationError when there is none; VolumeMismatchError for another format.
    """
    try:
        folder = root / (root / LATEST).read_text().strip()
        about = json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError) as e:
        raise ConfigurationError(
            f"checkpoint {root}: nothing to resume from ({e}): name the folder that the job was given as --checkpoint, or begin "
            "without resuming"
        ) from e
    if about.get("format") != FORMAT:
        raise VolumeMismatchError(f"checkpoint {folder}: format {about.get('format')} is not {FORMAT}, the one that this version reads")
    return folder, about


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """The step of the last committed checkpoint in a folder, if there is one."""
    root = Path(directory)
    return int(about_of_latest(root)[1]["step"]) if (root / LATEST).exists() else None


def commit_folder(folder: Path, step: int, homes: list[Any], extra_state: Any, keep_checkpoints: int) -> None:
    """Make a folder whose files are written the latest checkpoint, and remove old ones. Raises: OSError."""
    about = {
        "format": FORMAT,
        "commit": uuid.uuid4().hex,
        "step": step,
        "world_size": len(homes),
        "homes": homes,
        "extra_state": extra_state,
    }
    (folder / ABOUT).write_text(json.dumps(about) + "\n")
    sync((*folder.rglob("*"), folder, folder.parent))
    publish(folder)
    older = sorted(path for path in folder.parent.glob("step_*") if path < folder)
    for path in older[: max(0, len(older) - keep_checkpoints + 1)]:
        shutil.rmtree(path)


def publish(folder: Path) -> None:
    """Point LATEST at a folder that is durable. Raises: OSError."""
    latest = folder.with_name(LATEST)
    aside = latest.with_name(LATEST + ".tmp")
    aside.write_text(folder.name + "\n")
    sync([aside])
    aside.rename(latest)
    sync([latest.parent])


def sync(paths: Iterable[Path]) -> None:
    """Make files and folders durable, side by side: a journal commits for all of them at once. Raises: OSError."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_sync_one, paths))


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
