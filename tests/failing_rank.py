"""Trains on every rank until one fails. Run by torchrun: ``failing_rank.py FAILURE RANK PATH``."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from itertools import count

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mtrains as mtrains
from dmp_twins import Job, Table, batch, collection, plan
from torchrec_mtrains import SsdHome

AT = 5  # the step
ROWS = 100_000  # more than 2 MiB of records
STACKS_AFTER_S = 120  # guess: far above what a rank takes to end, and below what the test waits


class Model(nn.Module):
    """A collection and a loss, as a pipeline wants them."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.ebc, self.over = collection(job), nn.Linear(4, 1)

    def forward(self, ids: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = self.over(self.ebc(ids).values().reshape(-1, 4)).sum()
        return loss, loss.detach()


def wait_for_ever() -> None:
    """As native code does: no signal interrupts it."""
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)


def batches(job: Job, failure: str | None) -> Iterator[KeyedJaggedTensor]:
    """Endless ones; what a rank's failure is comes at step ``AT``."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in count():
        ids = batch(job, generator)
        if step == AT and failure == "input":
            raise ValueError("line 7 of the data has 3 fields, not 4")
        if step == AT and failure == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == AT and failure == "stuck":
            wait_for_ever()
        if step == AT and failure == "id":
            ids.values()[0] = ROWS
        yield ids


def main() -> None:
    faulthandler.dump_traceback_later(STACKS_AFTER_S)
    failure, failing, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    print(f"rank {dist.get_rank()}", flush=True)
    mine = failure if dist.get_rank() == failing else None
    if failure == "stuck" and dist.get_rank() == 0:
        mine = "input"
    job = Job([Table(ROWS, 4, ["a"], 2400, rank=failing), Table(ROWS, 4, ["b"], 0, sharding="row_wise", tiered=False)], batch_size=200)
    home = SsdHome((path,), capacity_bytes=2 << 20 if failure == "full" else 64 << 20)
    with mtrains.fail_together():
        module_plan = plan(job, True, home)
        module_plan.plan["ebc"] = module_plan.plan.pop("")
        sharders = mtrains.sharders(job.fused_params())
        dmp = DistributedModelParallel(Model(job), device=torch.device("cpu"), plan=module_plan, sharders=sharders)
        dense = KeyedOptimizerWrapper(dict(dmp.module.over.named_parameters()), lambda p: torch.optim.SGD(p, lr=0.1))
        pipeline = TrainPipelineSparseDist(dmp, dense, torch.device("cpu"))
        feed = batches(job, mine)
        while True:
            pipeline.progress(feed)


if __name__ == "__main__":
    main()
