"""Ranks of one host, a process each: NCCL where there are GPUs, gloo where there are none.

``Ranks`` keeps its processes from run to run. Each waits for (world size, rendezvous file, function, arguments), joins a process group of
that world, runs, answers with what the function returned and leaves the group. A world may be smaller than the processes are many: the
others wait. A run that fails, or is not done in time, ends the program, after every rank has said where each of its threads stands.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

_SAY_WHERE = signal.SIGUSR1
_STARTED = monotonic()


def device_of(rank: int) -> torch.device:
    """A GPU for each rank, or the processor for all."""
    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def say(what: str) -> None:
    """Prints it with this rank's number and the seconds since its process began."""
    sys.stdout.write(f"    rank {dist.get_rank()}, {monotonic() - _STARTED:.1f} s: {what}\n")  # at once: ranks share the stream
    sys.stdout.flush()


class Ranks:
    """So many processes."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._ends, self._processes = [], []
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there))
            process.start()
            there.close()
            self._ends.append(here)
            self._processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.kill()
        for end in self._ends:
            end.close()  # which a rank takes as the end
        for process in self._processes:
            process.join()

    def kill(self) -> None:
        """All at once, as a host that goes down does."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def run(
        self, world_size: int, run: Callable[..., Any], *arguments: Any, within_s: float, kill_when: Callable[[], bool] | None = None
    ) -> list[Any] | None:
        """What ``run(rank, …)`` returns on each of the first ``world_size``; None when ``kill_when`` came true, and all were killed.

        Raises: SystemExit when a rank fails, or they take longer than ``within_s``; why is on stderr.
        """
        with tempfile.TemporaryDirectory() as folder:
            for end in self._ends[:world_size]:
                end.send((world_size, f"{folder}/store", run, arguments))
            results: dict[int, Any] = {}
            last = monotonic() + within_s
            while len(results) < world_size:
                if kill_when and kill_when():
                    self.kill()
                    return None
                if monotonic() > last:
                    self._where()
                    sys.exit(f"{run.__name__} on {world_size} ranks took longer than {within_s:.0f} s; done: ranks {sorted(results)}")
                for number, here in enumerate(self._ends[:world_size]):
                    if number in results or not here.poll(0.005):
                        continue
                    try:
                        results[number] = here.recv()
                    except EOFError:  # its peers would wait for it for ever
                        self.kill()
                        sys.exit(f"{run.__name__} failed on rank {number}")
            return [results[r] for r in range(world_size)]

    def _where(self) -> None:
        """One after the other, since they share the stream."""
        for rank, process in enumerate(self._processes):
            print(f"rank {rank} stands at:", file=sys.stderr, flush=True)
            os.kill(process.pid or 0, _SAY_WHERE)
            sleep(0.5)


def _serve(rank: int, there: Any) -> None:
    faulthandler.register(_SAY_WHERE, all_threads=True)
    device = device_of(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        while True:
            try:
                world_size, store, run, arguments = there.recv()
            except EOFError:
                return
            os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
            dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
            result = run(rank, *arguments)
            gc.collect()
            dist.barrier()
            dist.destroy_process_group()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            there.send(result)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def once_there(file: Path, seconds: float) -> Callable[[], bool]:
    """Comes true so many seconds after the file came to be."""
    since: list[float] = []

    def passed() -> bool:
        if not since and file.exists():
            since.append(monotonic())
        sleep(0.001)
        return bool(since) and monotonic() > since[0] + seconds

    return passed
