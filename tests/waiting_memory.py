"""A planned job in a ``TieredTrainPipeline``, and what it holds of batches that wait for their turn."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec_mtrains.planner import CheckpointSchedule, TieredShardingPlanner, TieredTopology

import torchrec_mtrains as mtrains
from chain_memory import resident_bytes
from planner_cases import PLENTY, Case
from torchrec_mtrains.batch_bytes import batch_bytes
from torchrec_mtrains.lookahead import useful_batches

STEPS = 100


class _Model(nn.Module):
    def __init__(self, ebc: nn.Module) -> None:
        super().__init__()
        self.ebc = ebc

    def forward(self, ids: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = self.ebc(ids).values()
        return values.sum(), values.detach()


def _batches(case: Case, seed: int) -> Iterator[KeyedJaggedTensor]:
    random = torch.Generator().manual_seed(seed)
    features = [(f"t{i}f{j}", t.rows, int(p)) for i, t in enumerate(case.tables) for j, p in enumerate(t.pooling)]
    lengths = torch.cat([torch.full((case.batch_size,), pooling, dtype=torch.int32) for _, _, pooling in features])
    while True:
        ids = [torch.randint(0, rows, (case.batch_size * pooling,), generator=random) for _, rows, pooling in features]
        yield KeyedJaggedTensor(keys=[name for name, *_ in features], values=torch.cat(ids), lengths=lengths.clone())


class WaitingJob:
    """One rank's part, planned with ``ddr`` bytes of memory, and trained for ``STEPS`` steps."""

    def __init__(self, case: Case, ddr: int, ssd: str, lookahead_bytes: int) -> None:
        sharders = mtrains.sharders(fused_params={"optimizer": case.optimizer, "learning_rate": 0.1})
        model = nn.ModuleDict({"ebc": _Model(case.model()["ebc"])})["ebc"]
        topology = TieredTopology(case.world_size, ddr_budget_bytes=ddr, ssd=mtrains.SsdHome((ssd,), PLENTY >> 8))
        self.planner = TieredShardingPlanner(
            topology,
            batch_size=case.batch_size,
            constraints=case.constraints(),
            checkpoints=CheckpointSchedule(keep=0),
            lookahead_bytes=lookahead_bytes,
            search_seconds=0.05,
        )
        self.plan = self.planner.collective_plan(model, sharders, dist.group.WORLD)
        self.dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=self.plan, sharders=sharders)
        optimizer = self.dmp.fused_optimizer
        self.pipeline = mtrains.TieredTrainPipeline(self.dmp, optimizer, torch.device("cpu"), lookahead_bytes=lookahead_bytes)
        data = _batches(case, seed=dist.get_rank())
        for _ in range(STEPS):
            self.pipeline.progress(data)

    @property
    def held_bytes(self) -> int:
        """Of all batches in flight, once a step has ended."""
        return batch_bytes(*self.pipeline.batches, *(c.module_input_post_prefetch.values() for c in self.pipeline.contexts))


def _measured(there: Any, case: Case, ddr: int, ssd: str, lookahead_bytes: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    job = WaitingJob(case, ddr, ssd, lookahead_bytes)
    window, held = job.pipeline.lookahead, job.held_bytes
    before, _ = resident_bytes()
    job.pipeline.reset()
    wishes = {
        table.name: useful_batches(group.pool_rows[i] / group._rows_of_a_batch(i))
        for group in mtrains.tiered_groups(job.dmp)
        for i, table in enumerate(group.tables)
    }
    there.send((window, wishes, held, before - resident_bytes()[0]))
    dist.destroy_process_group()


def measured(case: Case, ddr: int, ssd: str, lookahead_bytes: int) -> tuple[int, dict[str, int], int, int]:
    """Of one rank, in a process of its own: the window, the one that each table's pool could use, bytes of tensors in flight, and memory
    that is free without them."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_measured, args=(there, case, ddr, ssd, lookahead_bytes))
    child.start()
    there.close()
    result: tuple[int, dict[str, int], int, int] = here.recv()
    child.join()
    return result
