"""The far side of ``mtrains checkpoint push|pull``: a folder of immutable files, each named by its own content.

    DEST/objects/ab/cdef…           BLAKE2b-256 of the content, in hexadecimal: the first two digits name a folder
    DEST/checkpoints/NAME/REF       one line: the digest of an object, a catalogue in JSON
    DEST/LATEST                     the NAMEs of the published checkpoints that are kept, newest first; a pull takes the first
    DEST/in_use.lock                locked, shared, by every push and pull; alone by the push that removes objects

Every file is written aside, synced and renamed, so what has its final name is whole. An object is never written twice; whatever
reads one verifies it. What an interrupted push leaves behind are objects that no catalogue names: the next push finds them, or
removes them. Removal goes from the outside in, so that what is there is always whole: a checkpoint leaves LATEST, then its catalogues
go, then the objects that no catalogue names any more.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ConfigurationError, DamagedRecordError

LATEST = "LATEST"
LOCK = "in_use.lock"


def digest_of(data: bytes | memoryview) -> str:
    """The name of a content."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable. Raises: OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """A durable file that has its name only once it is whole; its folder is not synced. Raises: OSError."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


class ObjectStore:
    """One DEST. Raises of every method: OSError."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._unsynced: set[Path] = set()
        self._lock: int | None = None

    @contextmanager
    def in_use(self, *, writing: bool) -> Iterator[None]:
        """Nothing is removed by others meanwhile, on whatever host the file system's locks reach. A reader creates no file."""
        try:
            self._lock = os.open(self.root / LOCK, (os.O_RDWR | os.O_CREAT if writing else os.O_RDONLY) | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # nothing was ever pushed here, so nothing is removed
            yield
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_SH)
            yield
        finally:
            os.close(self._lock)
            self._lock = None

    # -- objects

    def _path(self, digest: str) -> Path:
        return self.root / "objects" / digest[:2] / digest[2:]

    def put(self, data: bytes | memoryview, digest: str) -> bool:
        """Keep a content. Returns whether it was new. One of another length under its name is damaged, and replaced."""
        path = self._path(digest)
        self._unsynced.add(path.parent)
        if path.exists() and path.stat().st_size == len(data):
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
        return True

    def get(self, digest: str, what: str) -> bytes:
        """A content, verified; ``what`` it is, for messages. Raises: DamagedRecordError when it is missing or another."""
        path = self._path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise DamagedRecordError(f"{what}: object {path} is missing. Push the checkpoint again, or pull another copy") from None
        if digest_of(data) != digest:
            raise DamagedRecordError(
                f"{what}: object {path} is damaged: its {len(data)} bytes have another digest than its name. "
                "Remove it and push the checkpoint again, or pull another copy"
            )
        return data

    # -- checkpoints

    def commit(self, name: str, ref: str, catalogue: dict[str, Any]) -> None:
        """Keep a catalogue under a checkpoint's name, after everything put so far is durable."""
        data = json.dumps(catalogue).encode()
        digest = digest_of(data)
        self.put(data, digest)
        for folder in self._unsynced:
            sync_folder(folder)
        for folder in (self.root / "objects", self.root):
            sync_folder(folder)
        self._unsynced.clear()
        folder = self.root / "checkpoints" / name
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ref, digest.encode() + b"\n")
        for path in (folder, folder.parent, self.root):
            sync_folder(path)

    def refs(self, name: str) -> set[str]:
        """The catalogues that a checkpoint has."""
        folder = self.root / "checkpoints" / name
        return {p.name for p in folder.iterdir() if p.suffix != ".tmp"} if folder.is_dir() else set()

    def catalogue(self, name: str, ref: str) -> dict[str, Any]:
        """A catalogue. Raises: DamagedRecordError."""
        return json.loads(self.get(self.catalogue_digest(name, ref), f"checkpoint {name} in {self.root}, catalogue {ref}"))

    def publish(self, name: str, keep: int) -> None:
        """Make a checkpoint the one that a pull takes, and of those before it keep so many that there are ``keep``; 0: all."""
        path = self.root / LATEST
        before = path.read_text(errors="replace").split() if path.exists() else []
        names = [name, *(n for n in before if n != name and self._has(n))]
        write_whole(path, "".join(f"{n}\n" for n in names[: keep or None]).encode())
        sync_folder(self.root)

    def published(self) -> list[str]:
        """The names of the checkpoints that LATEST keeps, newest first. Raises: ConfigurationError when one cannot be."""
        path = self.root / LATEST
        if not path.exists():
            return []
        names = path.read_text(errors="replace").splitlines() or [""]
        for name in names:
            if not self._has(name):
                raise ConfigurationError(f"{path} names {name!r}, which is no checkpoint in {self.root}; push one")
        return names

    def _has(self, name: str) -> bool:
        return name != "" and "/" not in name and (self.root / "checkpoints" / name).is_dir()

    def latest(self) -> str | None:
        """The name of the checkpoint that a pull takes, if there is one. Raises: ConfigurationError when it cannot be one."""
        return next(iter(self.published()), None)

    def names(self) -> list[str]:
        """Of every checkpoint that has a catalogue, published or not."""
        folder = self.root / "checkpoints"
        return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []

    def catalogue_digest(self, name: str, ref: str) -> str:
        """The object that a catalogue is. Raises: DamagedRecordError."""
        path = self.root / "checkpoints" / name / ref
        digest = path.read_text(errors="replace").strip() if path.exists() else ""
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise DamagedRecordError(
                f"checkpoint {name} in {self.root}, catalogue {ref}: {path} is missing or damaged. Push the checkpoint again"
            )
        return digest

    # -- removal

    def is_alone(self) -> bool:
        """Whether no other push or pull is here; from then on until ``in_use`` ends none can begin."""
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def remove(self, names: Collection[str], keep: Collection[str]) -> int:
        """Remove checkpoints, then every object whose digest is not in ``keep``; returns their bytes. Only while alone."""
        for name in names:
            shutil.rmtree(self.root / "checkpoints" / name)
        sync_folder(self.root / "checkpoints")
        removed = 0
        for folder in (self.root / "objects").iterdir():
            for path in folder.iterdir():
                if f"{folder.name}{path.name}" not in keep:
                    removed += path.stat().st_size
                    path.unlink()
        return removed
