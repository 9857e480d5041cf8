"""Ranks of one host, a process each: NCCL where there are GPUs, gloo where there are none."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
import torch.distributed as dist


def device_of(rank: int) -> torch.device:
    """A GPU for each rank, or the processor for all."""
    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def on_ranks(world_size: int, run: Callable[..., Any], *arguments: Any, kill_when: Callable[[], bool] | None = None) -> list[Any] | None:
    """What ``run(rank, …)`` returns on each of ``world_size`` ranks; None when ``kill_when`` came true, and all were killed.

    Raises: SystemExit when a rank fails; its traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            context.Process(target=_serve, args=(rank, world_size, f"{folder}/store", ends[rank][1], run, arguments))
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        for _, there in ends:
            there.close()
        results: dict[int, Any] = {}
        while len(results) < world_size:
            if kill_when and kill_when():
                for rank in ranks:
                    os.kill(rank.pid or 0, signal.SIGKILL)
                for rank in ranks:
                    rank.join()
                return None
            for number, (here, _) in enumerate(ends):
                if number in results or not here.poll(0.005):
                    continue
                try:
                    results[number] = here.recv()
                except EOFError:  # its peers would wait for it for ever
                    for rank in ranks:
                        rank.kill()
                    sys.exit(f"{run.__name__} failed on rank {number}")
        for rank in ranks:
            rank.join()
        return [results[r] for r in range(world_size)]


def _serve(rank: int, world_size: int, store: str, there: Any, run: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    os.environ["LOCAL_RANK"] = str(rank)
    device = device_of(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
        there.send(run(rank, *arguments))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    there.close()
    dist.barrier()
    dist.destroy_process_group()


def once_there(file: Path, seconds: float) -> Callable[[], bool]:
    """Comes true so many seconds after the file came to be."""
    since: list[float] = []

    def passed() -> bool:
        if not since and file.exists():
            since.append(monotonic())
        sleep(0.001)
        return bool(since) and monotonic() > since[0] + seconds

    return passed
