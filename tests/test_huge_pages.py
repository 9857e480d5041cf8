"""Pools in host memory lie on huge pages, and take memory only where rows have come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torchrec_mtrains.kernels.tiered_tbe import TieredTable, TieredTBE

from torchrec_mtrains import DdrHome, TierChain

ROWS, DIM, PAGE_BYTES, HUGE_PAGE_BYTES = 100_000, 64, 4096, 2 << 20
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = pytest.mark.skipif(not SETTING.exists(), reason="the kernel has no huge pages")


def advised(address: int) -> bool:
    """Whether the mapping of an address asks for huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            begin, end = (int(x, 16) for x in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return "hg" in rest.split()
    raise AssertionError(f"no mapping has address {address:#x}")


def present_bytes(first: int, end: int) -> int:
    """Of whole pages between two addresses, what is in memory."""
    pages = np.fromfile("/proc/self/pagemap", np.uint64, (end - first) // PAGE_BYTES, offset=first // PAGE_BYTES * 8)
    return int((pages >> np.uint64(63)).sum()) * PAGE_BYTES


def test_pools_lie_on_huge_pages_and_take_memory_where_rows_have_come() -> None:
    tbe = TieredTBE(
        [TieredTable("t", ROWS, DIM, TierChain(ROWS, (DdrHome(),)))], [0], PoolingMode.SUM, SparseType.FP32, EmbOptimType.EXACT_SGD, rank=0
    )
    weights = tbe._parts[0][0]
    first = -(-weights.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = (weights.data_ptr() + weights.nbytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    assert end - first > weights.nbytes // 2
    assert advised(first)
    assert present_bytes(first, end) == 0
    ids = torch.arange(0, ROWS, ROWS // 4)
    tbe(ids, torch.arange(5)).sum().backward()
    assert 4 * PAGE_BYTES <= present_bytes(first, end) <= 5 * HUGE_PAGE_BYTES
    assert torch.equal(tbe.read_rows(0, 0, ROWS)[0].count_nonzero(1) > 0, torch.zeros(ROWS, dtype=torch.bool).index_fill_(0, ids, True))
