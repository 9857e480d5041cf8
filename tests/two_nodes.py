"""Trains tables in tiers beside stock FUSED ones, bit for bit, on two nodes of two ranks. Run by torchrun: ``two_nodes.py PATH``."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torchrec.distributed.comm import get_local_rank, get_local_size

from dmp_twins import Job, Table, compare_on
from torchrec_mtrains import SsdHome, tier_counters

BATCH_SIZE, MAX_LENGTH, RANKS = 4, 3, 4
POOL_ROWS = BATCH_SIZE * MAX_LENGTH * RANKS  # what one batch of all ranks can touch
JOB = Job(
    [
        Table(300, 8, ["a"], POOL_ROWS, sharding="table_row_wise", rank=0),
        Table(280, 16, ["b"], POOL_ROWS, sharding="table_row_wise", rank=2),
        Table(320, 16, ["c"], POOL_ROWS, sharding="grid_shard", rank=0, shard_dim=8),
    ],
    batch_size=BATCH_SIZE,
    max_length=MAX_LENGTH,
    steps=20,
    prefetch_depths=[0, 2, 3, 1] * 5,
)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    assert (dist.get_world_size(), get_local_size()) == (RANKS, 2)
    model = compare_on(JOB, SsdHome(paths=(sys.argv[1],), capacity_bytes=64 << 20))
    evictions = tier_counters.total(model)["evictions"]
    assert evictions > 0, "the pools held every row"
    print(f"rank {dist.get_rank()}, local rank {get_local_rank()}: equal, {evictions:g} evictions")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
