"""Inspect: what a volume's files hold, found offline; every damaged place is named, and nothing is changed."""

from __future__ import annotations

import os
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec_mtrains.kernels import SsdVolume
from torchrec_mtrains.kernels._core import decode_manifest

from torchrec_mtrains import volume_files, volume_report
from torchrec_mtrains.cli import main
from torchrec_mtrains.errors import ConfigurationError, DamagedRecordError
from torchrec_mtrains.volume_report import look

CAPACITY_BYTES = 64 << 20
RECORD_BYTES = 96


def records(rows: np.ndarray, version: int) -> np.ndarray:
    """Contents that occur once in the whole volume."""
    out = np.zeros((len(rows), RECORD_BYTES), np.uint8)
    for i, row in enumerate(rows):
        text = f"<row {row} version {version}>".encode()
        out[i, : len(text)] = np.frombuffer(text, np.uint8)
    return out


class Written:
    """A volume of two checkpoints: rows 0-299 of t at epoch 1, of them 0-99 anew at epoch 2, and 50 rows of u."""

    def __init__(self, folder: Path, paths: int = 1) -> None:
        self.paths = [str(folder / f"p{i}") for i in range(paths)]
        for path in self.paths:
            Path(path).mkdir()
        volume = SsdVolume(tuple(self.paths), CAPACITY_BYTES)
        self.t = volume.table("t", row_count=1000, record_bytes=RECORD_BYTES)
        u = volume.table("u", row_count=50, record_bytes=2 * RECORD_BYTES)
        self.t.put(np.arange(300), records(np.arange(300), 1))
        volume.checkpoint(1)
        self.t.put(np.arange(100), records(np.arange(100), 2))
        u.put(np.arange(50), np.ones((50, 2 * RECORD_BYTES), np.uint8))
        volume.checkpoint(2)
        self.volume = volume

    def place(self, text: str) -> tuple[Path, int]:
        """The file and offset of a content."""
        for path in self.paths:
            for file in Path(path).glob("segment_*"):
                at = file.read_bytes().find(text.encode())
                if at >= 0:
                    return file, at
        raise AssertionError(f"{text} is in no segment")

    def flip(self, text: str, offset: int = 0) -> Path:
        file, at = self.place(text)
        with file.open("r+b") as f:
            f.seek(at + offset)
            byte = f.read(1)[0]
            f.seek(at + offset)
            f.write(bytes([byte ^ 1]))
        return file


@pytest.fixture
def written(tmp_path) -> Written:
    made = Written(tmp_path)
    made.volume.close()
    return made


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 199), min_size=1, max_size=60), min_size=1, max_size=4), st.integers(1, 2))
def test_live_rows_are_the_distinct_rows_ever_put(tmp_path_factory, puts, paths):
    folders = tuple(str(tmp_path_factory.mktemp("v")) for _ in range(paths))
    volume = SsdVolume(folders, CAPACITY_BYTES)
    table = volume.table("t", row_count=200, record_bytes=RECORD_BYTES)
    for epoch, rows in enumerate(puts, 1):
        table.put(np.array(rows), records(np.array(rows), epoch))
        volume.checkpoint(epoch)
    kept = volume.epochs
    volume.close()
    report = look(folders, verify=True)
    assert (report.epochs, report.damage_count) == (kept, 0)
    assert [t.live_rows for t in report.tables] == [len(set(chain(*puts)))]
    assert sum(s.live or 0 for s in report.segments) == report.tables[0].live_rows
    before = look(folders, epoch=kept[0])
    assert [t.live_rows for t in before.tables] == [len(set(chain(*puts[: kept[0]])))]


def test_a_report_names_tables_segments_and_what_holds_them(written):
    report = look(written.paths)
    assert [(t.name, t.rows, t.record_bytes, t.live_rows) for t in report.tables] == [("t", 1000, 96, 300), ("u", 50, 192, 50)]
    assert {s.epochs for s in report.segments} <= {(1, 2), (2,)}
    assert any(s.epochs == (1, 2) for s in report.segments)
    assert sum(s.live for s in report.segments) == 350
    assert sum(s.records for s in report.segments) == 450
    assert report.disk_bytes >= sum(s.file_bytes for s in report.segments)


def test_looking_changes_nothing_and_a_volume_opens_as_before(written):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(written.paths[0]).iterdir()}
    look(written.paths, verify=True)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(written.paths[0]).iterdir()} == before


def test_one_who_has_the_volume_open_is_named_and_not_disturbed(tmp_path):
    made = Written(tmp_path)
    assert look(made.paths).lock_owner == f"process {os.getpid()} on {os.uname().nodename}"
    made.t.put(np.arange(10), records(np.arange(10), 3))
    made.volume.checkpoint(3)
    made.volume.close()
    report = look(made.paths)
    assert (report.lock_owner, report.epochs) == (None, [2, 3])


@pytest.mark.parametrize("paths", [1, 2])
def test_verify_names_segment_block_table_and_row_of_every_damaged_record(tmp_path, paths):
    made = Written(tmp_path, paths)
    made.volume.close()
    files = [made.flip("<row 7 version 2>", 5), made.flip("<row 150 version 1>"), made.flip("<row 299 version 1>", 90)]
    report = look(made.paths, verify=True)
    assert report.damage_count == len(report.damage) == 3
    found = {d.row: d for d in report.damage}
    assert set(found) == {7, 150, 299}
    for row, file in zip((7, 150, 299), files, strict=True):
        assert (found[row].table, f"segment_{found[row].segment:08x}.log") == ("t", file.name)
        assert "fails its checksum" in found[row].what
    at = made.place("<row 150 version 1>"[1:])[1] - 1
    assert found[150].block == (at - 4096) // 4096
    assert look(made.paths).damage_count == 0, "payloads are looked at by --verify alone"


def test_verify_looks_at_records_that_only_an_older_checkpoint_needs(written):
    written.flip("<row 5 version 1>")
    (damage,) = look(written.paths, verify=True).damage
    assert (damage.table, damage.row) == ("t", 5)


def test_verify_sees_a_record_whose_header_was_wiped(written):
    file, at = written.place("<row 20 version 2>")
    with file.open("r+b") as f:
        f.seek(at - 24)
        f.write(bytes(24))
    (damage,) = look(written.paths, verify=True).damage
    assert "bytes follow the last record" in damage.what


def test_a_wiped_block_and_a_lost_segment_are_named_beside_the_rest(tmp_path):
    made = Written(tmp_path)
    made.volume.close()
    file, at = made.place("<row 60 version 2>")
    with file.open("r+b") as f:
        f.seek(4096 + (at - 4096) // 4096 * 4096)
        f.write(bytes(4096))
    (damage,) = look(made.paths).damage
    assert "no record of a known table" in damage.what
    file.unlink()
    report = look(made.paths, verify=True)
    assert any(file.name in d.what for d in report.damage)
    assert report.segments


def test_a_damaged_manifest_is_an_error(written):
    newest = sorted(Path(written.paths[0]).glob("manifest_*"))[-1]
    data = bytearray(newest.read_bytes())
    data[40] ^= 1
    newest.write_bytes(data)
    with pytest.raises(DamagedRecordError, match=newest.name):
        look(written.paths)
    with pytest.raises(DamagedRecordError):
        decode_manifest(b"", "nothing")


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


INDEX_ROWS, INDEX_HEADER_BYTES, INDEX_PAGE_HEADER_BYTES = 60, 44, 16


class Indexed:
    """A volume whose newest manifest names an index snapshot, of one page; rows 0-9 and 50-54 were put before and after it."""

    def __init__(self, folder: Path, puts: list[list[int]] | None = None) -> None:
        self.folder = folder
        volume = SsdVolume((str(folder),), CAPACITY_BYTES, snapshot_after_bytes=0)
        table = volume.table("t", row_count=INDEX_ROWS, record_bytes=RECORD_BYTES)
        epoch = 0
        for rows in puts or [list(range(55)), [0, 1, 2, 20], [*range(10), *range(50, 55)]]:
            table.put(np.array(rows), records(np.array(rows), epoch))
            epoch += 1
            volume.checkpoint(epoch)
            snapshot = volume_files.snapshot_file(folder, epoch)
            # Written in the background, named by the next manifest; none while kept manifests name two, which is from the third on.
            while (epoch < 3 or snapshot.exists()) and not self.is_whole(snapshot):
                time.sleep(0.001)
            time.sleep(0.02)
        volume.close()
        manifest = volume_files.read_manifest(folder, volume_files.epochs(folder)[-1])
        assert 0 < manifest.snapshot < epoch
        self.index = volume_files.snapshot_file(folder, manifest.snapshot)

    @staticmethod
    def is_whole(index: Path) -> bool:
        whole = INDEX_HEADER_BYTES + 2 * INDEX_PAGE_HEADER_BYTES + 8 * INDEX_ROWS + 8
        return index.exists() and index.stat().st_size == whole

    def change(self, row: int, place: int | None = None, *, as_of: int | None = None) -> None:
        """Gives a row another entry, or that of another row; the checksum is right."""
        data = bytearray(self.index.read_bytes())
        page = INDEX_HEADER_BYTES + INDEX_PAGE_HEADER_BYTES
        if as_of is not None:
            place = int.from_bytes(data[page + 8 * as_of : page + 8 * as_of + 8], "little")
        assert place is not None
        data[page + 8 * row : page + 8 * row + 8] = place.to_bytes(8, "little")
        end = page + 8 * INDEX_ROWS
        data[end : end + 4] = crc32c(bytes(data[INDEX_HEADER_BYTES:end])).to_bytes(4, "little")
        self.index.write_bytes(data)

    def damage(self) -> list[volume_report.Damage]:
        return look([str(self.folder)]).damage


def test_a_sound_index_snapshot_is_no_damage(tmp_path):
    made = Indexed(tmp_path)
    made.change(30, as_of=30)
    assert made.damage() == []
    assert look([str(tmp_path)], verify=True).damage == []


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(st.integers(0, INDEX_ROWS - 1), min_size=1, max_size=80), min_size=3, max_size=6))
def test_an_index_snapshot_of_any_history_is_sound(tmp_path_factory, puts):
    assert Indexed(tmp_path_factory.mktemp("v"), puts).damage() == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"row": 30, "as_of": 31}, "points here, where no record of the row is"),
        ({"row": 30, "place": 77 << 35}, "points here, where no record of the row is"),
        ({"row": 57, "as_of": 30}, "points here, where no record of the row is"),
        ({"row": 30, "place": 0}, "says that the row was never put, the log has a record of it"),
    ],
)
def test_an_entry_of_an_index_snapshot_that_is_not_where_its_row_is_is_named(tmp_path, change, what):
    made = Indexed(tmp_path)
    made.change(**change)
    (damage,) = made.damage()
    assert (damage.table, damage.row) == ("t", change["row"])
    assert what in damage.what
    assert CliRunner().invoke(main, ["inspect", str(tmp_path)]).exit_code == 2


def test_an_entry_of_an_index_snapshot_that_points_at_an_older_record_is_named(tmp_path):
    made = Indexed(tmp_path, [[*range(40)], [5], [50]])
    made.change(5, place=(1 << 35) | 5)
    (damage,) = made.damage()
    assert (damage.table, damage.row) == ("t", 5)
    assert "points at an older record" in damage.what


def test_rows_that_were_put_after_an_index_snapshot_do_not_need_their_old_records(tmp_path):
    made = Indexed(tmp_path)
    made.change(4, place=77 << 35)
    assert made.damage() == []


def test_a_damaged_and_a_missing_index_snapshot_are_named(tmp_path):
    made = Indexed(tmp_path)
    data = bytearray(made.index.read_bytes())
    data[100] ^= 1
    made.index.write_bytes(data)
    (damage,) = made.damage()
    assert made.index.name in damage.what
    assert "fails its checksum" in damage.what
    assert made.index.name in CliRunner().invoke(main, ["inspect", str(tmp_path)]).output
    made.index.unlink()
    (damage,) = made.damage()
    assert made.index.name in damage.what


def test_the_wiped_end_of_a_block_is_seen_without_looking_at_payloads(written):
    file, at = written.place("<row 299 version 1>")
    with file.open("r+b") as f:
        f.seek(at - 24)
        f.write(bytes(24 + RECORD_BYTES))
    (damage,) = look(written.paths).damage
    assert "the end of a block was wiped" in damage.what


def test_what_is_no_volume_is_refused(tmp_path, written):
    with pytest.raises(ConfigurationError, match="no committed checkpoint"):
        look([str(tmp_path)])
    with pytest.raises(ConfigurationError, match="lies over 1 paths, got 2"):
        look([*written.paths, str(tmp_path)])
    with pytest.raises(ConfigurationError, match=r"keeps \[1, 2\]"):
        look(written.paths, epoch=9)


def test_segments_of_no_checkpoint_are_counted(tmp_path):
    made = Written(tmp_path)
    made.t.put(np.arange(500), records(np.arange(500), 3))
    for rows in range(40):
        made.t.put(np.arange(1000), records(np.arange(1000), 4 + rows))
    made.volume.flush()
    assert look(made.paths).uncommitted
    made.volume.close()


def test_the_command_prints_a_report_and_fails_on_damage(written):
    def run(*arguments: str):
        return CliRunner().invoke(main, ["inspect", *arguments])

    good = run("--verify", *written.paths)
    assert good.exit_code == 0, good.output
    for text in ("lock: free", "kept checkpoints: 1, 2", "every record passes its checksum", "300", "live share"):
        assert text in good.output
    written.flip("<row 7 version 2>")
    bad = run("--verify", *written.paths)
    assert bad.exit_code == 2
    assert "table 't', row 7: the record fails its checksum" in bad.output
    assert "1 damaged places" in bad.output
    assert volume_report.look(written.paths).damage_count == 0
