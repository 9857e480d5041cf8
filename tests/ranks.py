"""A few gloo ranks that live through a whole test module, so that each example costs no process start.

They are forked by a server process that has imported what they need and has done nothing else: importing it takes seconds of processor time
in each of them otherwise. What the server was started with is not theirs: they get the environment of their own start.
"""

from __future__ import annotations

import os
import queue
import shutil
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ANSWER_TIMEOUT_S = 120  # guess: far above the longest example
GRACE_S = 5  # guess: how long the other ranks may take to fail once one has

FORKING = mp.get_context("forkserver")
FORKING.set_forkserver_preload(["hypothesis", "pytest", "torchrec_mtrains.train"])


def _serve(rank: int, world_size: int, environment: dict[str, str], store: str, tasks: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=ANSWER_TIMEOUT_S)
    )
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            answers.put((rank, True, function(*args)))
        except BaseException:
            answers.put((rank, False, traceback.format_exc()))
    dist.destroy_process_group()


class RankFailureError(AssertionError):
    """A function failed on one rank; the message holds every rank's traceback."""


class Ranks:
    """``world_size`` processes in one gloo group, as on nodes of ``local_world_size``.

    ``run`` calls a module-level function on each of them.
    """

    def __init__(self, world_size: int, local_world_size: int | None = None) -> None:
        self.world_size, self.local_world_size = world_size, local_world_size or world_size
        self._processes: list[Any] = []

    def _start(self) -> None:
        environment = {**os.environ, "LOCAL_WORLD_SIZE": str(self.local_world_size)}
        self._folder = Path(tempfile.mkdtemp())
        self._answers = FORKING.Queue()
        self._tasks = [FORKING.Queue() for _ in range(self.world_size)]
        self._processes = [
            FORKING.Process(
                target=_serve,
                args=(r, self.world_size, environment, str(self._folder / "store"), self._tasks[r], self._answers),
                daemon=True,
            )
            for r in range(self.world_size)
        ]
        for p in self._processes:
            p.start()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results by rank. Raises RankFailureError when a rank raised; the ranks are started anew by the next call."""
        if not self._processes:
            self._start()
        for tasks in self._tasks:
            tasks.put((function, args))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(results) + len(failures) < self.world_size:
            try:
                rank, good, value = self._answers.get(timeout=GRACE_S if failures else ANSWER_TIMEOUT_S)
            except queue.Empty:
                missing = set(range(self.world_size)) - results.keys() - failures.keys()
                failures |= {r: "no answer (waiting for another rank, or dead)" for r in missing}
                self._kill()
                break
            (results if good else failures)[rank] = value
        if failures:
            self._kill()
            raise RankFailureError("\n".join(f"rank {r}: {text}" for r, text in sorted(failures.items())))
        return [results[r] for r in range(self.world_size)]

    def _kill(self) -> None:
        for p in self._processes:
            p.kill()
            p.join()
        self._processes = []
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        if not self._processes:
            return
        for tasks in self._tasks:
            tasks.put(None)
        for p in self._processes:
            p.join(timeout=10)
        self._kill()
