"""A volume that has the room of docs/checkpoints.md is never full, whatever lives, commits and puts come, if its wishes are served."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torchrec_mtrains.kernels import PmemVolume, SsdVolume
from torchrec_mtrains.planner.charges import live_bytes

from strategies import PMEM
from torchrec_mtrains.errors import VolumeFullError

RECORD_BYTES = (232, 40)
ROWS, IN_USE = 50_000, 6_250
SEGMENT_BYTES, BLOCK_BYTES, STREAMS = 128 << 10, 4096, 2


def enough_bytes(put_rows: int, keep: int) -> int:
    """The formula of docs/checkpoints.md."""
    live = sum(live_bytes(IN_USE, size) for size in RECORD_BYTES)
    step = sum(live_bytes(put_rows, size) for size in RECORD_BYTES)
    step += 2 * len(RECORD_BYTES) * BLOCK_BYTES + (STREAMS + 1) * SEGMENT_BYTES
    log = (math.sqrt(live) + math.sqrt((keep + 1) * step)) ** 2
    return math.ceil(log * SEGMENT_BYTES / (SEGMENT_BYTES - BLOCK_BYTES)) + STREAMS * SEGMENT_BYTES + (64 << 10)


class Job:
    """Puts steps, commits, dies and goes on from a checkpoint that is kept. ``versions`` holds a number for every row."""

    def __init__(self, kind: type[SsdVolume | PmemVolume], folder: str, capacity_bytes: int, keep: int, put_rows: int, seed: int) -> None:
        self.kind, self.folder, self.capacity_bytes, self.keep, self.put_rows = kind, folder, capacity_bytes, keep, put_rows
        self.small_share, self.in_turn = (seed % 3) * 0.49, seed % 5 == 0
        self.random = torch.Generator().manual_seed(seed)
        self.versions = torch.zeros(len(RECORD_BYTES), IN_USE, dtype=torch.uint8)
        self.committed: dict[int, torch.Tensor] = {}
        self.epoch = self.moved_rows = 0
        self.open()

    def open(self) -> None:
        self.volume = self.kind((self.folder,), self.capacity_bytes, keep_checkpoints=self.keep)
        self.tables = [self.volume.table(f"t{size}", row_count=ROWS, record_bytes=size) for size in RECORD_BYTES]

    def step(self) -> None:
        small = torch.rand(1, generator=self.random) < self.small_share  # steps are not alike
        for t, table in enumerate(self.tables):
            count = 1 + self.put_rows // 20 if small else self.put_rows
            rows = torch.randperm(IN_USE, generator=self.random)[:count]
            if self.in_turn:
                rows = (int(rows[0]) // 100 * 100 + torch.arange(count)) % IN_USE
            self.versions[t, rows] += 1
            table.put(rows, self.versions[t, rows][:, None].expand(-1, table.record_bytes).contiguous())
        if self.volume.wants_checkpoint:
            self.commit()

    def commit(self) -> None:
        self.epoch += 1
        self.volume.checkpoint(self.epoch)
        self.committed[self.epoch] = self.versions.clone()
        self.committed = {e: self.committed[e] for e in sorted(self.committed)[-self.keep :]}
        assert self.volume.epochs == sorted(self.committed), "a checkpoint that should be kept is gone"

    def die(self, oldest: bool) -> None:
        self.moved_rows += self.volume.stats()["moved_rows"]
        self.volume.close()
        self.open()
        if self.committed:
            self.epoch = min(self.committed) if oldest else max(self.committed)
            self.volume.restore(self.epoch)
        self.versions = self.committed.get(self.epoch, torch.zeros_like(self.versions)).clone()
        self.committed = {e: v for e, v in self.committed.items() if e <= self.epoch}
        for t, table in enumerate(self.tables):
            out = torch.empty(IN_USE, table.record_bytes, dtype=torch.uint8)
            table.get(torch.arange(IN_USE), out)
            assert torch.equal(out, self.versions[t][:, None].expand(-1, table.record_bytes))


lives = st.lists(
    st.tuples(
        st.lists(st.integers(0, 29), min_size=1, max_size=3),  # steps before each commit
        st.integers(0, 29),  # that are lost
        st.booleans(),  # whether it goes on from the oldest kept checkpoint
    ),
    min_size=1,
    max_size=16,
)


def check(examples: int, steps_per_life: int, kind: type[SsdVolume | PmemVolume], folder: Path) -> int:
    """How many rows were moved by cleaning."""
    moved = 0

    @settings(
        max_examples=examples, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), derandomize=examples < 50
    )
    @given(lives, st.sampled_from((1, 2, 3)), st.sampled_from((50, 200, 800)), st.integers(0, 1 << 30))
    def run(lives: list[tuple[list[int], int, bool]], keep: int, put_rows: int, seed: int) -> None:
        nonlocal moved
        with tempfile.TemporaryDirectory(dir=folder) as path:
            job = Job(kind, path, enough_bytes(put_rows, keep), keep, put_rows, seed)
            try:
                for commits, lost, oldest in lives * steps_per_life:
                    for steps in commits:
                        for _ in range(steps):
                            job.step()
                        job.commit()
                    for _ in range(lost):
                        job.step()
                    job.die(oldest)
                moved += job.moved_rows
            finally:
                job.volume.close()

    run()
    return moved


def test_no_put_is_refused_in_any_sequence_of_lives_with_the_room_of_the_formula() -> None:
    assert check(6, 2, PmemVolume, PMEM) > 0, "nothing was ever cleaned"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PmemVolume, SsdVolume])
def test_no_put_is_refused_in_many_sequences_of_lives_with_the_room_of_the_formula(kind: type[SsdVolume | PmemVolume]) -> None:
    assert check(60, 4, kind, PMEM if kind is PmemVolume else Path.cwd()) > 0, "nothing was ever cleaned"


def test_a_volume_with_too_little_room_names_what_is_enough() -> None:
    with tempfile.TemporaryDirectory(dir=PMEM) as folder:
        job = Job(PmemVolume, folder, 3 << 20, 2, 200, 3)

        def overfill() -> None:
            for _ in range(200):
                job.step()
                if job.epoch % 2 == 0:
                    job.commit()

        with pytest.raises(VolumeFullError, match=r"Raise capacity_bytes \((\d+) are enough for these rows and steps") as refused:
            overfill()
        job.volume.close()
        enough = int(str(refused.value).split("Raise capacity_bytes (")[1].split()[0])
        assert 0.8 < enough / enough_bytes(200, 2) < 1.2


def test_a_wish_stands_until_the_next_commit() -> None:
    with tempfile.TemporaryDirectory(dir=PMEM) as folder:
        volume = PmemVolume((folder,), 8 << 20)
        table = volume.table("t", row_count=2000, record_bytes=1000)
        records = torch.ones(1000, 1000, dtype=torch.uint8)
        table.put(torch.arange(1000), records)
        volume.checkpoint(1)
        while not volume.wants_checkpoint:
            table.put(torch.arange(1000, 2000)[:200], records[:200])
        for _ in range(20):  # dead before any checkpoint names them: room comes without one
            table.put(torch.arange(1000, 2000)[:200], records[:200])
            assert volume.wants_checkpoint
        volume.checkpoint(2)
        volume.checkpoint(3)
        assert not volume.wants_checkpoint
        volume.close()
