"""What the planner charges of HBM is what tables take of it. Needs a GPU."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torchrec_mtrains.kernels.device_batches import LATE_EVERY
from torchrec_mtrains.kernels.device_tbe import DeviceTBE
from torchrec_mtrains.kernels.prepared_lookup import PATIENCE, PreparedLookup
from torchrec_mtrains.kernels.tiered_tbe import TieredTable
from torchrec_mtrains.planner.gpu_charges import graph_bytes, pool_bytes

from torchrec_mtrains import DdrHome, TierChain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = torch.device("cuda", 0)
ROUNDED_UP = 22 << 20
"""PyTorch takes memory for tensors of 1 to 10 MiB by 20 MiB, and for smaller ones by 2; for every stream, and for graphs."""


def batch(tables: int, rows: int, bags: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """So many bags for each table, of any rows."""
    return torch.randint(rows, (tables * bags * length,), device=DEVICE), torch.arange(tables * bags + 1, device=DEVICE) * length


def train(lookup: Any, batch: tuple[torch.Tensor, torch.Tensor], steps: int) -> None:
    for _ in range(steps):
        output = lookup(*batch)
        output.backward(torch.ones_like(output))


def held_bytes(in_graphs: bool) -> int:
    """That PyTorch has of the device, all of it or that of graphs, when whatever is not used has gone back."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if not in_graphs or tuple(s["segment_pool_id"]) != (0, 0))


@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_SGD, EmbOptimType.ADAM], ids=lambda o: o.name)
@pytest.mark.parametrize(
    ("dims", "bags", "length", "mode"),
    [
        ((128,) * 10, 4096, 26, PoolingMode.SUM),
        ((128,) * 10, 4096, 26, PoolingMode.MEAN),
        ((64, 128, 64, 128), 4096, 100, PoolingMode.SUM),
        ((128,) * 8, 32768, 10, PoolingMode.SUM),
        ((32,) * 4, 4096, 26, PoolingMode.NONE),
    ],
)
def test_the_graphs_of_a_group_take_what_its_tables_are_charged_for_them(
    optimizer: EmbOptimType, dims: Sequence[int], bags: int, length: int, mode: PoolingMode
) -> None:
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[(100_000, dim, EmbeddingLocation.DEVICE, ComputeDevice.CUDA) for dim in dims],
        pooling_mode=mode,
        weights_precision=SparseType.FP32,
        optimizer=optimizer,
        stochastic_rounding=False,
        bounds_check_mode=BoundsCheckMode.NONE,
        device=DEVICE,
    )
    lookup, ids = PreparedLookup(tbe), batch(len(dims), 100_000, bags, length)
    before = held_bytes(in_graphs=True)
    train(lookup, ids, 2 + PATIENCE)
    assert lookup.graphed
    taken = held_bytes(in_graphs=True) - before
    outputs = bags * length if mode is PoolingMode.NONE else bags
    charged = sum(graph_bytes(bags * length, outputs * dim) for dim in dims)
    assert 0.8 * charged < taken < charged + ROUNDED_UP


@pytest.mark.parametrize("more", [0, 1], ids=["a power of two ids", "more"])
def test_a_group_takes_what_its_tables_are_charged(more: int) -> None:
    rows, pool_rows, dim, tables, bags, length = 2_000_000, 1_000_000, 64, 4, 8192, 32 + more
    before = held_bytes(in_graphs=False)
    tbe = DeviceTBE(
        [TieredTable(f"t{i}", rows, dim, TierChain(pool_rows, (DdrHome(),))) for i in range(tables)],
        list(range(tables)),
        PoolingMode.SUM,
        SparseType.FP32,
        EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        rank=0,
        device=DEVICE,
    )
    coming = batch(tables, rows, bags, length)
    for _ in range(2 * LATE_EVERY):
        trains, coming = coming, batch(tables, rows, bags, length)
        tbe.prefetch(*coming)
        train(tbe, trains, 1)
    assert tbe._prepared_lookup.graphed
    del trains
    taken = held_bytes(in_graphs=False) - before - sum(t.nbytes for t in coming)
    of_table = pool_bytes(rows, 4 * dim + 4, pool_rows, rows, bags * length) + graph_bytes(bags * length, bags * dim)
    assert 0.8 * tables * of_table < taken < tables * of_table + 3 * ROUNDED_UP
