"""Groups of tables for the GPU's benchmark, and the batches that train them: bounded Zipf, made on the device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, CacheAlgorithm, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torchrec_mtrains.kernels.deferred_init import UniformInit, table_seed
from torchrec_mtrains.kernels.device_tbe import DeviceTBE
from torchrec_mtrains.kernels.tiered_tbe import TieredTable

from torchrec_mtrains.tiers import Cache, Home, TierChain

DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True)
class Shape:
    """What every subject of a comparison has: tables of ``rows`` rows and these widths, and batches of ``bags`` × ``length`` ids each."""

    rows: int
    dims: tuple[int, ...]
    bags: int
    length: int
    exponent: float = 1.05

    @property
    def lookups(self) -> int:
        """Ids of a batch."""
        return len(self.dims) * self.bags * self.length


class Batches:
    """Batches of ids, all in HBM. A table's popular rows are scattered by a permutation of its own."""

    def __init__(self, shape: Shape, count: int, seed: int = 0) -> None:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        cumulative = (torch.arange(1, shape.rows + 1, dtype=torch.float64, device=DEVICE) ** -shape.exponent).cumsum(0)
        scatter = [torch.randperm(shape.rows, device=DEVICE, generator=generator) for _ in shape.dims]
        self.offsets = torch.arange(len(shape.dims) * shape.bags + 1, device=DEVICE) * shape.length
        self.ids = []
        for _ in range(count):
            draws = torch.rand(len(shape.dims), shape.bags * shape.length, dtype=torch.float64, device=DEVICE, generator=generator)
            ranks = torch.searchsorted(cumulative, draws * cumulative[-1]).clamp_(max=shape.rows - 1)
            self.ids.append(torch.cat([scatter[t][ranks[t]] for t in range(len(shape.dims))]))

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ids[i % len(self.ids)], self.offsets


def init(table: int, dim: int) -> UniformInit:
    """Initial values of a table."""
    return UniformInit(table_seed(f"t{table}"), -0.05, 0.05, columns=dim)


def fused(shape: Shape, optimizer: EmbOptimType, cached_share: float | None = None, values: bool = True) -> Any:
    """The stock TBE: all in HBM, or that share of it, in front of host memory that the device has mapped."""
    place = EmbeddingLocation.DEVICE if cached_share is None else EmbeddingLocation.MANAGED_CACHING
    cache = {}
    if cached_share is not None:
        cache = {
            "cache_algorithm": CacheAlgorithm.LRU,
            "cache_load_factor": cached_share,
            "prefetch_pipeline": True,
            "uvm_host_mapped": True,
        }
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[(shape.rows, dim, place, ComputeDevice.CUDA) for dim in shape.dims],
        pooling_mode=PoolingMode.SUM,
        weights_precision=SparseType.FP32,
        optimizer=optimizer,
        learning_rate=0.05,
        eps=1e-3,
        stochastic_rounding=False,
        bounds_check_mode=BoundsCheckMode.NONE,
        device=DEVICE,
        **cache,
    )
    if values:
        for t, weights in enumerate(tbe.split_embedding_weights()):
            weights.data.copy_(init(t, shape.dims[t]).materialize(0, shape.rows))
    return tbe


def tiered(shape: Shape, optimizer: EmbOptimType, pool_rows: int, *below: Cache | Home) -> DeviceTBE:
    """The same tables with ``pool_rows`` rows each in HBM, above ``below``."""
    return DeviceTBE(
        [TieredTable(f"t{t}", shape.rows, dim, TierChain(pool_rows, below), init=init(t, dim)) for t, dim in enumerate(shape.dims)],
        list(range(len(shape.dims))),
        PoolingMode.SUM,
        SparseType.FP32,
        optimizer,
        rank=0,
        device=DEVICE,
        learning_rate=0.05,
        eps=1e-3,
    )


class Loop:
    """Training steps with the next batch prefetched between a batch's forward and its backward, on a stream of its own, as TorchRec's
    prefetch pipeline does; by ``thread``, if there is one, beside the backward. ``lookahead`` further batches are announced."""

    def __init__(self, tbe: Any, batches: Batches, prefetch: bool, lookahead: int = 0) -> None:
        self.tbe, self.batches, self.prefetch, self.lookahead, self.at = tbe, batches, prefetch, lookahead, 0
        self.announced = 1  # up to this batch
        self.main, self.stream = torch.cuda.current_stream(), torch.cuda.Stream()
        self.thread: ThreadPoolExecutor | None = None
        self.gradient: torch.Tensor | None = None
        if prefetch:
            self._prefetch(0)

    def _prefetch(self, i: int) -> None:
        torch.cuda.set_stream(self.stream)
        self.tbe.prefetch(*self.batches[i], forward_stream=self.main)
        self.announced = max(self.announced, i)
        while self.announced < i + self.lookahead:
            self.announced += 1
            self.tbe.announce(*self.batches[self.announced])
        torch.cuda.set_stream(self.main)

    def step(self) -> torch.Tensor:
        """One forward and backward; returns the output."""
        if self.prefetch:
            self.main.wait_stream(self.stream)
        output = self.tbe(*self.batches[self.at])
        self.at += 1
        done = None
        if self.prefetch:
            done = self.thread.submit(self._prefetch, self.at) if self.thread else self._prefetch(self.at)
        if self.gradient is None:
            self.gradient = torch.randn(output.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
        output.backward(self.gradient)
        if done is not None:
            done.result()
        return output.detach()

    def milliseconds(self, steps: int, synchronize: bool = True) -> float:
        """Of a step, over so many; behind what is queued on the device, or when that is done."""
        if synchronize:
            torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            self.step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / steps
