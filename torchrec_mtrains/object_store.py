"""The far side of ``mtrains checkpoint push|pull``: a folder of immutable files, each named by its own content.

    DEST/objects/ab/cdef…           BLAKE2b-256 of the content, in hexadecimal: the first two digits name a folder
    DEST/checkpoints/NAME/REF       one line: the digest of an object, a catalogue in JSON
    DEST/LATEST                     one line: the NAME of the checkpoint that a pull takes

Every file is written aside, synced and renamed, so what has its final name is whole. An object is never written twice; whatever
reads one verifies it. What an interrupted push leaves behind are objects that no catalogue names: the next push finds them.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from .errors import ConfigurationError, DamagedRecordError

LATEST = "LATEST"


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
        path = self.root / "checkpoints" / name / ref
        what = f"checkpoint {name} in {self.root}, catalogue {ref}"
        digest = path.read_text().strip() if path.exists() else ""
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise DamagedRecordError(f"{what}: {path} is missing or damaged. Push the checkpoint again")
        return json.loads(self.get(digest, what))

    def publish(self, name: str) -> None:
        """Make a checkpoint the one that a pull takes."""
        write_whole(self.root / LATEST, name.encode() + b"\n")
        sync_folder(self.root)

    def latest(self) -> str | None:
        """The name of the checkpoint that a pull takes, if there is one. Raises: ConfigurationError when it cannot be one."""
        path = self.root / LATEST
        if not path.exists():
            return None
        name = path.read_text().strip()
        if not name or "/" in name or not (self.root / "checkpoints" / name).is_dir():
            raise ConfigurationError(f"{path} names {name!r}, which is no checkpoint in {self.root}; push one")
        return name
