"""The stock TBE's forward and backward by lookups and bytes a row, and beside it the slot directory's cost an id.

Ids are drawn log-uniformly, which is Zipf's law with exponent 1, over rows scattered by a permutation. Directory and TBE take turns, as in
training, so that each finds the caches as the other left them; every row is in the pool. For each row width, the cost of a lookup is
the difference of two batch sizes; over the widths it is a line.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen

from ..kernels.volumes import MemoryVolume
from .effort import Effort, Said, undisturbed
from .pool import Pool

DIMS = (16, 64, 128)
TABLES = 4
POOLING = 4
SMALL_SHARE = 8  # the large batch is so many times the small one
WARM_STEPS = 3


@dataclass(frozen=True)
class LookupCosts:
    """Nanoseconds: wall time for the TBE, on all of torch's threads."""

    directory_ns_per_lookup: float
    forward_ns_per_lookup: float
    forward_ns_per_byte: float
    backward_ns_per_lookup: float
    backward_ns_per_byte: float


def log_uniform(random: np.random.Generator, row_of_rank: np.ndarray, count: int) -> np.ndarray:
    """Rows drawn with probability ∝ 1 ÷ rank. Shapes: (count,) int64."""
    ranks = np.exp(random.random(count) * np.log(len(row_of_rank))).astype(np.int64)
    return row_of_rank[np.minimum(ranks, len(row_of_rank)) - 1]


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _tbe(rows: int, dim: int) -> SplitTableBatchedEmbeddingBagsCodegen:
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * TABLES,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
        bounds_check_mode=BoundsCheckMode.NONE,
        device=torch.device("cpu"),
    )
    for weights in tbe.split_embedding_weights():
        weights.fill_(0.01)  # as in a pool: no step meets a page for the first time
    return tbe


def measure(effort: Effort, say: Said) -> LookupCosts:
    """See above."""
    random = np.random.default_rng(3)
    row_of_rank = random.permutation(effort.rows)
    table = MemoryVolume().table("t", row_count=effort.rows, record_bytes=8)
    pool = Pool(table, effort.rows)
    pool.native.warm(0, np.arange(effort.rows))
    directory: list[float] = []
    lines: dict[str, list[float]] = {"forward": [], "backward": []}
    for dim in DIMS:
        say(f"forward and backward of rows of {4 * dim} bytes")
        tbe = _tbe(effort.rows, dim)
        times: dict[tuple[str, int], list[float]] = {}
        sizes = (effort.batch_rows // SMALL_SHARE, effort.batch_rows)
        for step in range(WARM_STEPS + effort.rounds * effort.steps):
            for samples in sizes:
                ids = np.concatenate([log_uniform(random, row_of_rank, samples * POOLING) for _ in range(TABLES)])
                offsets = torch.arange(0, len(ids) + 1, POOLING)
                batch = pool.batch(ids)
                spent = _seconds(lambda b=batch: pool.look_up(b, True))  # type: ignore[misc]
                start = time.perf_counter()
                out = tbe(torch.from_numpy(ids), offsets)
                forward = time.perf_counter() - start
                backward = _seconds(lambda o=out: o.backward(torch.ones_like(o)))  # type: ignore[misc]
                if step < WARM_STEPS:
                    continue
                if samples == sizes[-1]:
                    directory.append(spent / len(ids))
                times.setdefault(("forward", samples), []).append(forward)
                times.setdefault(("backward", samples), []).append(backward)
        lookups = (sizes[-1] - sizes[0]) * POOLING * TABLES
        for what, of_dims in lines.items():
            small, large = (undisturbed(times[what, samples], effort.steps) for samples in sizes)
            of_dims.append(max(0.0, large - small) / lookups)
    fits = {what: _line([4 * dim for dim in DIMS], of_dims) for what, of_dims in lines.items()}
    return LookupCosts(1e9 * median(directory), *(1e9 * x for what in ("forward", "backward") for x in fits[what]))


def _line(x: list[int], y: list[float]) -> tuple[float, float]:
    """Value at 0 and slope of the least-squares line, neither below 0: where one would be, the other is fitted alone."""
    slope, at_zero = np.polyfit(x, y, 1)
    if slope < 0:
        return float(np.mean(y)), 0.0
    if at_zero < 0:
        return 0.0, float(np.dot(x, y) / np.dot(x, x))
    return float(at_zero), float(slope)
