"""The files of a volume, as they lie below its paths: for whoever inspects or ships them while no volume is open, or beside one.

The layout is that of ``volume_folder.h``; manifests are read by the volume's own parser.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigurationError, VolumeIoError, VolumeLockedError
from .kernels import _core

LOCK = "volume.lock"


@dataclass(frozen=True)
class Segment:
    """What a checkpoint keeps of one segment: its first ``bytes``, header and blocks."""

    number: int
    path_index: int
    block_bytes: int
    blocks: int
    records: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """One committed checkpoint of a volume: ``data`` is the file, ``snapshot`` the epoch of its index snapshot, or None."""

    volume: str
    epoch: int
    segment_bytes: int
    snapshot: int | None
    path_count: int
    tables: tuple[dict[str, Any], ...]
    segments: tuple[Segment, ...]
    data: bytes


def manifest_file(folder: Path, epoch: int) -> Path:
    """Below a volume's first path."""
    return folder / f"manifest_{epoch:016x}.bin"


def segment_file(folder: Path, number: int) -> Path:
    """Below the path that the segment's index names."""
    return folder / f"segment_{number:08x}.log"


def snapshot_file(folder: Path, epoch: int) -> Path:
    """Below a volume's first path: the index snapshot that manifests name."""
    return folder / f"index_{epoch:016x}.bin"


def epochs(folder: Path) -> list[int]:
    """Of the checkpoints whose manifests lie in a volume's first folder, oldest first."""
    return sorted(int(p.stem.removeprefix("manifest_"), 16) for p in folder.glob("manifest_" + "[0-9a-f]" * 16 + ".bin"))


def decode_manifest(data: bytes, file: str) -> Manifest:
    """Raises: DamagedRecordError, VolumeMismatchError for another format."""
    d = _core.decode_manifest(data, file)
    return Manifest(
        d["volume"],
        d["epoch"],
        d["segment_bytes"],
        d["snapshot"] or None,
        d["path_count"],
        tuple(d["tables"]),
        tuple(Segment(**s) for s in d["segments"]),
        data,
    )


def read_manifest(folder: Path, epoch: int) -> Manifest:
    """Raises: DamagedRecordError, VolumeMismatchError; FileNotFoundError when the epoch is not kept."""
    path = manifest_file(folder, epoch)
    return decode_manifest(path.read_bytes(), str(path))


def has_volume(folder: Path) -> bool:
    """Whether a committed checkpoint lies in it. Segments alone are a job's that never committed."""
    return folder.is_dir() and bool(epochs(folder))


@dataclass(frozen=True)
class LocalVolume:
    """A volume found below its paths; ``folders`` are by path index, ``paths`` what they lie in."""

    folders: tuple[Path, ...]
    paths: tuple[str, ...]
    newest: Manifest

    def segment(self, segment: Segment) -> Path:
        """Where a segment lies."""
        return segment_file(self.folders[segment.path_index], segment.number)


def volumes_of_rank(paths: Sequence[str], rank: int) -> list[LocalVolume]:
    """The volumes of one rank over ``paths``, which are in the job's order: a volume takes as many as it is striped over.

    Raises: ConfigurationError when the paths hold no volume of the rank, or only a part of one.
    """
    folders = [Path(p) / f"rank_{rank}" for p in paths]
    found, at = [], 0
    while at < len(folders):
        if not has_volume(folders[at]):
            raise ConfigurationError(
                f"{folders[at]} holds no committed checkpoint of a volume; give the job's SSD paths, all of them and in its order"
            )
        newest = read_manifest(folders[at], epochs(folders[at])[-1])
        mine = slice(at, at + newest.path_count)
        if len(folders[mine]) < newest.path_count:
            raise ConfigurationError(
                f"the volume in {folders[at]} lies over {newest.path_count} paths, only {len(folders[mine])} of them are given; "
                "give the job's SSD paths, all of them and in its order"
            )
        found.append(LocalVolume(tuple(folders[mine]), tuple(paths[mine]), newest))
        at += newest.path_count
    return found


def lock_owner(folder: Path) -> str | None:
    """Who has the volume in a folder open for writing, or None. Takes no lock itself: an opener is never in the way of another."""
    path = folder / LOCK
    try:
        info = path.stat()
        held = Path("/proc/locks").read_text().splitlines()
    except FileNotFoundError:
        return None
    place = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
    if any(" FLOCK " in line and place in line.split() for line in held):
        return path.read_text().strip() or "an unknown process"
    return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, as one who writes a volume there.

    Raises: VolumeLockedError while another has it open; VolumeIoError.
    """
    path = folder / LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise VolumeIoError(f"cannot open {path}: {e.strerror}") from e
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 128, 0).decode(errors="replace")
            raise VolumeLockedError(
                f"the volume in {folder} is open for writing by {owner}: one writer at a time. Close it there, or name another path"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(handle)
