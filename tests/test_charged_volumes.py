"""A volume of exactly the size that the planner charges takes every put of the job that it was charged for."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torchrec_mtrains.kernels import PmemVolume, SsdVolume
from torchrec_mtrains.planner import CheckpointSchedule
from torchrec_mtrains.planner.charges import block_bytes, capacity_for, log_bytes

from strategies import PMEM

Kind = type[SsdVolume] | type[PmemVolume]
RECORD_BYTES = (20, 36, 132, 260, 516, 1_028, 2_052, 4_100, 8_196, 16_388, 40_000)
TURNS = 6  # times that every row is put, about: the log is cleaned all the while


@dataclass
class Life:
    """``tables``: rows and bytes of a record. ``share``: of the rows that a step looks up. ``every_steps``: from one commit to the next.
    ``at_once``: what an interval has changed is put by one flush before its commit, else step by step. ``in_turn``: rows are
    replaced in turn, else at random."""

    tables: list[tuple[int, int]]
    keep: int
    share: float
    every_steps: int | None
    at_once: bool
    in_turn: bool
    seed: int

    @property
    def schedule(self) -> CheckpointSchedule:
        return CheckpointSchedule(self.every_steps, self.keep)

    def lookups(self, rows: int) -> int:
        return max(1, int(self.share * rows))

    @property
    def capacity_bytes(self) -> int:
        logs = sum(log_bytes(rows, size, self.lookups(rows), self.schedule, snapshots=False) for rows, size in self.tables)
        return capacity_for(logs, {block_bytes(size) for _, size in self.tables}, self.keep)


class Job:
    """Puts, and commits when it is time and when the volume asks. ``versions`` holds a number for every row."""

    def __init__(self, life: Life, kind: Kind, folder: str) -> None:
        self.life, self.random = life, torch.Generator().manual_seed(life.seed)
        self.volume = kind((folder,), life.capacity_bytes, keep_checkpoints=max(1, life.keep))
        self.tables = [self.volume.table(f"t{i}", row_count=rows, record_bytes=size) for i, (rows, size) in enumerate(life.tables)]
        self.versions = [torch.zeros(rows, dtype=torch.uint8) for rows, _ in life.tables]
        self.next_row = [0] * len(life.tables)
        self.changed = [torch.zeros(rows, dtype=torch.bool) for rows, _ in life.tables]
        self.epoch = 0

    def run(self) -> None:
        life = self.life
        for t, (rows, _) in enumerate(life.tables):
            self.put(t, torch.arange(rows))
        self.commit()
        every = life.every_steps or round(1 / life.share)
        for step in range(max(round(TURNS / life.share), 2 * every)):
            for t in range(len(self.tables)):
                rows = self.looked_up(t)
                if life.at_once:
                    self.changed[t][rows] = True
                else:
                    self.put(t, rows)
            due = (step + 1) % every == 0
            if due or (life.keep and self.volume.wants_checkpoint):
                for t, changed in enumerate(self.changed):
                    self.put(t, changed.nonzero().reshape(-1))
                    changed[:] = False
                self.commit()

    def looked_up(self, t: int) -> torch.Tensor:
        rows, _ = self.life.tables[t]
        count = self.life.lookups(rows)
        if not self.life.in_turn:
            return torch.randperm(rows, generator=self.random)[:count]
        first, self.next_row[t] = self.next_row[t], (self.next_row[t] + count) % rows
        return (first + torch.arange(count)) % rows

    def put(self, t: int, rows: torch.Tensor) -> None:
        self.versions[t][rows] += 1
        self.tables[t].put(rows, self.versions[t][rows][:, None].expand(-1, self.tables[t].record_bytes).contiguous())

    def commit(self) -> None:
        if self.life.keep:
            self.epoch += 1
            self.volume.checkpoint(self.epoch)
        else:
            self.volume.flush()

    def check(self) -> int:
        """Every row has its newest value. Returns how many rows cleaning moved."""
        for table, versions in zip(self.tables, self.versions, strict=True):
            out = torch.empty(table.row_count, table.record_bytes, dtype=torch.uint8)
            table.get(torch.arange(table.row_count), out)
            assert torch.equal(out, versions[:, None].expand(-1, table.record_bytes))
        stats = self.volume.stats()
        assert stats["disk_bytes"] <= self.volume.capacity_bytes
        return int(stats["moved_rows"])


@st.composite
def lives(draw: st.DrawFn) -> Life:
    tables = []
    for size in draw(st.lists(st.sampled_from(RECORD_BYTES), min_size=1, max_size=3)):
        live_bytes = draw(st.integers(1, 6 << 20))
        tables.append((max(1, live_bytes // max(size, 132)), size))
    every = draw(st.sampled_from((1, 3, 10, None)))
    share = draw(st.sampled_from((0.01, 0.05, 0.3, 1.0)))
    return Life(tables, draw(st.integers(0, 3)), share, every, draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 1 << 20)))


WHOLE_POOLS = Life([(12_000, 260), (30_000, 132), (90_000, 68)], 0, 1.0, 1, at_once=True, in_turn=False, seed=0)


def moved_rows(life: Life, kind: Kind, folder: Path | str) -> int:
    with tempfile.TemporaryDirectory(dir=folder) as path:
        job = Job(life, kind, path)
        try:
            job.run()
            return job.check()
        finally:
            job.volume.close()


def check(examples: int, kind: Kind, folder: Path | str) -> None:
    moved = 0

    @settings(
        max_examples=examples, deadline=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
        derandomize=examples < 50,
    )  # fmt: skip
    @given(lives())
    @example(WHOLE_POOLS)
    def run(life: Life) -> None:
        nonlocal moved
        moved += moved_rows(life, kind, folder)

    run()
    assert moved > 0, "nothing was ever cleaned"


def test_no_put_is_refused_in_the_charged_size() -> None:
    check(25, PmemVolume, PMEM)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PmemVolume, SsdVolume])
def test_no_put_is_refused_in_the_charged_size_in_many_lives(kind: Kind) -> None:
    check(300 if kind is PmemVolume else 60, kind, PMEM if kind is PmemVolume else Path.cwd())


@pytest.mark.parametrize("kind", [PmemVolume, SsdVolume])
def test_whole_pools_are_flushed_at_once_into_a_volume_of_the_charged_size(kind: Kind) -> None:
    assert moved_rows(WHOLE_POOLS, kind, PMEM if kind is PmemVolume else Path.cwd()) > 0
