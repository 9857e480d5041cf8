"""What tables in chains of tiers take of a process, measured in one of its own.

How much a process grows says too little by itself: glibc keeps what batches free, resident, and later arrays lie in it, so that the
process grows by less than was allocated (up to 7%, by chance). So whatever is free is given back before each look (malloc_trim), and
pages are counted from the page tables (smaps_rollup): the counters in /proc/self/status lag behind.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torchrec_mtrains.kernels.tiered_tbe import TieredTable, TieredTBE

from torchrec_mtrains import TierChain

DIM = 16
RECORD_BYTES = 4 * DIM + 4  # with row-wise Adagrad's state
_IDS = 1000


def resident_bytes() -> tuple[int, int]:
    """Anonymous memory in use, and memory of mapped files in memory (tmpfs; no other process maps them)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split()[0]: int(line.split()[1]) for line in lines}
    return kib["Anonymous:"] << 10, kib["Pss_Shmem:"] << 10


def _train_every_row(rows: int, chain: TierChain) -> TieredTBE:
    table = TieredTable("t", rows, DIM, chain)
    tbe = TieredTBE([table], [0], PoolingMode.SUM, SparseType.FP32, EmbOptimType.EXACT_ROWWISE_ADAGRAD, rank=0, learning_rate=0.1, eps=1e-3)
    for first in range(0, rows, _IDS):
        tbe(torch.arange(first, first + _IDS), torch.arange(_IDS + 1)).sum().backward()
    tbe.flush()
    return tbe


def _grown(there: Any, rows: int, warm: TierChain, chains: list[TierChain]) -> None:
    torch.set_num_threads(1)
    keep, grown = [_train_every_row(rows // 2, warm)], []  # what the first batches of a process load, and a log's buffers
    for chain in chains:
        before = resident_bytes()
        keep.append(_train_every_row(rows, chain))
        grown.append(tuple(after - b for after, b in zip(resident_bytes(), before, strict=True)))
    there.send(grown)


def grown_bytes(rows: int, warm: TierChain, chains: list[TierChain]) -> list[tuple[int, int]]:
    """(memory, tmpfs) that a table of so many rows takes in each chain, all of them kept, once every row was trained."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_grown, args=(there, rows, warm, chains))
    child.start()
    there.close()
    result: list[tuple[int, int]] = here.recv()
    child.join()
    return result
