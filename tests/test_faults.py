"""Faults of the storage below a volume: what it promised stays, and what it cannot give back it refuses to guess."""

from __future__ import annotations

import gc
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec_mtrains.kernels import MemoryVolume, PmemVolume, SsdVolume, VolumeTable, _core
from torchrec_mtrains.kernels.caches import CachedVolume

from torchrec_mtrains import PmemCache
from torchrec_mtrains.errors import DamagedRecordError, VolumeError, VolumeFullError, VolumeIoError

Fault = _core.Fault
CAPACITY = 16 << 20
ROWS, RECORD_BYTES = 40, 700

# Faults that storage reports, and faults that it hides.
REPORTED = [Fault.short_read, Fault.read_error, Fault.write_error, Fault.no_space, Fault.open_error, Fault.sync_error, Fault.delay]
HIDDEN = [Fault.torn_write, Fault.lost_write, Fault.misdirected_write, Fault.bit_flip]


def values(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, RECORD_BYTES), dtype=torch.uint8, generator=generator)


def open_table(folder: str, system: object = None) -> tuple[SsdVolume, VolumeTable]:
    volume = SsdVolume((folder,), CAPACITY, depth=4, snapshot_after_bytes=100_000, system=system)
    return volume, volume.table("t", row_count=ROWS, record_bytes=RECORD_BYTES)


def read_all(table: VolumeTable) -> torch.Tensor:
    out = torch.empty(ROWS, RECORD_BYTES, dtype=torch.uint8)
    table.get(torch.arange(ROWS), out)
    return out


steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=30), st.integers(0, 1 << 20)),
        st.tuples(st.just("get")),
        st.tuples(st.just("flush")),
        st.tuples(st.just("checkpoint")),
    ),
    min_size=3,
    max_size=25,
)
faults = st.lists(st.tuples(st.sampled_from(REPORTED + HIDDEN), st.integers(0, 12)), max_size=2)


@settings(max_examples=150, deadline=None)
@given(steps=steps, faults=faults, seed=st.integers(0, 1 << 30), lose_power=st.booleans())
def test_a_volume_on_failing_storage_gives_the_truth_or_a_typed_error(
    steps: list[tuple], faults: list[tuple], seed: int, lose_power: bool
) -> None:
    hidden = any(f in HIDDEN for f, _ in faults)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        system = _core.FaultySystem(seed)
        model = torch.zeros(ROWS, RECORD_BYTES, dtype=torch.uint8)
        uncertain = torch.zeros(ROWS, dtype=torch.bool)  # rows of a put that failed half-way: old or new
        committed = {0: model.clone()}
        epoch = 0
        tried: dict[int, torch.Tensor] = {}
        volume, table = open_table(folder, system)
        for fault, countdown in faults:
            system.arm(fault, countdown)
        for step in steps:
            try:
                if step[0] == "put":
                    rows = torch.tensor(step[1])
                    new = values(step[2], len(rows))
                    try:
                        table.put(rows, new)
                    except VolumeError:
                        uncertain[rows] = True
                        raise
                    for row, value in zip(rows.tolist(), new, strict=True):
                        model[row] = value
                elif step[0] == "get":
                    got = read_all(table)
                    assert torch.equal(got[~uncertain], model[~uncertain])
                elif step[0] == "flush":
                    volume.flush()
                else:
                    epoch += 1
                    tried[epoch] = model.clone()
                    volume.checkpoint(epoch)
                    if not uncertain.any():
                        committed[epoch] = model.clone()
            except (VolumeIoError, VolumeFullError):
                assert system.struck() > 0
            except DamagedRecordError:
                assert hidden
        if lose_power:
            system.power_loss()
        volume.close()
        try:
            volume, table = open_table(folder)
        except DamagedRecordError:
            assert hidden
            return
        try:
            # A commit that reported a failure may have happened all the same; one that reported success must have.
            newest = volume.epoch or 0
            assert newest >= max(committed)
            want = committed.get(newest, tried.get(newest))
            assert want is not None
            got = read_all(table)
            if not uncertain.any():
                assert torch.equal(got, want)
        except DamagedRecordError:
            assert hidden
        finally:
            volume.close()


def fresh() -> tuple[str, object, SsdVolume, VolumeTable]:
    folder = tempfile.mkdtemp(dir=Path.cwd())
    system = _core.FaultySystem(1)
    return folder, system, *open_table(folder, system)


@pytest.fixture
def storage():
    folder, system, volume, table = fresh()
    yield folder, system, volume, table
    volume.close()
    for f in Path(folder).iterdir():
        f.unlink()
    Path(folder).rmdir()


def test_after_a_failed_fsync_nothing_is_committed_any_more(storage) -> None:
    _, system, volume, table = storage
    table.put(torch.arange(ROWS), values(1, ROWS))
    volume.checkpoint(1)
    table.put(torch.arange(ROWS), values(2, ROWS))
    system.arm(Fault.sync_error, 0)
    with pytest.raises(VolumeIoError, match="cannot sync"):
        volume.checkpoint(2)
    for epoch in (2, 3):
        with pytest.raises(VolumeIoError, match=r"commits nothing any more.*Resume from the last checkpoint"):
            volume.checkpoint(epoch)
    assert volume.epochs == [1]
    assert torch.equal(read_all(table), values(2, ROWS))


def test_records_of_a_failed_write_are_still_served_and_the_failure_is_reported(storage) -> None:
    _, system, volume, table = storage
    table.put(torch.arange(ROWS), values(1, ROWS))
    system.arm(Fault.write_error, 0)
    with pytest.raises(VolumeIoError, match=r"a write of .* at block 0 failed \(Input/output error\)"):
        volume.flush()
    assert torch.equal(read_all(table), values(1, ROWS))
    with pytest.raises(VolumeIoError):
        table.put(torch.arange(1), values(2, 1))


def test_a_failed_read_names_its_record_and_the_next_one_works(storage) -> None:
    _, system, volume, table = storage
    table.put(torch.arange(ROWS), values(1, ROWS))
    volume.flush()
    system.arm(Fault.read_error, 0)
    with pytest.raises(VolumeIoError, match=r"cannot read volume .* table 't', row \d+: Input/output error"):
        read_all(table)
    assert torch.equal(read_all(table), values(1, ROWS))


@pytest.mark.parametrize("fault", HIDDEN)
def test_a_write_that_storage_lied_about_is_noticed(storage, fault) -> None:
    _, system, volume, table = storage
    table.put(torch.arange(ROWS), values(1, ROWS))
    system.arm(fault, 0)
    volume.flush()
    assert system.struck() == 1
    with pytest.raises(DamagedRecordError, match="fails its checksum"):
        read_all(table)


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_of_power_takes_back_only_what_was_not_committed(seed: int) -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        system = _core.FaultySystem(seed)
        volume, table = open_table(folder, system)
        for epoch in range(1, 4):
            table.put(torch.arange(ROWS), values(epoch, ROWS))
            volume.checkpoint(epoch)
        table.put(torch.arange(ROWS), values(9, ROWS))
        volume.flush()
        system.power_loss()
        volume.close()
        volume, table = open_table(folder)
        assert volume.epoch == 3
        assert torch.equal(read_all(table), values(3, ROWS))
        volume.close()


@pytest.mark.parametrize("then", ["open again", "restore", "lose power"])
@pytest.mark.parametrize("fault", [Fault.sync_error, Fault.open_error])
def test_a_commit_that_fails_anywhere_leaves_a_volume_that_opens(fault, then: str) -> None:
    failed = 0
    for countdown in range(100):
        folder, system, volume, table = fresh()
        for epoch in (1, 2):
            table.put(torch.arange(ROWS), values(epoch, ROWS))
            volume.checkpoint(epoch)
        table.put(torch.arange(ROWS), values(3, ROWS))
        system.arm(fault, countdown)
        try:
            volume.checkpoint(3)
            done = True
        except VolumeIoError:
            done = False
            failed += 1
        system.arm(fault, 1 << 40)
        if then == "restore":
            volume.restore(2)
            assert torch.equal(read_all(table), values(2, ROWS))
        if then == "lose power":
            system.power_loss()
        volume.close()
        volume, table = open_table(folder)
        assert volume.epoch in ((2,) if then == "restore" else (3,) if done else (2, 3))
        assert torch.equal(read_all(table), values(volume.epoch, ROWS))
        volume.close()
        shutil.rmtree(folder)
        if done:
            break
    assert failed >= 4


# -- going back


def assert_serves_nothing(volume: SsdVolume, table: VolumeTable) -> None:
    refusal = r"holds nothing to serve: its restore of epoch 1 .* Restore again, that epoch or"
    for use in (
        lambda: read_all(table),
        lambda: table.put(torch.arange(1), values(4, 1)),
        volume.flush,
        lambda: volume.checkpoint(3),
    ):
        with pytest.raises(VolumeError, match=refusal):
            use()


@pytest.mark.parametrize("then", ["restore again", "restore another", "open again"])
@pytest.mark.parametrize("fault", [Fault.read_error, Fault.open_error, Fault.short_read])
def test_a_restore_that_fails_anywhere_loses_no_checkpoint_and_the_volume_serves_nothing_half(fault, then: str) -> None:
    failed = refused = 0
    for countdown in range(100):
        folder, system, volume, table = fresh()
        for epoch in (1, 2):
            table.put(torch.arange(ROWS), values(epoch, ROWS))
            volume.checkpoint(epoch)
        table.put(torch.arange(5), values(3, 5))
        volume.flush()
        named = {p.name for p in Path(folder).glob("*_*")}
        system.arm(fault, countdown)
        try:
            volume.restore(1)
            done = True
            assert volume.epochs == [1]
            system.arm(fault, 1 << 40)  # later than anything here
            assert torch.equal(read_all(table), values(1, ROWS))
        except VolumeIoError as e:
            done = False
            failed += 1
            if "cannot sync folder" in str(e):  # that it forgot the later epoch is all that is left to do
                assert volume.epochs == [1]
                named.remove("manifest_0000000000000002.bin")
            else:
                assert volume.epochs == [1, 2]
            assert named <= {p.name for p in Path(folder).glob("*_*")}
            try:
                assert torch.equal(read_all(table)[:5], values(3, 5)), "it failed before it began"
            except VolumeError:
                refused += 1
                assert_serves_nothing(volume, table)
            want = 1 if then == "restore again" else volume.epochs[-1]
            if then == "open again":
                volume.close()
                volume, table = open_table(folder)
            else:
                volume.restore(want)
            assert torch.equal(read_all(table), values(want, ROWS))
            table.put(torch.arange(1), values(5, 1))
            volume.checkpoint(3)
        volume.close()
        shutil.rmtree(folder)
        if done:
            break
    if fault != Fault.short_read:  # those are read on
        assert failed >= 3
        assert refused >= 2


@pytest.mark.parametrize("mapped", [False, True])
def test_the_end_of_a_block_that_was_wiped_is_noticed_when_it_is_replayed(tmp_path: Path, mapped: bool) -> None:
    kind = PmemVolume if mapped else SsdVolume
    volume = kind((str(tmp_path),), CAPACITY)
    table = volume.table("t", row_count=ROWS, record_bytes=RECORD_BYTES)
    table.put(torch.arange(3), values(1, 3))
    volume.checkpoint(1)
    volume.close()
    (segment,) = tmp_path.glob("segment_*")
    with segment.open("r+b") as file:
        file.seek(4096 + 2 * (RECORD_BYTES + 28))  # a stride is 24 + 700, on 8 bytes: the third record
        assert any(file.read(RECORD_BYTES))
        file.seek(4096 + 2 * (RECORD_BYTES + 28))
        file.write(bytes(RECORD_BYTES + 28))
    with pytest.raises(DamagedRecordError, match=r"counts 3 records in its 1 blocks, there are 2: the end of a block was wiped"):
        kind((str(tmp_path),), CAPACITY)


# -- mapped files


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (Fault.open_error, VolumeIoError, "Input/output error"),
        (Fault.no_space, VolumeFullError, "No space left on device"),
        (Fault.map_error, VolumeIoError, "Cannot allocate memory"),
    ],
)
def test_a_cache_file_that_cannot_be_had_is_a_typed_error_and_leaves_nothing(tmp_path: Path, fault, error, message: str) -> None:
    system = _core.FaultySystem(1)
    cached = CachedVolume(MemoryVolume(), system=system)
    caches = [PmemCache(path=str(tmp_path), rows=10)]
    system.arm(fault, 0)
    with pytest.raises(error, match=message):
        cached.cached_table("t", row_count=ROWS, record_bytes=RECORD_BYTES, caches=caches)
    assert system.struck() == 1
    table = cached.cached_table("t", row_count=ROWS, record_bytes=RECORD_BYTES, caches=caches)
    table.put(torch.arange(ROWS), values(1, ROWS))
    assert torch.equal(read_all(table), values(1, ROWS))
    cached.close()
    del system, cached, table
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", [Fault.open_error, Fault.no_space, Fault.map_error])
def test_a_mapped_volume_that_gets_no_segment_says_so_and_goes_on_when_it_can(tmp_path: Path, fault) -> None:
    system = _core.FaultySystem(1)
    volume = PmemVolume((str(tmp_path),), CAPACITY, system=system)
    table = volume.table("t", row_count=ROWS, record_bytes=RECORD_BYTES)
    system.arm(fault, 0)
    with pytest.raises(VolumeFullError if fault == Fault.no_space else VolumeIoError):
        table.put(torch.arange(ROWS), values(1, ROWS))
    assert system.struck() == 1
    table.put(torch.arange(ROWS), values(2, ROWS))
    volume.checkpoint(1)
    volume.close()
    for fault_at_open in (Fault.open_error, Fault.map_error):
        again = _core.FaultySystem(2)
        again.arm(fault_at_open, 0)
        with pytest.raises(VolumeIoError):
            PmemVolume((str(tmp_path),), CAPACITY, system=again)
    volume = PmemVolume((str(tmp_path),), CAPACITY, system=system)
    assert torch.equal(read_all(volume.table("t", row_count=ROWS, record_bytes=RECORD_BYTES)), values(2, ROWS))
    volume.close()
