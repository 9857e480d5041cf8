"""``mtrains checkpoint push|pull``: a committed checkpoint goes to a folder far away, piece by piece, and comes back.

Segments are append-only: of one that was shipped before, only the new tail goes, as further *pieces*. A push reads again what
it has shipped, to see that it is the same, unless it can know: the checkpoint that was pushed last is still kept here, by its
folder and by the volumes, and what a kept checkpoint names does not change.

A push that publishes its checkpoint then removes those that are not kept any more, and what only they needed.

A push may run beside the job. If the job drops the checkpoint meanwhile, the push fails, and DEST stays what it was.

Catalogues (JSON) of the checkpoint ``step_N-<commit>``:
    job       about (about.json), files: {path: [piece, …]}
    rank_R    volumes: [{id, paths, manifest: piece, index: [piece, …], segments: {number: [piece, …]}}]
    piece     [bytes, digest]
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import volume_files
from .checkpoint_folder import ABOUT, LATEST, about_of_latest, name_of, publish, sync
from .errors import ConfigurationError, DamagedRecordError, VolumeFullError, VolumeIoError, VolumeMismatchError
from .object_store import ObjectStore, digest_of, sync_folder, write_whole
from .volume_files import LocalVolume, Manifest, Segment

PIECE_BYTES = 16 << 20
"""At most, of one object: a guess between the number of objects and what one retry costs."""

UNFINISHED = "pull.tmp"
"""Marks a folder whose segments belong to a pull that has not come to its end."""

Piece = list[Any]  # [bytes, digest]


@dataclass
class Transfer:
    """What a push or a pull did. ``moved_bytes`` crossed over; ``known_bytes`` were there already."""

    checkpoint: str
    ranks: list[int]
    moved_bytes: int = 0
    known_bytes: int = 0
    missing_ranks: tuple[int, ...] = ()
    removed: tuple[str, ...] = ()
    removed_bytes: int = 0
    not_removed: str = ""
    """Why a push has removed nothing, where it should have looked."""


Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


def _ignore(done: int, total: int) -> None:
    del done, total


@contextmanager
def _typed(what: str) -> Iterator[None]:
    try:
        yield
    except VolumeIoError:
        raise
    except OSError as e:
        kind = VolumeFullError if e.errno in (errno.ENOSPC, errno.EDQUOT) else VolumeIoError
        raise kind(f"{what}: {e.strerror or e}{f' ({e.filename})' if e.filename else ''}") from e


def name_of_checkpoint(about: dict[str, Any]) -> str:
    """At DEST: a step that was trained twice has two names."""
    return f"{name_of(about['step'])}-{about['commit']}"


# -- push


class _Push:
    def __init__(self, directory: Path, store: ObjectStore, progress: Progress, keep: int | None) -> None:
        self.directory, self.store, self.progress = directory, store, progress
        self.keep = _kept_here(directory) if keep is None else keep
        self.folder, self.about = about_of_latest(directory)
        self.name = name_of_checkpoint(self.about)
        self.result = Transfer(self.name, [])
        self.done, self.total = 0, 0
        try:
            self.before = store.latest()
        except ConfigurationError:  # what cannot be read is not built upon
            self.before = None

    def local_volumes(self, ssd: Sequence[str]) -> dict[int, list[LocalVolume]]:
        """The volumes of this host's ranks. Raises: VolumeMismatchError when they are not those of the checkpoint."""
        found = {}
        for rank, homes in enumerate(self.about["homes"]):
            if not homes or not ssd or not (Path(ssd[0]) / f"rank_{rank}").is_dir():
                continue
            found[rank] = volume_files.volumes_of_rank(ssd, rank)
            ids = sorted(v.newest.volume for v in found[rank])
            if ids != sorted(homes):
                raise VolumeMismatchError(
                    f"checkpoint {self.folder}: rank {rank} saved the volumes {sorted(homes)}, {list(ssd)} hold {ids}; give the SSD paths "
                    "of the job that saved it"
                )
        if not found and any(self.about["homes"]):
            raise ConfigurationError(
                f"checkpoint {self.folder}: {list(ssd)} hold volumes of none of its ranks; give the SSD paths of the job that saved it"
            )
        return found

    def manifest(self, volume: LocalVolume) -> Manifest:
        try:
            return volume_files.read_manifest(volume.folders[0], self.about["step"])
        except FileNotFoundError:
            raise VolumeMismatchError(
                f"the volume in {volume.folders[0]} does not keep epoch {self.about['step']} of checkpoint {self.folder}: the job went on. "
                "Push again"
            ) from None

    def count(self, more: int) -> None:
        self.done += more
        self.progress(self.done, self.total)

    def ship(self, data: bytes | memoryview) -> Piece:
        digest = digest_of(data)
        if self.store.put(data, digest):
            self.result.moved_bytes += len(data)
        else:
            self.result.known_bytes += len(data)
        self.count(len(data))
        return [len(data), digest]

    def known_pieces(self, rank: int) -> tuple[dict[str, dict[str, list[Piece]]], dict[str, str]]:
        """By volume id: the pieces of its segments at DEST; and the digest of the manifest that they were shipped for."""
        if self.before is None or f"rank_{rank}" not in self.store.refs(self.before):
            return {}, {}
        try:
            volumes = self.store.catalogue(self.before, f"rank_{rank}")["volumes"]
        except DamagedRecordError:  # everything is read and compared anew
            return {}, {}
        return {v["id"]: v["segments"] for v in volumes}, {v["id"]: v["manifest"][1] for v in volumes}

    def still_kept(self, volume: LocalVolume, manifest_digest: str | None) -> bool:
        """Whether the checkpoint that was pushed last is kept here: then its segments have not changed up to where it ends."""
        if self.before is None or manifest_digest is None:
            return False
        step, commit = self.before.removeprefix("step_").split("-")
        try:
            about = json.loads((self.directory / name_of(int(step)) / ABOUT).read_text())
            manifest = volume_files.manifest_file(volume.folders[0], int(step)).read_bytes()
        except FileNotFoundError:
            return False
        return about["commit"] == commit and digest_of(manifest) == manifest_digest

    def push_file(self, path: Path, end: int, known: Sequence[Piece] = (), trusted: bool = False) -> list[Piece]:
        """The pieces of a file up to ``end``: the known ones as long as they are its beginning, then new ones."""
        pieces: list[Piece] = []
        at = 0
        with open(path, "rb", buffering=0) as file:
            for size, digest in known:
                if at + size > end or not (trusted or digest_of(_read(file, path, size)) == digest):
                    break
                at += size
                pieces.append([size, digest])
                self.result.known_bytes += size
                self.count(size)
            file.seek(at)
            while at < end:
                size = min(PIECE_BYTES, end - at)
                pieces.append(self.ship(_read(file, path, size)))
                at += size
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return pieces

    def push_rank(self, rank: int, volumes: list[tuple[LocalVolume, Manifest]]) -> None:
        known, manifests = self.known_pieces(rank)
        catalogue = []
        for volume, manifest in volumes:
            trusted = self.still_kept(volume, manifests.get(manifest.volume))
            mine = known.get(manifest.volume, {})
            catalogue.append(
                {
                    "id": manifest.volume,
                    "paths": list(volume.paths),
                    "manifest": self.ship(manifest.data),
                    "index": [] if (file := _index_file(volume, manifest)) is None else self.push_file(file, file.stat().st_size),
                    "segments": {
                        str(s.number): self.push_file(volume.segment(s), s.bytes, mine.get(str(s.number), []), trusted)
                        for s in manifest.segments
                    },
                }
            )
        for volume, manifest in volumes:  # until here it was kept, so nothing that was read has changed
            if self.manifest(volume).data != manifest.data:
                raise VolumeMismatchError(f"the volume in {volume.folders[0]} was restored during the push; push again")
        self.store.commit(self.name, f"rank_{rank}", {"volumes": catalogue})
        self.result.ranks.append(rank)

    def run(self, ssd: Sequence[str]) -> Transfer:
        volumes = {rank: [(v, self.manifest(v)) for v in found] for rank, found in self.local_volumes(ssd).items()}
        files = sorted(p for p in self.folder.rglob("*") if p.is_file())
        self.total = sum(p.stat().st_size for p in files)
        for volume, manifest in (pair for found in volumes.values() for pair in found):
            index = _index_file(volume, manifest)
            self.total += len(manifest.data) + sum(s.bytes for s in manifest.segments) + (index.stat().st_size if index else 0)
        listed = {str(p.relative_to(self.folder)): self.push_file(p, p.stat().st_size) for p in files}
        for rank, found in volumes.items():
            self.push_rank(rank, found)
        if _commit_of(self.folder) != self.about["commit"]:
            raise VolumeMismatchError(f"checkpoint {self.folder} was replaced during the push; push again")
        self.store.commit(self.name, "job", {"about": self.about, "files": listed})
        wanted = {rank for rank, homes in enumerate(self.about["homes"]) if homes}
        self.result.missing_ranks = tuple(sorted(r for r in wanted if f"rank_{r}" not in self.store.refs(self.name)))
        if not self.result.missing_ranks:
            self.store.publish(self.name, self.keep)
            if self.keep:
                self.remove_old()
        return self.result

    def remove_old(self) -> None:
        """Checkpoints that LATEST does not keep go, but not one of a later step: ranks on other hosts may be still to come."""
        if not self.store.is_alone():
            self.result.not_removed = "another push or pull is under way there"
            return
        published = self.store.published()
        later = [n for n in self.store.names() if _step_of(n) > self.about["step"]]
        kept = {*published, *later}
        named: set[str] = set()
        try:
            for name in kept:
                for ref in self.store.refs(name):
                    named.add(self.store.catalogue_digest(name, ref))
                    named.update(_digests(self.store.catalogue(name, ref)))
            old = [n for n in self.store.names() if n not in kept]
            self.result.removed_bytes = self.store.remove(old, named)
            self.result.removed = tuple(old)
        except (DamagedRecordError, OSError) as e:  # what a checkpoint names cannot be known, or a file not be removed
            self.result.not_removed = str(e)


def _step_of(name: str) -> int:
    return int(name.removeprefix("step_").split("-")[0])


def _digests(catalogue: dict[str, Any]) -> Iterator[str]:
    """Of every piece that a catalogue names."""
    pieces = list(catalogue.get("files", {}).values())
    for volume in catalogue.get("volumes", ()):
        pieces += [[volume["manifest"]], volume["index"], *volume["segments"].values()]
    return (digest for listed in pieces for _, digest in listed)


def _kept_here(directory: Path) -> int:
    return sum(1 for _ in directory.glob(f"step_*/{ABOUT}"))


def _index_file(volume: LocalVolume, manifest: Manifest) -> Path | None:
    return None if manifest.snapshot is None else volume_files.snapshot_file(volume.folders[0], manifest.snapshot)


def _commit_of(folder: Path) -> str | None:
    """The commit that a step's folder holds now."""
    try:
        return json.loads((folder / ABOUT).read_text())["commit"]
    except FileNotFoundError:
        return None


def _read(file: Any, path: Path, size: int) -> bytes:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        got = file.readinto(view[at:])
        if not got:
            raise DamagedRecordError(f"{path} ends at byte {file.tell()}, its checkpoint has more. Restore it from a copy")
        at += got
    return bytes(data)


def push(directory: str | Path, ssd: Sequence[str], dest: str | Path, progress: Progress = _ignore, *, keep: int | None = None) -> Transfer:
    """Ship the latest checkpoint of a job: its folder, and the volumes of those of its ranks whose SSD is here.

    ``ssd``: the job's SSD paths, all of them and in its order. The checkpoint is published at DEST once every rank's volumes are
    there; of a job on several hosts, the last host's push does that. Of the published ones DEST then keeps the newest ``keep``: None
    for as many as ``directory`` has, 0 for all. Nothing is removed while another push or pull is there.

    Raises: ConfigurationError, VolumeMismatchError, DamagedRecordError, VolumeFullError, VolumeIoError. DEST keeps the checkpoint
    that it had.
    """
    with _typed(f"push to {dest}: could not go on; what it has is unchanged. Repair that and push again"):
        root = Path(dest)
        root.mkdir(parents=True, exist_ok=True)
        try:
            store = ObjectStore(root)
            with store.in_use(writing=True):
                return _Push(Path(directory), store, progress, keep).run(ssd)
        except FileNotFoundError as e:
            raise VolumeMismatchError(
                f"push to {dest}: {e.filename} is gone: the job has dropped the checkpoint meanwhile. Nothing was published; push again"
            ) from e


# -- pull


def _paths(volumes: Iterable[dict[str, Any]], ssd: Sequence[str]) -> dict[str, str]:
    """Where each path of the job that was pushed lies now."""
    old = list(dict.fromkeys(path for v in volumes for path in v["paths"]))
    if len(old) != len(ssd):
        raise ConfigurationError(
            f"the checkpoint's volumes lay over {len(old)} SSD paths, {old}; give as many, in that order, got {list(ssd)}"
        )
    return dict(zip(old, ssd, strict=True))


class _Pull:
    def __init__(self, store: ObjectStore, name: str, progress: Progress) -> None:
        self.store, self.name, self.progress = store, name, progress
        self.result = Transfer(name, [])
        self.done, self.total = 0, 0

    def fetch(self, piece: Piece, what: str) -> bytes:
        data = self.store.get(piece[1], what)
        self.done += len(data)
        self.result.moved_bytes += len(data)
        self.progress(self.done, self.total)
        return data

    def pull_volume(self, volume: dict[str, Any], folders: list[Path]) -> None:
        what = f"checkpoint {self.name}, volume {volume['id']}"
        data = self.fetch(volume["manifest"], what)
        manifest = volume_files.decode_manifest(data, f"of {what}")
        final = volume_files.manifest_file(folders[0], manifest.epoch)
        with ExitStack() as locks:
            for folder in folders:
                folder.mkdir(mode=0o700, exist_ok=True)
                locks.enter_context(volume_files.locked(folder))
            if final.exists() and volume_files.epochs(folders[0]) == [manifest.epoch] and final.read_bytes() == data:
                return  # an earlier pull, interrupted later, has brought it: a manifest comes last
            self.claim(folders)
            for segment in manifest.segments:
                path = volume_files.segment_file(folders[segment.path_index], segment.number)
                self.pull_segment(path, segment, manifest.segment_bytes, volume["segments"].get(str(segment.number), []), what)
            if manifest.snapshot is not None:
                self.pull_file(volume_files.snapshot_file(folders[0], manifest.snapshot), volume["index"], f"{what}, index")
            for folder in folders:
                sync_folder(folder)
                sync_folder(folder.parent)
            write_whole(final, data)
            sync_folder(folders[0])
            for folder in folders:
                (folder / UNFINISHED).unlink()

    def claim(self, folders: list[Path]) -> None:
        """Empty folders are marked as a pull's own; what an interrupted pull has left in them goes."""
        for folder in folders:
            segments = list(folder.glob("segment_*.log"))
            if volume_files.has_volume(folder) or (segments and not (folder / UNFINISHED).exists()):
                raise VolumeMismatchError(
                    f"{folder} holds a volume already, or a part of one, and a pull overwrites none; name an empty path, or remove it first"
                )
        for folder in folders:
            (folder / UNFINISHED).touch()
            sync_folder(folder)
            for left_over in folder.glob("segment_*.log"):
                left_over.unlink()

    def pull_segment(self, path: Path, segment: Segment, segment_bytes: int, pieces: list[Piece], what: str) -> None:
        if sum(size for size, _ in pieces) != segment.bytes:
            raise DamagedRecordError(f"{what}: the catalogue's pieces of segment {segment.number} are not its {segment.bytes} bytes")
        self.pull_file(path, pieces, f"{what}, segment {segment.number}", segment_bytes)

    def pull_file(self, path: Path, pieces: list[Piece], what: str, reserve_bytes: int = 0) -> None:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as out:
            if reserve_bytes:  # as the volume makes a segment: a full disk is met here
                os.posix_fallocate(out.fileno(), 0, reserve_bytes)
            for piece in pieces:
                out.write(self.fetch(piece, what))
            out.flush()
            os.fsync(out.fileno())

    def run(self, directory: Path, ssd: Sequence[str], ranks: Sequence[int] | None) -> Transfer:
        job = self.store.catalogue(self.name, "job")
        about, files = job["about"], job["files"]
        wanted = [r for r, homes in enumerate(about["homes"]) if homes and (ranks is None or r in ranks)]
        catalogues = {r: self.store.catalogue(self.name, f"rank_{r}")["volumes"] for r in wanted}
        where = _paths((v for volumes in catalogues.values() for v in volumes), ssd)
        for path in ssd:
            if not Path(path).is_dir():
                raise VolumeIoError(f"SSD path {path!r} is not a folder; create it first, on the NVMe device that should hold the tables")
        if (directory / LATEST).exists() and about_of_latest(directory)[1]["commit"] != about["commit"]:
            raise ConfigurationError(f"{directory} holds checkpoints of another job or step; name another folder, or remove it first")
        self.total = sum(size for pieces in files.values() for size, _ in pieces)
        for volumes in catalogues.values():
            for v in volumes:
                self.total += v["manifest"][0] + sum(size for pieces in (v["index"], *v["segments"].values()) for size, _ in pieces)
        for rank, volumes in catalogues.items():
            for volume in volumes:
                self.pull_volume(volume, [Path(where[path]) / f"rank_{rank}" for path in volume["paths"]])
            self.result.ranks.append(rank)
        folder = directory / name_of(about["step"])
        if not (directory / LATEST).exists():
            self.pull_folder(folder, files)
        self.result.known_bytes = self.total - self.result.moved_bytes
        self.progress(self.total, self.total)
        return self.result

    def pull_folder(self, folder: Path, files: dict[str, list[Piece]]) -> None:
        if folder.exists():
            shutil.rmtree(folder)  # of a pull that was interrupted: LATEST comes last
        folder.mkdir(parents=True)
        for name, pieces in files.items():
            path = folder / name
            if folder.resolve() not in path.resolve().parents:
                raise DamagedRecordError(f"checkpoint {self.name}: the catalogue names the file {name!r}, outside of its folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            self.pull_file(path, pieces, f"checkpoint {self.name}, file {name}")
        sync((*(p for p in folder.rglob("*") if p.is_dir()), folder, folder.parent))
        publish(folder)


def pull(
    dest: str | Path, directory: str | Path, ssd: Sequence[str], *, ranks: Sequence[int] | None = None, progress: Progress = _ignore
) -> Transfer:
    """Bring the published checkpoint of DEST back: volumes below ``ssd``, everything else into ``directory``, from where a job resumes.

    Every byte is verified. A volume or a checkpoint that is there already is not overwritten. ``ranks``: those of this host,
    None for all.

    Raises: ConfigurationError, VolumeMismatchError, VolumeLockedError, DamagedRecordError, VolumeFullError, VolumeIoError.
    """
    with _typed(f"pull from {dest}: could not go on. Repair that and pull again"):
        store = ObjectStore(Path(dest))
        with store.in_use(writing=False):
            name = store.latest()
            if name is None:
                raise ConfigurationError(f"{dest} holds no published checkpoint; push one there first")
            return _Pull(store, name, progress).run(Path(directory), ssd, ranks)
