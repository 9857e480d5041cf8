"""What a volume on disk holds, found out from its files alone: no lock is taken and nothing is changed.

The rows and segments are those of one committed checkpoint. With ``verify`` every segment that any kept checkpoint names is
read up to the most blocks that one of them names, and every record in it is checked. An index snapshot that the checkpoint names
is checked against its records; of those that other checkpoints name, the checksums with ``verify``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import volume_files
from .errors import ConfigurationError, MTrainsError
from .kernels import _core
from .sizes import show_bytes
from .volume_files import Manifest, Segment


@dataclass(frozen=True)
class Damage:
    """One damaged place. ``table`` is empty and ``row`` what is written there where they cannot be known; -1: no record's.
    ``segment`` is 0 for what lies in none."""

    segment: int
    block: int
    position: int
    table: str
    row: int
    what: str


@dataclass(frozen=True)
class TableReport:
    """One table of the checkpoint; ``live_rows`` were ever put, the rest have their initial values."""

    name: str
    rows: int
    record_bytes: int
    live_rows: int


@dataclass(frozen=True)
class SegmentReport:
    """One segment, up to the most blocks that a checkpoint names; records and live ones are those of the checkpoint that was asked
    for, None if it does not name the segment."""

    number: int
    file: Path
    block_bytes: int
    blocks: int
    file_bytes: int
    records: int | None
    live: int | None
    epochs: tuple[int, ...]


@dataclass
class VolumeReport:
    """Of one volume."""

    volume: str
    folders: tuple[Path, ...]
    lock_owner: str | None
    epochs: list[int]
    epoch: int
    snapshot: int | None
    tables: list[TableReport] = field(default_factory=list)
    segments: list[SegmentReport] = field(default_factory=list)
    uncommitted: list[Path] = field(default_factory=list)
    disk_bytes: int = 0
    verified: bool = False
    damage: list[Damage] = field(default_factory=list)
    damage_count: int = 0


def look(
    paths: Sequence[str], *, epoch: int | None = None, verify: bool = False, progress: Callable[[int, int], None] | None = None
) -> VolumeReport:
    """Look into the volume that lies over ``paths``, in the order of its path indexes.

    Raises: ConfigurationError when they hold no volume or another number of paths; DamagedRecordError for a manifest that
    cannot be read; VolumeMismatchError for another format.
    """
    folders = tuple(Path(p) for p in paths)
    kept = volume_files.epochs(folders[0])
    if not kept:
        raise ConfigurationError(
            f"{folders[0]} holds no committed checkpoint of a volume; name the folder rank_N below the job's first SSD path"
        )
    if epoch is not None and epoch not in kept:
        raise ConfigurationError(f"the volume in {folders[0]} does not keep epoch {epoch}; it keeps {kept}")
    manifests = [volume_files.read_manifest(folders[0], e) for e in kept]
    asked = manifests[-1 if epoch is None else kept.index(epoch)]
    if asked.path_count != len(folders):
        raise ConfigurationError(f"the volume in {folders[0]} lies over {asked.path_count} paths, got {len(folders)}: name them in order")
    report = VolumeReport(asked.volume, folders, volume_files.lock_owner(folders[0]), kept, asked.epoch, asked.snapshot, verified=verify)
    longest = {s.number: s for manifest in manifests for s in manifest.segments}  # segments grow from checkpoint to checkpoint
    inspector = _read(report, asked, manifests, list(longest.values()), progress)
    report.tables = [
        TableReport(t["name"], t["row_count"], t["record_bytes"], live) for t, live in zip(asked.tables, inspector.live_rows(), strict=True)
    ]
    live = inspector.newest_by_segment()
    for number, s in sorted(longest.items()):
        file = _file(folders, s)
        report.segments.append(
            SegmentReport(
                number,
                file,
                s.block_bytes,
                s.blocks,
                file.stat().st_size if file.exists() else 0,
                inspector.records(number) if number in live else None,
                live.get(number),
                tuple(m.epoch for m in manifests if any(number == other.number for other in m.segments)),
            )
        )
    present = {p for folder in folders for p in folder.glob("segment_*.log")}
    report.uncommitted = sorted(present - {s.file for s in report.segments})
    files = [p for folder in folders for p in folder.iterdir() if p.is_file()]
    report.disk_bytes = sum(512 * p.stat().st_blocks for p in files)
    return report


def _file(folders: Sequence[Path], segment: Segment) -> Path:
    return volume_files.segment_file(folders[segment.path_index], segment.number)


def _read(
    report: VolumeReport,
    asked: Manifest,
    manifests: list[Manifest],
    longest: list[Segment],
    progress: Callable[[int, int], None] | None,
) -> Any:
    """Reads what the checkpoint names; with ``verify`` then what only others do, for its damage alone."""
    newest, mine = manifests[-1], {s.number: s for s in asked.segments}
    inspector = _inspector(report, asked)
    readers = [inspector]
    snapshot = _read_snapshot(report, inspector, asked)
    work = [(inspector, s, 0, s.records) for s in asked.segments]
    if report.verified:
        for manifest in {m.snapshot: m for m in manifests if m.snapshot != asked.snapshot}.values():
            _read_snapshot(report, _inspector(report, manifest), manifest)
        readers.append(_inspector(report, newest))  # the newest manifest knows every table
        for s in longest:
            if (shorter := mine.get(s.number)) is None:
                work.append((readers[1], s, 0, s.records))
            elif s.blocks > shorter.blocks:
                work.append((readers[1], s, shorter.blocks, s.records - shorter.records))
    total = sum((s.blocks - first) * s.block_bytes for _, s, first, _ in work)
    done = 0
    for reader, s, first, records in work:
        try:
            reader.read(s.number, s.block_bytes, first, s.blocks, records, str(_file(report.folders, s)), report.verified)
        except MTrainsError as e:  # the other segments are still worth looking at
            report.damage.append(Damage(s.number, first, 0, "", -1, str(e)))
        done += (s.blocks - first) * s.block_bytes
        if progress is not None:
            progress(done, total)
    if snapshot:
        inspector.check_snapshot()
    report.damage_count = len(report.damage)
    for reader in readers:
        report.damage += [Damage(*d) for d in reader.damage]
        report.damage_count += reader.damage_count
    return inspector


def _inspector(report: VolumeReport, manifest: Manifest) -> Any:
    return _core.LogInspector(manifest.data, str(volume_files.manifest_file(report.folders[0], manifest.epoch)))


def _read_snapshot(report: VolumeReport, inspector: Any, manifest: Manifest) -> bool:
    """Whether the manifest names an index snapshot that is whole."""
    if manifest.snapshot is None:
        return False
    try:
        inspector.read_snapshot(str(volume_files.snapshot_file(report.folders[0], manifest.snapshot)))
    except MTrainsError as e:
        report.damage.append(Damage(0, 0, 0, "", -1, str(e)))
        return False
    return True


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    return table


def show(report: VolumeReport) -> None:
    """Print a report."""
    console = Console()
    if not console.is_terminal:
        console.width = 160
    lines = [
        f"volume {report.volume} in {', '.join(map(str, report.folders))}",
        f"lock: {f'open for writing by {report.lock_owner}' if report.lock_owner else 'free'}",
        f"kept checkpoints: {', '.join(map(str, report.epochs))}; below, epoch {report.epoch}",
        f"index snapshot: {'none' if report.snapshot is None else f'of epoch {report.snapshot}'}",
        f"bytes on disk: {report.disk_bytes:,} ({show_bytes(report.disk_bytes)})",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    tables = _table("tables", "table", "rows", "record bytes", "live rows", "live bytes")
    for t in report.tables:
        tables.add_row(t.name, f"{t.rows:,}", f"{t.record_bytes:,}", f"{t.live_rows:,}", show_bytes(t.live_rows * t.record_bytes))
    console.print(tables)
    segments = _table("segments", "file", "block bytes", "blocks", "records", "live", "live share", "file bytes", "held by epochs")
    for s in report.segments:
        share = "" if s.live is None or not s.records else f"{s.live / s.records:.3f}"
        cells = ["" if n is None else f"{n:,}" for n in (s.records, s.live)]
        segments.add_row(
            s.file.name, f"{s.block_bytes:,}", f"{s.blocks:,}", *cells, share, f"{s.file_bytes:,}", ", ".join(map(str, s.epochs))
        )
    console.print(segments)
    if report.uncommitted:
        console.print(f"segments of no checkpoint, removed when the volume is opened: {len(report.uncommitted)}", highlight=False)
    for d in report.damage:
        where = f"volume {report.volume}" + (f", segment {d.segment}, block {d.block}, record {d.position}" if d.segment else "")
        named = f", table {d.table!r}, row {d.row}" if d.table else ""
        console.print(f"damaged: {where}{named}: {d.what}", highlight=False, markup=False, soft_wrap=True)
    if report.verified and not report.damage_count:
        console.print("every record passes its checksum", highlight=False)
