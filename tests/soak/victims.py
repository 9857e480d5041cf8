"""The processes that the soak kills: forked from a parent that has imported everything and started no thread.

A victim is one rank of the soak's job. It says in shared memory what it is doing and how many records its cleaner has moved,
writes down every loss, and goes on until it is killed or done. Rank 0 pushes every third checkpoint; a job whose disk is said
to be lost pulls it back first.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import soak_job
import torch
import torch.distributed as dist
from torchrec_mtrains.kernels import SsdVolume, durability

from torchrec_mtrains import show
from torchrec_mtrains.checkpoint_folder import LATEST
from torchrec_mtrains.checkpoint_transfer import pull, push
from torchrec_mtrains.groups import tiered_groups
from torchrec_mtrains.train import Job, StepRecord

# After every checkpoint, if there is room: by default one would come with the first gigabytes of log.
SsdVolume.__init__.__kwdefaults__["snapshot_after_bytes"] = 0

PHASES = ("fork", "open", "train", "checkpoint", "push", "pull", "end")
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
PUSH_EVERY = 3  # checkpoints
PEER_TIMEOUT_S = 60  # guess: far above the longest wait for another rank
LOOK_AT_CLEANER_EVERY_S = 0.0005


class Phases:
    """Of each rank two numbers, shared by parent and victims: its phase, and the records that its cleaner has moved."""

    def __init__(self, ranks: int) -> None:
        self._bytes = mmap.mmap(-1, 16 * ranks)
        self.ranks = ranks

    def reset(self) -> None:
        self._bytes[:] = bytes(16 * self.ranks)

    def mark(self, rank: int, phase: str) -> None:
        struct.pack_into("q", self._bytes, 16 * rank, PHASES.index(phase))

    def of(self, rank: int) -> str:
        return PHASES[struct.unpack_from("q", self._bytes, 16 * rank)[0]]

    def mark_moved(self, rank: int, rows: int) -> None:
        struct.pack_into("q", self._bytes, 16 * rank + 8, rows)

    def moved(self, rank: int) -> int:
        return struct.unpack_from("q", self._bytes, 16 * rank + 8)[0]


class Life:
    """The folders of one job, from its first step to its last, over many kills."""

    def __init__(self, root: Path) -> None:
        self.root, self.ssd, self.checkpoint, self.dest = root, root / "ssd", root / "checkpoint", root / "dest"
        self.lost = root / "disk_is_lost"

    def losses(self, rank: int) -> Path:
        return self.root / f"losses_{rank}"

    def snapshots(self, rank: int) -> Iterator[Path]:
        return (self.ssd / f"rank_{rank}").glob("index_*.bin")


class _Job(Job):
    """Says what it is doing."""

    def __init__(self, phases: Phases, life: Life, rank: int, *job: object) -> None:
        self._phases, self._life, self._rank, self._ends = phases, life, rank, threading.Event()
        phases.mark(rank, "open")
        super().__init__(*job)
        phases.mark(rank, "train")
        sys.setswitchinterval(LOOK_AT_CLEANER_EVERY_S)
        self._looks = threading.Thread(target=self._look_at_cleaner, daemon=True)
        self._looks.start()

    def save(self, wanted: bool = False) -> None:
        self._phases.mark(self._rank, "checkpoint")
        super().save(wanted)
        if self._rank == 0 and len(self.checkpoints) % PUSH_EVERY == 1:
            self._phases.mark(0, "push")
            push(self._life.checkpoint, [str(self._life.ssd)], self._life.dest)
        self._phases.mark(self._rank, "train")

    def _look_at_cleaner(self) -> None:
        volumes = list(durability.volumes(tiered_groups(self.dmp)))
        while not self._ends.wait(LOOK_AT_CLEANER_EVERY_S):
            self._phases.mark_moved(self._rank, sum(volume.stats()["moved_rows"] for volume in volumes))

    def close(self) -> None:
        self._ends.set()
        self._looks.join()
        super().close()


def _group(rank: int, ranks: int, store: Path) -> None:
    timeout = timedelta(seconds=PEER_TIMEOUT_S)
    if ranks == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)


def _train(rank: int, phases: Phases, life: Life, store: Path) -> None:
    _group(rank, phases.ranks, store)
    if rank == 0 and life.lost.exists():
        phases.mark(0, "pull")
        pull(life.dest, life.checkpoint, [str(life.ssd)])
        life.lost.unlink()
    dist.barrier()
    job = soak_job.options(
        life.ssd,
        checkpoint=str(life.checkpoint),
        checkpoint_every=soak_job.CHECKPOINT_EVERY,
        resume=(life.checkpoint / LATEST).exists(),
    )
    with life.losses(rank).open("a", buffering=1) as out:
        trained = _Job(phases, life, rank, soak_job.source(rank, phases.ranks), job, dist.group.WORLD)

        def write_down(step: StepRecord) -> None:
            print(json.dumps([step.number, step.loss.hex()]), file=out)

        trained.train(soak_job.STEPS, write_down)
        trained.save()
        phases.mark(rank, "end")
        print(json.dumps(["auc", float(trained.evaluate()[0]).hex()]), file=out)
        trained.close()
    dist.barrier()


def _undisturbed(rank: int, ranks: int, store: Path, out: Path) -> None:
    _group(rank, ranks, store)
    job = Job(soak_job.source(rank, ranks), soak_job.options(None), dist.group.WORLD)
    losses: list[str] = []
    job.train(soak_job.STEPS, lambda step: losses.append(step.loss.hex()))
    aside = out.with_suffix(".tmp")
    aside.write_text(json.dumps({"losses": losses, "auc": float(job.evaluate()[0]).hex()}))
    dist.barrier()
    aside.rename(out)


def _fork(errors: Path, body: object, *arguments: object) -> int:
    pid = os.fork()
    if pid:
        return pid
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a soak that is stopped leaves no victim behind
    try:
        handle = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        show.quiet()
        torch.set_num_threads(1)
        body(*arguments)  # type: ignore[operator]
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def fork_victims(phases: Phases, life: Life, store: Path) -> list[int]:
    """One process a rank; what they say on stderr is in ``life.root / errors_<rank>``."""
    phases.reset()
    store.unlink(missing_ok=True)
    return [_fork(life.root / f"errors_{r}", _train, r, phases, life, store) for r in range(phases.ranks)]


def fork_undisturbed(ranks: int, root: Path) -> list[int]:
    """The same job in memory, never killed; ``root / undisturbed_<rank>.json`` is what came out."""
    store = root / "undisturbed_store"
    store.unlink(missing_ok=True)
    return [_fork(root / "errors", _undisturbed, r, ranks, store, root / f"undisturbed_{r}.json") for r in range(ranks)]


def new_life(root: Path) -> Life:
    """Empty folders."""
    shutil.rmtree(root, ignore_errors=True)
    life = Life(root)
    life.ssd.mkdir(parents=True)
    return life
