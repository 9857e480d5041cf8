"""A tiered group trains bit for bit like the same tables in a stock TBE, at every step and in its final state."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections import deque
from pathlib import Path

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchrec_mtrains.kernels.deferred_init import UniformInit, table_seed
from torchrec_mtrains.kernels.device_tbe import DeviceTBE
from torchrec_mtrains.kernels.tiered_tbe import TieredTable, TieredTBE

from strategies import PMEM, Group, batch, groups
from torchrec_mtrains import DdrHome, PmemHome, SsdHome, TierChain
from torchrec_mtrains.tiers import DdrCache, Home


def columns_of(dims: list[int]) -> tuple[range, ...]:
    """Ranges of these widths; those of one width the last one first, as a rank may have any."""
    ends = list(itertools.accumulate(dims))
    in_order = [range(end - dim, end) for end, dim in zip(ends, dims, strict=True)]
    return tuple(in_order if len(set(dims)) > 1 else in_order[::-1])


KERNELS = {"native": TieredTBE, "device": functools.partial(DeviceTBE, device=torch.device("cpu"))}


def tiered(group: Group, home: Home, kernel: str = "native") -> TieredTBE:
    tables = [
        TieredTable(
            name=f"t{i}",
            rows=rows,
            columns=columns_of(dims),
            chain=TierChain(pool_rows=pool, tiers=(*caches, home)),
            init=UniformInit(
                table_seed(f"t{i}"), -0.5, 0.5, columns=columns_of(dims), weight_type=f"float{8 * group.precision.bit_rate() // 8}"
            ),
        )
        for i, (rows, dims, pool, caches) in enumerate(zip(group.rows, group.dims, group.pool_rows, group.caches, strict=True))
    ]
    return KERNELS[kernel](
        tables, group.feature_table_map(), group.pooling, group.precision, group.optimizer, rank=0, learning_rate=0.1, eps=1e-3
    )


def stock(group: Group, twin: TieredTBE) -> SplitTableBatchedEmbeddingBagsCodegen:
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[(group.rows[t], dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for t, dim in group.shards()],
        feature_table_map=group.feature_table_map(),
        pooling_mode=group.pooling,
        weights_precision=group.precision,
        optimizer=group.optimizer,
        learning_rate=0.1,
        eps=1e-3,
        stochastic_rounding=False,
        bounds_check_mode=BoundsCheckMode.NONE,
        device=torch.device("cpu"),
    )
    shards = iter(tbe.split_embedding_weights())
    for t, table in enumerate(twin.tables):
        assert table.init is not None
        for values in table.init.materialize(0, group.rows[t]).split(group.dims[t], dim=1):
            next(shards).data.copy_(values)
    return tbe


def assert_same_state(group: Group, ours: TieredTBE, theirs: SplitTableBatchedEmbeddingBagsCodegen) -> None:
    states = theirs.split_optimizer_states() if ours.state_names else [[] for _ in group.shards()]
    for s, weights in enumerate(theirs.split_embedding_weights()):
        mine = ours.read_rows(s, 0, group.rows[group.shards()[s][0]])
        for a, b in zip(mine, [weights, *states[s]], strict=True):
            assert torch.equal(a, b.detach().reshape(a.shape))


def train_and_compare(group: Group, home: Home, kernel: str) -> None:
    ours = tiered(group, home, kernel)
    theirs = stock(group, ours)
    generator = torch.Generator().manual_seed(group.seed)
    batches = [batch(group, generator) for _ in range(group.steps)]
    prefetched: deque[int] = deque()
    pending: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
    for step, (indices, offsets, weights, batch_sizes) in enumerate(batches):
        for ahead in range(step, min(group.steps, step + group.prefetch_depths[step])):
            if ahead not in prefetched:
                ours.prefetch(*batches[ahead][:2], batch_size_per_feature_per_rank=batches[ahead][3])
                prefetched.append(ahead)
        a = ours(indices, offsets, weights, batch_size_per_feature_per_rank=batch_sizes)
        b = theirs(indices.long(), offsets.long(), weights, batch_size_per_feature_per_rank=batch_sizes)
        assert torch.equal(a, b)
        pending.append((a, b))
        if len(pending) == group.forwards_at_once or step + 1 == group.steps:
            while pending:
                a, b = pending.popleft()
                gradient = torch.randn(a.shape, generator=generator)
                a.backward(gradient)
                b.backward(gradient)
            if group.between[step] == "flush":
                ours.flush()
            elif group.between[step] == "resize":
                table = step % len(group.rows)
                ours.resize(table, group.other_pool_rows[table])
                prefetched.clear()
            elif group.between[step] == "evaluate":
                with torch.no_grad():
                    for i, o, w, sizes in batches[: step + 1]:
                        mine = ours(i, o, w, batch_size_per_feature_per_rank=sizes)
                        assert torch.equal(mine, theirs(i.long(), o.long(), w, batch_size_per_feature_per_rank=sizes))
        ours._pool.check()
        for cached in ours._cached.values():
            cached._native.check()
    del a, b
    assert ours._pool.outstanding <= len(ours._waiting)
    assert_same_state(group, ours, theirs)
    ours.flush()
    assert_same_state(group, ours, theirs)
    ours.close()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(groups(), st.sampled_from([DdrHome, SsdHome, PmemHome]), st.sampled_from(list(KERNELS)))
def test_a_tiered_group_trains_bit_for_bit_like_the_stock_tbe(group: Group, home: type[DdrHome | SsdHome | PmemHome], kernel: str) -> None:
    if kernel == "device":  # where a DdrCache that stands first has at least as many rows as the pool
        most = [max(sizes) for sizes in zip(group.pool_rows, group.other_pool_rows, strict=True)]
        group.caches = [
            (DdrCache(caches[0].rows + pool), *caches[1:]) if caches and isinstance(caches[0], DdrCache) else caches
            for caches, pool in zip(group.caches, most, strict=True)
        ]
    if home is DdrHome:
        train_and_compare(group, DdrHome(), kernel)
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd() if home is SsdHome else PMEM) as folder:
        train_and_compare(group, home(paths=(folder,), capacity_bytes=64 << 20), kernel)
