"""Push and pull: what comes back trains on with the same bits, only new bytes are shipped, and nothing half is ever taken for whole."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torchrec_mtrains.kernels import SsdVolume

import jobs
from ranks import Ranks
from torchrec_mtrains import checkpoint_transfer, object_store, volume_files
from torchrec_mtrains.checkpoint_folder import LATEST, latest_step
from torchrec_mtrains.checkpoint_transfer import pull, push
from torchrec_mtrains.cli import main
from torchrec_mtrains.errors import (
    ConfigurationError,
    DamagedRecordError,
    VolumeFullError,
    VolumeIoError,
    VolumeLockedError,
    VolumeMismatchError,
)
from torchrec_mtrains.object_store import ObjectStore

STEPS = 30


@pytest.fixture(scope="module")
def undisturbed() -> list[float]:
    return jobs.run(jobs.options(None, steps=STEPS)).losses


class Place:
    """An SSD folder and a checkpoint folder of one job."""

    def __init__(self, root: Path, name: str, ssds: int = 1) -> None:
        self.ssd = [root / f"{name}_ssd{i}" for i in range(ssds)]
        self.checkpoint = root / f"{name}_checkpoint"
        for path in self.ssd:
            path.mkdir()

    @property
    def paths(self) -> list[str]:
        return [str(p) for p in self.ssd]

    def options(self, steps: int, resume: bool = False, learning_rate: float = 0.05):
        job = jobs.options(self.ssd[0], steps=steps, checkpoint=str(self.checkpoint), resume=resume)
        model = dataclasses.replace(job.model, learning_rate=learning_rate)
        return dataclasses.replace(job, model=model, placement=dataclasses.replace(job.placement, ssd=tuple(self.paths)))

    def run(self, steps: int, **options) -> list[float]:
        return jobs.run(self.options(steps, **options)).losses

    def push(self, dest: Path, **options):
        return push(self.checkpoint, self.paths, dest, **options)

    def pull(self, dest: Path, **options):
        return pull(dest, self.checkpoint, self.paths, **options)

    def segment_bytes(self) -> int:
        """Of the newest epoch."""
        (volume,) = volume_files.volumes_of_rank(self.paths, 0)
        return sum(s.bytes for s in volume.newest.segments)


@pytest.fixture
def here(tmp_path) -> Place:
    return Place(tmp_path, "here")


@pytest.fixture
def there(tmp_path) -> Place:
    return Place(tmp_path, "there")


@pytest.fixture
def dest(tmp_path) -> Path:
    return tmp_path / "dest"


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("ssds", [1, 2])
def test_a_job_whose_disk_is_lost_goes_on_from_what_was_pushed(tmp_path, dest, undisturbed, ssds):
    here, there = Place(tmp_path, "here", ssds), Place(tmp_path, "there", ssds)
    losses = here.run(13)
    here.push(dest)
    for path in (*here.ssd, here.checkpoint):
        shutil.rmtree(path)
    there.pull(dest)
    assert losses + there.run(STEPS, resume=True) == undisturbed


def test_an_index_snapshot_goes_with_its_checkpoint(here, there, dest, monkeypatch, undisturbed):
    monkeypatch.setitem(SsdVolume.__init__.__kwdefaults__, "snapshot_after_bytes", 0)
    # Written in the background of one checkpoint, named by a later one.
    losses = jobs.run(dataclasses.replace(here.options(21), checkpoint_every=1)).losses
    (volume,) = volume_files.volumes_of_rank(here.paths, 0)
    assert volume.newest.snapshot is not None
    here.push(dest)
    there.pull(dest)
    pulled = volume_files.snapshot_file(there.ssd[0] / "rank_0", volume.newest.snapshot)
    assert pulled.read_bytes() == volume_files.snapshot_file(volume.folders[0], volume.newest.snapshot).read_bytes()
    assert losses + there.run(STEPS, resume=True) == undisturbed


def test_a_second_push_ships_only_what_is_new(here, dest):
    here.run(10)
    first = here.push(dest)
    assert first.known_bytes == 0
    before = here.segment_bytes()
    assert first.moved_bytes > before
    objects = files_of(dest / "objects")
    again = here.push(dest)
    assert again.moved_bytes == 0
    here.run(20, resume=True)
    grown = here.segment_bytes() - before
    second = here.push(dest)
    assert second.known_bytes >= before
    assert grown <= second.moved_bytes < first.moved_bytes - before + grown + 8192
    after = files_of(dest / "objects")
    assert {name: after[name] for name in objects} == objects, "objects never change"


def test_a_push_long_after_the_one_before_still_ships_only_what_is_new(here, dest):
    here.run(10)
    here.push(dest)
    before = here.segment_bytes()
    for steps in (12, 14, 16, 18):  # more checkpoints than are kept
        here.run(steps, resume=True)
    assert here.push(dest).known_bytes >= before


def test_what_was_kept_is_not_read_again(here, dest, monkeypatch):
    here.run(10)
    here.push(dest)
    before = here.segment_bytes()
    here.run(12, resume=True)
    read = []
    real = checkpoint_transfer._read
    monkeypatch.setattr(checkpoint_transfer, "_read", lambda file, path, size: read.append((path, size)) or real(file, path, size))
    here.push(dest)
    assert sum(size for path, size in read if path.name.startswith("segment_")) == here.segment_bytes() - before


def test_a_step_that_was_trained_twice_is_pushed_as_it_is_now(here, there, dest, tmp_path):
    here.run(8)
    for path in (here.ssd[0], here.checkpoint):
        shutil.copytree(path, tmp_path / f"copy_of_{path.name}")
    here.run(16, resume=True)
    here.push(dest)
    for path in (here.ssd[0], here.checkpoint):
        shutil.rmtree(path)
        shutil.move(tmp_path / f"copy_of_{path.name}", path)
    here.run(16, resume=True, learning_rate=0.5)
    here.push(dest)
    there.pull(dest)
    assert there.run(STEPS, resume=True) == here.run(STEPS, resume=True)


def test_an_interrupted_push_leaves_the_checkpoint_before_and_can_be_repeated(here, dest, tmp_path, monkeypatch, undisturbed):
    losses = here.run(10)
    here.push(dest)
    here.run(14, resume=True)
    real, writes, limit = object_store.write_whole, 0, 0

    def disk_fills_up(path, data):
        nonlocal writes
        writes += 1
        if writes > limit:
            raise OSError(28, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(object_store, "write_whole", disk_fills_up)
    interrupted = 0
    while True:
        writes = 0
        try:
            here.push(dest)
            break
        except VolumeFullError:
            interrupted += 1
            limit = interrupted
            assert ObjectStore(dest).latest().startswith(f"step_{10:012d}")
            if interrupted in (1, 4):
                there = Place(tmp_path, f"there{interrupted}")
                there.pull(dest)
                assert losses + there.run(STEPS, resume=True) == undisturbed
    assert interrupted >= 5, "objects, catalogues, references and LATEST"
    assert not list(dest.rglob("*.tmp"))
    there = Place(tmp_path, "there")
    there.pull(dest)
    assert [*losses, *undisturbed[10:14], *there.run(STEPS, resume=True)] == undisturbed
    assert latest_step(there.checkpoint) == STEPS


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_every_damaged_object_is_named_and_nothing_half_opens(here, dest, tmp_path, damage):
    here.run(10)
    here.push(dest)
    objects = sorted(p for p in (dest / "objects").rglob("*") if p.is_file())
    assert len(objects) >= 6
    for i, path in enumerate(objects):
        there = Place(tmp_path, f"there{i}")
        data = path.read_bytes()
        if damage == "remove" or not data:
            path.unlink()
        else:
            path.write_bytes(data[:-1] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(DamagedRecordError, match=f"{path.parent.name}/{path.name}"):
            there.pull(dest)
        assert not (there.checkpoint / LATEST).exists()
        path.write_bytes(data)
    there.pull(dest)
    assert there.run(STEPS, resume=True) == here.run(STEPS, resume=True)


def names_of(dest: Path) -> list[int]:
    """The steps of the checkpoints at DEST, published or not."""
    return [int(name.split("-")[0].removeprefix("step_")) for name in ObjectStore(dest).names()]


def needed(dest: Path) -> set[str]:
    """The objects that the checkpoints at DEST name."""
    store, digests = ObjectStore(dest), set()
    for name in store.names():
        for ref in store.refs(name):
            digests.add(store.catalogue_digest(name, ref))
            digests.update(checkpoint_transfer._digests(store.catalogue(name, ref)))
    return digests


def objects_at(dest: Path) -> set[str]:
    return {p.parent.name + p.name for p in (dest / "objects").rglob("*") if p.is_file()}


@pytest.mark.parametrize(("keep", "left"), [(None, [14, 16]), (1, [16]), (3, [12, 14, 16]), (0, [10, 12, 14, 16])])
def test_a_push_keeps_the_newest_checkpoints_and_only_the_objects_that_they_name(here, there, dest, undisturbed, keep, left):
    losses = here.run(10)
    for steps in (12, 14, 16):
        here.push(dest, keep=keep)
        losses += here.run(steps, resume=True)
    stray = dest / "objects" / "00"
    stray.mkdir(exist_ok=True)
    (stray / f"{'1' * 62}.killed.tmp").write_bytes(b"of a push that was killed")
    done = here.push(dest, keep=keep)
    assert names_of(dest) == left
    assert [n for n in reversed(ObjectStore(dest).published())] == ObjectStore(dest).names()
    if keep != 0:
        assert objects_at(dest) == needed(dest)
        assert done.removed_bytes > 0
    there.pull(dest)
    assert losses + there.run(STEPS, resume=True) == undisturbed


def test_a_push_removes_nothing_while_another_push_or_pull_is_there(here, dest):
    here.run(10)
    here.push(dest, keep=1)
    here.run(12, resume=True)
    before = objects_at(dest)
    with ObjectStore(dest).in_use(writing=False):
        done = here.push(dest, keep=1)
        assert "another push or pull is under way" in done.not_removed
        assert done.removed == ()
        assert before <= objects_at(dest)
    again = here.push(dest, keep=1)
    assert (names_of(dest), len(again.removed)) == ([12], 1)
    assert objects_at(dest) == needed(dest)


def test_a_push_that_is_killed_while_it_removes_leaves_whole_checkpoints_and_the_next_goes_on(here, dest, tmp_path, monkeypatch):
    here.run(10)
    here.push(dest, keep=1)
    here.run(12, resume=True)
    real, stop_after = Path.unlink, 0
    interrupted = 0

    class Killed(BaseException):
        pass

    def unlink(self, missing_ok=False):
        nonlocal stop_after
        if dest in self.parents and self.suffix != ".tmp":
            if stop_after == 0:
                raise Killed
            stop_after -= 1
        real(self, missing_ok)

    def rmtree(path):
        for file in sorted(path.iterdir()):
            file.unlink()
        path.rmdir()

    monkeypatch.setattr(object_store.shutil, "rmtree", rmtree)
    monkeypatch.setattr(Path, "unlink", unlink)
    while True:
        stop_after = 1  # of what an earlier push left, one more goes each time
        try:
            here.push(dest, keep=1)
            break
        except Killed:
            interrupted += 1
            there = Place(tmp_path, f"there{interrupted}")
            there.pull(dest)
            assert latest_step(there.checkpoint) == 12
    assert interrupted >= 2
    assert objects_at(dest) == needed(dest)


def test_a_push_removes_nothing_while_a_kept_checkpoint_cannot_be_read(here, dest):
    here.run(10)
    here.push(dest, keep=2)
    here.run(12, resume=True)
    here.push(dest, keep=2)
    here.run(14, resume=True)
    (ref,) = (dest / "checkpoints").glob("step_000000000012-*/job")
    ref.write_text("no digest\n")
    before = objects_at(dest)
    done = here.push(dest, keep=2)
    assert str(ref) in done.not_removed
    assert before <= objects_at(dest)


def test_an_unpublished_checkpoint_of_a_later_step_is_not_removed(here, dest):
    here.run(10)
    here.push(dest, keep=1)
    store = ObjectStore(dest)
    for step in (8, 14):
        store.commit(f"step_{step:012d}-another", "rank_0", {"volumes": []})
    here.run(12, resume=True)
    assert len(here.push(dest, keep=1).removed) == 2
    assert names_of(dest) == [12, 14]
    assert objects_at(dest) == needed(dest)


def test_a_damaged_object_is_replaced_by_the_next_push_if_its_length_shows_it(here, there, dest):
    here.run(10)
    here.push(dest)
    for path in (dest / "objects").rglob("*"):
        if path.is_file() and path.stat().st_size:
            path.write_bytes(path.read_bytes()[:-1])
    here.push(dest)
    there.pull(dest)


def test_a_pull_overwrites_neither_a_volume_nor_a_part_of_one_nor_checkpoints(here, there, dest, tmp_path):
    here.run(10)
    here.push(dest)
    there.run(5)
    before = files_of(there.ssd[0])
    with pytest.raises(ConfigurationError, match="another job or step"):
        there.pull(dest)
    shutil.rmtree(there.checkpoint)
    with pytest.raises(VolumeMismatchError, match="holds a volume already"):
        there.pull(dest)
    for manifest in (there.ssd[0] / "rank_0").glob("manifest_*"):
        manifest.unlink()
    with pytest.raises(VolumeMismatchError, match="or a part of one"):
        there.pull(dest)
    after = files_of(there.ssd[0])
    assert {n: d for n, d in before.items() if "segment" in n} == {n: d for n, d in after.items() if "segment" in n}


def test_a_pull_twice_is_a_pull_once(here, there, dest):
    here.run(10)
    here.push(dest)
    there.pull(dest)
    before = files_of(there.ssd[0])
    assert there.pull(dest).known_bytes > 0
    assert files_of(there.ssd[0]) == before


def test_a_pull_into_an_open_volume_is_refused(here, there, dest):
    here.run(10)
    here.push(dest)
    (there.ssd[0] / "rank_0").mkdir()
    volume = SsdVolume((str(there.ssd[0] / "rank_0"),), 16 << 20)
    with pytest.raises(VolumeLockedError, match=r"open for writing by process \d+"):
        there.pull(dest)
    volume.close()


def test_a_push_runs_beside_the_job_and_fails_if_the_checkpoint_goes(here, dest):
    here.run(6)
    here.push(dest)
    here.run(10, resume=True)
    gone = False

    def the_job_goes_on(done: int, total: int) -> None:
        nonlocal gone
        if not gone:
            gone = True
            for steps in (12, 14, 16):
                here.run(steps, resume=True)

    with pytest.raises(VolumeMismatchError, match="push again"):
        here.push(dest, progress=the_job_goes_on)
    assert ObjectStore(dest).latest().startswith(f"step_{6:012d}")
    here.push(dest)
    assert ObjectStore(dest).latest().startswith(f"step_{16:012d}")


def test_a_push_fails_if_a_volume_commits_its_epoch_anew_meanwhile(here, dest):
    here.run(6)
    here.run(10, resume=True)

    def a_job_goes_back(done: int, total: int) -> None:
        if done == total:  # every piece has been read
            volume = SsdVolume((f"{here.paths[0]}/rank_0",), jobs.CAPACITY_BYTES)
            volume.restore(6)
            volume.table("another", row_count=1, record_bytes=8).put(np.zeros(1, np.int64), np.ones((1, 8), np.uint8))
            volume.checkpoint(10)
            volume.close()

    with pytest.raises(VolumeMismatchError, match="restored during the push"):
        here.push(dest, progress=a_job_goes_back)
    assert ObjectStore(dest).latest() is None


def test_volumes_of_another_job_are_not_pushed(here, there, dest):
    here.run(5)
    there.run(5)
    with pytest.raises(VolumeMismatchError, match="give the SSD paths of the job that saved it"):
        push(here.checkpoint, there.paths, dest)
    with pytest.raises(ConfigurationError, match="none of its ranks"):
        push(here.checkpoint, [str(dest)], dest)
    assert ObjectStore(dest).latest() is None


def test_the_number_of_paths_must_be_that_of_the_job(tmp_path, dest):
    here, there = Place(tmp_path, "here", 2), Place(tmp_path, "there", 1)
    here.run(5)
    with pytest.raises(ConfigurationError, match="all of them and in its order"):
        push(here.checkpoint, here.paths[:1], dest)
    here.push(dest)
    with pytest.raises(ConfigurationError, match="over 2 SSD paths"):
        there.pull(dest)
    with pytest.raises(VolumeIoError, match="is not a folder"):
        pull(dest, there.checkpoint, [*there.paths, str(tmp_path / "none")])


def test_a_job_in_memory_is_pushed_too(dest, tmp_path, undisturbed):
    first = jobs.run(jobs.options(None, steps=9, checkpoint=str(tmp_path / "a")))
    push(tmp_path / "a", [], dest)
    pull(dest, tmp_path / "b", [])
    assert first.losses + jobs.run(jobs.options(None, steps=STEPS, checkpoint=str(tmp_path / "b"), resume=True)).losses == undisturbed


def losses_of(job) -> list[float]:
    torch.set_num_threads(1)
    return jobs.run(job).losses


def test_two_ranks_are_pushed_from_two_hosts_and_published_by_the_second(here, there, dest, tmp_path):
    ranks = Ranks(2)
    try:
        whole = ranks.run(losses_of, jobs.options(None, steps=20))
        first = ranks.run(losses_of, here.options(11))
        elsewhere = here.ssd[0] / "elsewhere"
        (here.ssd[0] / "rank_1").rename(elsewhere)
        assert here.push(dest).missing_ranks == (1,)
        with pytest.raises(ConfigurationError, match="no published checkpoint"):
            there.pull(dest)
        elsewhere.rename(here.ssd[0] / "rank_1")
        (here.ssd[0] / "rank_0").rename(elsewhere)
        assert here.push(dest).missing_ranks == ()
        there.pull(dest, ranks=[0])
        there.pull(dest, ranks=[1])
        second = ranks.run(losses_of, there.options(20, resume=True))
        assert [a + b for a, b in zip(first, second, strict=True)] == whole
    finally:
        ranks.close()


def test_the_commands_push_and_pull(here, there, dest):
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        return f"{result.exit_code} {result.output}"

    here.run(6)
    assert run("checkpoint", "push", dest, "--checkpoint", here.checkpoint, "--ssd", here.paths[0]).startswith("0 ")
    assert "moved" in run("checkpoint", "push", dest, "--checkpoint", here.checkpoint, "--ssd", here.paths[0])
    here.run(8, resume=True)
    assert "of checkpoints that are not kept" in run(
        "checkpoint", "push", dest, "--keep", 1, "--checkpoint", here.checkpoint, "--ssd", here.paths[0]
    )
    assert "volumes of ranks: 0" in run("checkpoint", "pull", dest, "--checkpoint", there.checkpoint, "--ssd", there.paths[0])
    assert latest_step(there.checkpoint) == 8
    refused = run("checkpoint", "pull", there.ssd[0], "--checkpoint", there.checkpoint, "--ssd", there.paths[0])
    assert refused.startswith("2 ")
    assert "no published checkpoint" in refused
