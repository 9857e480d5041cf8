"""Hypothesis strategies for groups of tables and the batches that train them. Capacities are tiny: eviction always happens."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from hypothesis import strategies as st

from torchrec_mtrains.tiers import Cache, DdrCache, PmemCache

# A byte-addressable folder: /dev/shm stands for PMem where it is writable.
PMEM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


@dataclass
class Group:
    """What both sides of an equality test are built from."""

    rows: list[int]
    dims: list[list[int]]  # by table: of each range of its columns
    pool_rows: list[int]
    features: list[int]  # by feature: its table
    optimizer: EmbOptimType
    pooling: PoolingMode
    precision: SparseType
    weighted: bool
    batch_size: int
    max_length: int
    steps: int
    prefetch_depths: list[int]
    forwards_at_once: int  # forward passes in a row before their backward passes run in the same order
    seed: int
    index_dtype: torch.dtype
    between: list[str]  # by step, when no backward is pending: "", "flush", "evaluate" what was trained so far, or "resize" a pool
    other_pool_rows: list[int]  # by table: what a resize makes of its pool
    caches: list[tuple[Cache, ...]]  # by table, between its pool and its home
    ranks: int  # that variable batches come from; 0: every feature has ``batch_size`` bags

    def shards(self) -> list[tuple[int, int]]:
        """(table, dim) of every table of the stock TBE."""
        return [(table, dim) for table, dims in enumerate(self.dims) for dim in dims]

    def feature_table_map(self) -> list[int]:
        """Every range of columns is looked up by all features of its table."""
        return [shard for shard, (table, _) in enumerate(self.shards()) for _ in range(self.features.count(table))]


def caches() -> st.SearchStrategy[tuple[Cache, ...]]:
    """No, one or two caches of 1 to 8 rows, so that they evict."""
    rows = st.integers(1, 8)
    ddr, pmem = rows.map(DdrCache), rows.map(lambda r: PmemCache(PMEM, r))
    return st.one_of(st.just(()), st.tuples(ddr), st.tuples(pmem), st.tuples(ddr, pmem), st.tuples(pmem, ddr))


@st.composite
def groups(draw: st.DrawFn) -> Group:
    """Tables (1-4) with pools from the smallest legal: what the batches that train at once can touch at most."""
    tables = draw(st.integers(1, 4))
    features = sorted(list(range(tables)) + draw(st.lists(st.integers(0, tables - 1), max_size=2)))
    batch_size, max_length = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    pooling = draw(st.sampled_from([PoolingMode.SUM, PoolingMode.MEAN, PoolingMode.NONE]))
    dim = draw(st.integers(1, 4)) * 4
    dims = [
        [dim if pooling is PoolingMode.NONE else draw(st.integers(1, 4)) * 4 for _ in range(draw(st.sampled_from([1, 1, 2])))]
        for _ in range(tables)
    ]
    rows = [draw(st.integers(1, 60)) for _ in range(tables)]
    at_once = draw(st.sampled_from([1, 1, 2, 3]))
    smallest = [max(1, features.count(t) * batch_size * max_length * at_once) for t in range(tables)]
    steps = draw(st.integers(1, 12))
    optimizer = draw(st.sampled_from([EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD]))
    # What FBGEMM has a variable batch for.
    may_vary = pooling is not PoolingMode.NONE and optimizer is not EmbOptimType.EXACT_ADAGRAD
    return Group(
        rows=rows,
        dims=dims,
        pool_rows=[s + draw(st.sampled_from([0, 0, 1, 5])) for s in smallest],
        other_pool_rows=[s + draw(st.sampled_from([0, 2, 9])) for s in smallest],
        features=features,
        optimizer=optimizer,
        pooling=pooling,
        precision=draw(st.sampled_from([SparseType.FP32, SparseType.FP16])),
        weighted=pooling is PoolingMode.SUM and draw(st.booleans()),
        batch_size=batch_size,
        max_length=max_length,
        steps=steps,
        prefetch_depths=draw(st.lists(st.integers(0, 3), min_size=steps, max_size=steps)),
        forwards_at_once=at_once,
        seed=draw(st.integers(0, 2**31)),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        between=draw(st.lists(st.sampled_from(["", "", "flush", "evaluate", "resize"]), min_size=steps, max_size=steps)),
        caches=[draw(caches()) for _ in range(tables)],
        ranks=draw(st.sampled_from([0, 0, 1, 3])) if may_vary else 0,
    )


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, list[list[int]] | None]


def batch(group: Group, generator: torch.Generator) -> Batch:
    """One batch: ids, offsets, per-sample weights of a weighted group, batch sizes of a variable one.

    Half of the ids come from a hot tenth.
    """

    def number(below: int) -> int:
        return int(torch.randint(0, below, (1,), generator=generator))

    of_features = []
    for table in group.features:
        sizes = [number(group.batch_size // group.ranks + 1) for _ in range(group.ranks)] if group.ranks else [group.batch_size]
        lengths = [number(group.max_length + 1) for _ in range(sum(sizes))]
        hot = torch.rand(sum(lengths), generator=generator) < 0.5
        cold = torch.randint(0, group.rows[table], (sum(lengths),), generator=generator)
        of_features.append((table, sizes, lengths, torch.where(hot, cold % max(1, group.rows[table] // 10), cold)))
    # Each range of a table's columns sees the ids of all the table's features.
    laid_out = [f for shard, _ in group.shards() for f in of_features if f[0] == shard]
    indices = torch.cat([ids for *_, ids in laid_out]).to(group.index_dtype)
    lengths = torch.tensor([n for _, _, of_feature, _ in laid_out for n in of_feature])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(group.index_dtype)
    weights = torch.rand(indices.numel(), generator=generator) if group.weighted else None
    return indices, offsets, weights, [sizes for _, sizes, *_ in laid_out] if group.ranks else None
