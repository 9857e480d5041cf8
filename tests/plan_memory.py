"""What a plan takes of a process that trains it, tier by tier, measured in a process of its own."""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec_mtrains.kernels import SsdVolume
from torchrec_mtrains.planner import CheckpointSchedule, PmemDevice, TieredShardingPlanner, TieredTopology
from torchrec_mtrains.planner.charges import INDEX_BYTES_PER_ROW, block_bytes, capacity_for

import torchrec_mtrains as mtrains
from chain_memory import resident_bytes
from planner_cases import Case, TableCase


def _batch(case: Case, number: int) -> KeyedJaggedTensor:
    """The next rows of every table, in turn: so that every row is trained."""
    ids = [(torch.arange(case.batch_size) + number * case.batch_size) % table.rows for table in case.tables]
    keys = [f"t{i}f0" for i in range(len(case.tables))]
    return KeyedJaggedTensor(keys=keys, values=torch.cat(ids), lengths=torch.ones(len(keys) * case.batch_size, dtype=torch.int32))


def _step(dmp: Any, features: KeyedJaggedTensor) -> None:
    dmp.module["ebc"](features).values().sum().backward()


def _volume_with_buffers(folder: str) -> tuple[SsdVolume, int]:
    """A volume that writes, cleans and reads, and what its buffers take: plans are not charged for them."""
    rows, generator = 40_000, torch.Generator().manual_seed(0)
    before, _ = resident_bytes()
    volume = SsdVolume((folder,), 6 << 20)
    table = volume.table("t", row_count=rows, record_bytes=68)
    for number in range(20):
        ids = torch.randperm(rows, generator=generator)[: rows // 2]
        table.put(ids, torch.full((len(ids), 68), number, dtype=torch.uint8))
        table.get(ids, torch.empty(len(ids), 68, dtype=torch.uint8))
    volume.flush()
    assert volume.stats()["moved_rows"] > 0
    return volume, resident_bytes()[0] - before - INDEX_BYTES_PER_ROW * rows


def _trained(there: Any, case: Case, ddr: int, pmem_bytes: int, ssd: str, pmem: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sharders = mtrains.sharders(fused_params={"optimizer": case.optimizer, "learning_rate": 0.1})
    kernels = {"t0": {"compute_kernels": ["customized_kernel"]}, "t1": {"compute_kernels": ["fused"]}}
    warm = Case([case.tables[0], TableCase(1_000, 16)], batch_size=case.batch_size, extra=kernels)
    other, buffers = _volume_with_buffers(f"{ssd}_other")
    keep, grown = [], (0, 0)
    for job, folder, caches in (
        (warm, f"{ssd}_warm", f"{pmem}_warm"),
        (case, ssd, pmem),
    ):  # the first one: what the first batches of a process load
        model, capacity = job.model(), 1 << 30
        for _ in range(2):  # the second time with just the volume that the first plan charges: with room, a log is not cleaned
            home = mtrains.SsdHome((folder,), capacity)
            topology = TieredTopology(1, ddr_budget_bytes=ddr, ssd=home, pmem=PmemDevice(caches, pmem_bytes))
            planner = TieredShardingPlanner(
                topology, batch_size=job.batch_size, constraints=job.constraints(), checkpoints=CheckpointSchedule(keep=0), prefetched=False
            )
            plan = planner.plan(model, sharders)
            blocks = {block_bytes(job.record_bytes(f"t{i}")) for i in range(len(job.tables))}
            capacity = capacity_for(sum(row["ssd_bytes"] for row in planner.plan_rows(plan)), blocks, keep=0)
        before = resident_bytes()
        dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
        for number in range(2 * max(table.rows for table in job.tables) // job.batch_size):
            _step(dmp, _batch(job, number))
        for group in mtrains.tiered_groups(dmp):
            group.flush()
        grown = tuple(after - b for after, b in zip(resident_bytes(), before, strict=True))
        keep.append(dmp)
    volumes = [volume.stats()["disk_bytes"] for group in mtrains.tiered_groups(keep[-1]) for volume in group.volumes()]
    there.send((planner.plan_rows(plan), (grown[0] - buffers, grown[1]), sum(volumes)))
    other.close()
    dist.destroy_process_group()


def taken_by_a_plan(case: Case, ddr: int, pmem_bytes: int, ssd: str, pmem: str) -> tuple[list[dict[str, Any]], tuple[int, int], int]:
    """The plan's rows; memory, without the volume's buffers, and tmpfs that the process grew by; bytes on the SSD; once every row was
    trained twice."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_trained, args=(there, case, ddr, pmem_bytes, ssd, pmem))
    child.start()
    there.close()
    result: tuple[list[dict[str, Any]], tuple[int, int], int] = here.recv()
    child.join()
    return result
