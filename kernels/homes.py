"""The homes of a process: tables whose chains end in the same paths share one volume per rank."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from pathlib import Path

from .. import errors
from ..tiers import DdrHome, Home, PmemHome, SsdHome
from .deferred_init import UniformInit
from .volumes import MemoryVolume, PmemVolume, SsdVolume, VolumeTable

_open: weakref.WeakValueDictionary[tuple[str, tuple[str, ...], int], SharedVolume] = weakref.WeakValueDictionary()


class SharedVolume:
    """One open volume, the capacity it was asked for with, and how often each table name was taken.

    A volume that holds checkpoints of an earlier job refuses reads and writes until it is restored to one of them: a new
    job would otherwise train on, or over, rows that are not its own.
    """

    def __init__(self, home: SsdHome | PmemHome, rank: int) -> None:
        medium, device = ("PMem", "DAX, CXL or tmpfs mount") if isinstance(home, PmemHome) else ("SSD", "NVMe device")
        folders = []
        for path in home.paths:
            if not Path(path).is_dir():
                raise errors.VolumeIoError(
                    f"{medium} path {path!r} is not a folder; create it first, on the {device} that should hold the tables"
                )
            folder = Path(path) / f"rank_{rank}"
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
            except OSError as e:
                raise errors.VolumeIoError(
                    f"{medium} path {path!r}: cannot create {folder.name}/ in it: {os.strerror(e.errno or 0)}; "
                    "make it writable or name another path"
                ) from e
            folders.append(str(folder))
        self.capacity_bytes = home.capacity_bytes
        engine: type[SsdVolume] | type[PmemVolume] = PmemVolume if isinstance(home, PmemHome) else SsdVolume
        self.volume = engine(paths=tuple(folders), capacity_bytes=home.capacity_bytes)
        self.names: dict[str, int] = {}
        if self.volume.epochs:
            self.volume._native.await_restore()


def open_home(home: Home, rank: int) -> SharedVolume | MemoryVolume:
    """The volume behind a home on this rank: one that outlives the process is shared by every table that names its paths.

    Raises: ConfigurationError when the same paths were opened with another capacity; VolumeIoError for a path that is
    missing or not writable.
    """
    if isinstance(home, DdrHome):
        return MemoryVolume()
    key = (type(home).__name__, tuple(os.path.realpath(p) for p in home.paths), rank)
    found = _open.get(key)
    if found is None:
        found = SharedVolume(home, rank)
        _open[key] = found
    elif found.capacity_bytes != home.capacity_bytes:
        raise errors.ConfigurationError(
            f"paths {home.paths} are already open with capacity_bytes={found.capacity_bytes}, this chain asks for "
            f"{home.capacity_bytes}; tables on the same paths share one volume, so give them one capacity"
        )
    return found


def volume_of(home: SharedVolume | MemoryVolume) -> SsdVolume | PmemVolume | MemoryVolume:
    """The volume itself."""
    return home if isinstance(home, MemoryVolume) else home.volume


def open_table(home: SharedVolume | MemoryVolume, name: str, row_count: int, record_bytes: int, init: UniformInit | None) -> VolumeTable:
    """A table of its own in a home; a second one of the same name gets a numbered name."""
    if isinstance(home, MemoryVolume):
        return home.table(name, row_count=row_count, record_bytes=record_bytes, init=init)
    taken = home.names.get(name, 0)
    home.names[name] = taken + 1
    own = f"{name}#{taken}" if taken else name
    return home.volume.table(own, row_count=row_count, record_bytes=record_bytes, init=init)


def close_homes(volumes: Iterable[SsdVolume | PmemVolume]) -> None:
    """Closes volumes, so that their paths can be opened anew; tables that are still alive above them can do nothing any more."""
    closing = {id(volume) for volume in volumes}
    for key, home in list(_open.items()):
        if id(home.volume) in closing:
            del _open[key]
            home.volume.close()
