"""The soak: a job is killed at random instants until it has been killed often enough, and must end with the bits of one that was not.

Half of the kills come at an instant drawn from the whole time of an attempt; half wait for a phase that is short (open,
checkpoint, index snapshot, push, pull, cleaning) and come at an instant drawn from within it. An index snapshot is written
in the background of the others: it counts where the kill left the file short. So is cleaning: it counts where the cleaner moved
records in the last moment before the kill, which is told beside the phase. Of two ranks one or both are killed. Now and then the
disk is lost: volumes and checkpoints are removed, and the job has to pull what it pushed last.

What must hold, at every kill: each step that was trained has the loss of the undisturbed run, on every rank; no step is
skipped; the job resumes. A victim that ends by itself with an error, or hangs, fails the soak.

The soak keeps its state in a folder and goes on from there when it is started again. SIGKILL leaves the page cache: power
loss is another test's.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")  # a parent that forks has one thread

import argparse
import json
import math
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import soak_job
import victims
from victims import Life, Phases

HANG_S = 120  # without a new phase or loss; guess: far above the longest step or checkpoint
LONGEST_DELAY_S = 1.0  # of a kill that waits for no phase: some 20 steps
SNAPSHOT, CLEANING = "index snapshot", "cleaning"
# Typical s a phase lasts, measured.
TARGETS = {"open": 0.02, "checkpoint": 0.05, SNAPSHOT: 0.0002, "push": 0.02, "pull": 0.02, CLEANING: 0.001}
MOMENT_S = 0.002  # the cleaner is at work if it moved records in the last one
LOSE_DISK_SHARE = 0.1  # of the attempts


def bytes_of(file: Path) -> int | None:
    """None for a file that has been removed meanwhile."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


class SoakFailure(Exception):
    """What went wrong, and where the evidence is."""


class Soak:
    """``root`` holds state.json, the undisturbed run, and the life that is going on."""

    def __init__(self, root: Path, ranks: int, seed: int | None) -> None:
        self.root, self.phases, self.ranks = root, Phases(ranks), ranks
        self.moved, self.moved_at = 0, -math.inf  # records that the watched rank's cleaner has moved; when that was last seen to change
        self.file = root / "state.json"
        root.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            self.state = json.loads(self.file.read_text())
            if self.state["ranks"] != ranks or (seed is not None and seed != self.state["seed"]):
                raise SoakFailure(f"{self.file} belongs to a soak of {self.state['ranks']} ranks, seed {self.state['seed']}; remove it")
            self.life = Life(root / "life")
        else:
            seed = random.randrange(1 << 30) if seed is None else seed
            self.state = {"ranks": ranks, "seed": seed, "kills": 0, "attempts": 0, "lives": 0, "losses": 0, "disks": 0, "phases": {}}
            self.life = victims.new_life(root / "life")
        self.expected = [self._undisturbed(rank) for rank in range(ranks)]
        self.save()

    def save(self) -> None:
        aside = self.file.with_suffix(".tmp")
        aside.write_text(json.dumps(self.state))
        aside.rename(self.file)

    def _undisturbed(self, rank: int) -> dict:
        if not (self.root / f"undisturbed_{rank}.json").exists():
            for pid in victims.fork_undisturbed(self.ranks, self.root):
                if os.waitpid(pid, 0)[1]:
                    raise SoakFailure(f"the undisturbed run failed:\n{(self.root / 'errors').read_text()}")
        return json.loads((self.root / f"undisturbed_{rank}.json").read_text())

    # -- one attempt

    def attempt(self) -> None:
        """Fork, kill unless it is done first, and compare."""
        rng = random.Random(f"{self.state['seed']} {self.state['attempts']}")
        self.state["attempts"] += 1
        self._prepare(rng)
        for rank in range(self.ranks):
            self.life.losses(rank).unlink(missing_ok=True)
            (self.life.root / f"errors_{rank}").unlink(missing_ok=True)
        pids = victims.fork_victims(self.phases, self.life, self.root / "store")
        status = dict.fromkeys(range(self.ranks))
        watched = rng.randrange(self.ranks)
        self._wait_for_the_instant(rng, pids, status, watched)
        phase = self._phase(watched) + (f", {CLEANING}" if self._cleaning(watched) else "")
        both, gap_s = rng.random() < 0.5, rng.random() * 0.05
        done = all(s is not None for s in status.values())
        if not done:
            self._kill(pids, status, watched)
            if not both:
                time.sleep(gap_s)
            for rank in range(self.ranks):
                self._kill(pids, status, rank)
            self.state["kills"] += 1
            self.state["phases"][phase] = self.state["phases"].get(phase, 0) + 1
        self._check_ends(status)
        self._compare(done)
        if done:
            self.state["lives"] += 1
            self.life = victims.new_life(self.life.root)
        self.save()

    def _phase(self, rank: int) -> str:
        """What a rank is doing. An index snapshot is being written while its file is short."""
        phase = self.phases.of(rank)
        if phase in ("fork", "open", "pull"):  # a short file is an earlier victim's
            return phase
        whole = soak_job.snapshot_bytes(rank, self.ranks)
        sizes = [bytes_of(file) for file in self.life.snapshots(rank)]
        return SNAPSHOT if any(size is not None and size < whole for size in sizes) else phase

    def _cleaning(self, rank: int) -> bool:
        """Whether the rank's cleaner moved records in the last moment. What happens between two calls counts for the later one."""
        moved, now = self.phases.moved(rank), time.monotonic()
        if moved != self.moved:
            self.moved, self.moved_at = moved, now
        return now < self.moved_at + MOMENT_S

    def _prepare(self, rng: random.Random) -> None:
        lose = rng.random() < LOSE_DISK_SHARE
        if self.life.lost.exists() or (lose and (self.life.dest / "LATEST").exists()):
            if not self.life.lost.exists():
                self.life.lost.touch()
                self.state["disks"] += 1
                for path in (self.life.ssd, self.life.checkpoint):
                    shutil.rmtree(path, ignore_errors=True)
                self.life.ssd.mkdir()
        elif not (self.life.checkpoint / "LATEST").exists():  # a job that never committed begins anew
            shutil.rmtree(self.life.ssd)
            self.life.ssd.mkdir()

    def _wait_for_the_instant(self, rng: random.Random, pids: list[int], status: dict, watched: int) -> None:
        mine = [p for p in TARGETS if watched == 0 or p not in ("push", "pull")]
        targets = ["pull"] if "pull" in mine and self.life.lost.exists() else [p for p in mine if p != "pull"]
        target = rng.choice(targets) if rng.random() < 0.5 else None
        count = 0 if target in ("open", "pull", SNAPSHOT) else rng.randrange(3)  # so many of them pass by; these three come seldom
        self.moved, self.moved_at = 0, -math.inf
        start = time.monotonic()
        until = start + rng.random() * LONGEST_DELAY_S if target is None else float("inf")
        armed, before = False, False
        progress, since = self._progress(), start
        while time.monotonic() < until:
            self._reap(pids, status)
            if any(status.values()):
                ended = {rank: (self.life.root / f"errors_{rank}").read_text() for rank, code in status.items() if code}
                for rank in range(self.ranks):
                    self._kill(pids, status, rank)
                raise SoakFailure(f"attempt {self.state['attempts']}: ended by itself, in {self.life.root}: {ended}")
            if None not in status.values():
                return
            cleaning = self._cleaning(watched)
            if target is not None and not armed:
                there = cleaning if target == CLEANING else self._phase(watched) == target
                if there and not before:
                    armed, count = count == 0, count - 1
                before = there
                if armed:
                    until = time.monotonic() + rng.random() * TARGETS[target]
            if (now := self._progress()) != progress:
                progress, since = now, time.monotonic()
            if time.monotonic() > since + HANG_S:
                raise SoakFailure(f"attempt {self.state['attempts']} hangs in {self.phases.of(watched)!r}; see {self.life.root}")
            time.sleep(0.0002)

    def _progress(self) -> list[tuple[str, int | None]]:
        return [(self.phases.of(rank), bytes_of(self.life.losses(rank))) for rank in range(self.ranks)]

    def _reap(self, pids: list[int], status: dict) -> None:
        for rank, pid in enumerate(pids):
            if status[rank] is None:
                ended, code = os.waitpid(pid, os.WNOHANG)
                if ended:
                    status[rank] = os.waitstatus_to_exitcode(code)

    def _kill(self, pids: list[int], status: dict, rank: int) -> None:
        if status[rank] is None:
            os.kill(pids[rank], signal.SIGKILL)
            status[rank] = os.waitstatus_to_exitcode(os.waitpid(pids[rank], 0)[1])

    # -- what must hold

    def _check_ends(self, status: dict) -> None:
        """Between the kill of one rank and that of the other, the other may have lost its peer: only that is an error allowed."""
        for rank, code in status.items():
            if code not in (0, -signal.SIGKILL) and -signal.SIGKILL not in status.values():
                errors = (self.life.root / f"errors_{rank}").read_text()
                raise SoakFailure(f"attempt {self.state['attempts']}: rank {rank} ended with {code}:\n{errors}")

    def _compare(self, done: bool) -> None:
        for rank, expected in enumerate(self.expected):
            path = self.life.losses(rank)
            lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last one may be half
            entries = [json.loads(line) for line in lines]
            auc = dict(e for e in entries if e[0] == "auc")
            steps = [e for e in entries if e[0] != "auc"]
            for at, (number, loss) in enumerate(steps):
                if number != steps[0][0] + at or loss != expected["losses"][number - 1]:
                    raise SoakFailure(
                        f"attempt {self.state['attempts']}, rank {rank}: step {number} has loss {loss}, the undisturbed run "
                        f"{expected['losses'][number - 1]}; see {self.life.root}"
                    )
            if done and (auc.get("auc") != expected["auc"] or (steps and steps[-1][0] != len(expected["losses"]))):
                raise SoakFailure(f"attempt {self.state['attempts']}, rank {rank}: ended with {auc}, the undisturbed run {expected['auc']}")
            self.state["losses"] += len(steps)

    def summary(self) -> str:
        s = self.state
        phases = "; ".join(f"{phase} {count}" for phase, count in Counter(s["phases"]).most_common())
        return (
            f"{s['ranks']} rank(s), seed {s['seed']}: {s['kills']} kills in {s['attempts']} attempts ({phases}); "
            f"{s['losses']:,} losses compared, {s['lives']} jobs trained to their end, {s['disks']} disks lost and pulled back; "
            "no difference"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/soak"), help="state, volumes and checkpoints")
    parser.add_argument("--kills", type=int, default=1000, help="in all, those of earlier starts included")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    start, last = time.monotonic(), 0.0
    try:
        soak = Soak(args.folder.resolve() / f"ranks_{args.ranks}", args.ranks, args.seed)
        before = soak.state["kills"]
        print(f"seed {soak.state['seed']}, {before} kills so far, state in {soak.root}", flush=True)
        while soak.state["kills"] < args.kills:
            soak.attempt()
            if time.monotonic() - last > 30:
                last = time.monotonic()
                print(soak.summary(), flush=True)
    except SoakFailure as e:
        sys.exit(f"soak failed: {e}")
    print(f"{soak.summary()}; {(time.monotonic() - start) / max(1, soak.state['kills'] - before):.2f} s a kill")


if __name__ == "__main__":
    main()
