"""A tiered group trains bit for bit like the same tables in a stock TBE, at every step and in its final state."""

from __future__ import annotations

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
from torchrec_mtrains.kernels.tiered_tbe import TieredTable, TieredTBE

from strategies import PMEM, Group, batch, groups
from torchrec_mtrains import DdrHome, PmemHome, SsdHome, TierChain
from torchrec_mtrains.tiers import Home


def tiered(group: Group, home: Home) -> TieredTBE:
    tables = [
        TieredTable(
            name=f"t{i}",
            rows=rows,
            dim=dim,
            chain=TierChain(pool_rows=pool, tiers=(*caches, home)),
            init=UniformInit(table_seed(f"t{i}"), -0.5, 0.5, columns=dim, weight_type=f"float{8 * group.precision.bit_rate() // 8}"),
        )
        for i, (rows, dim, pool, caches) in enumerate(zip(group.rows, group.dims, group.pool_rows, group.caches, strict=True))
    ]
    return TieredTBE(tables, group.feature_table_map, group.pooling, group.precision, group.optimizer, rank=0, learning_rate=0.1, eps=1e-3)


def stock(group: Group, twin: TieredTBE) -> SplitTableBatchedEmbeddingBagsCodegen:
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[(r, d, EmbeddingLocation.HOST, ComputeDevice.CPU) for r, d in zip(group.rows, group.dims, strict=True)],
        feature_table_map=group.feature_table_map,
        pooling_mode=group.pooling,
        weights_precision=group.precision,
        optimizer=group.optimizer,
        learning_rate=0.1,
        eps=1e-3,
        stochastic_rounding=False,
        bounds_check_mode=BoundsCheckMode.NONE,
        device=torch.device("cpu"),
    )
    for t, weights in enumerate(tbe.split_embedding_weights()):
        init = twin.tables[t].init
        assert init is not None
        weights.data.copy_(init.materialize(0, group.rows[t]))
    return tbe


def assert_same_state(group: Group, ours: TieredTBE, theirs: SplitTableBatchedEmbeddingBagsCodegen) -> None:
    states = theirs.split_optimizer_states() if ours.state_names else [[] for _ in group.rows]
    for t, weights in enumerate(theirs.split_embedding_weights()):
        mine = ours.read_rows(t, 0, group.rows[t])
        for a, b in zip(mine, [weights, *states[t]], strict=True):
            assert torch.equal(a, b.detach().reshape(a.shape))


def train_and_compare(group: Group, home: Home) -> None:
    ours = tiered(group, home)
    theirs = stock(group, ours)
    generator = torch.Generator().manual_seed(group.seed)
    batches = [batch(group, generator) for _ in range(group.steps)]
    prefetched: deque[int] = deque()
    pending: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
    for step, (indices, offsets, weights) in enumerate(batches):
        for ahead in range(step, min(group.steps, step + group.prefetch_depths[step])):
            if ahead not in prefetched:
                ours.prefetch(*batches[ahead][:2])
                prefetched.append(ahead)
        a = ours(indices, offsets, weights)
        b = theirs(indices.long(), offsets.long(), weights)
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
            elif group.between[step] == "evaluate":
                with torch.no_grad():
                    for i, o, w in batches[: step + 1]:
                        assert torch.equal(ours(i, o, w), theirs(i.long(), o.long(), w))
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
@given(groups(), st.sampled_from([DdrHome, SsdHome, PmemHome]))
def test_a_tiered_group_trains_bit_for_bit_like_the_stock_tbe(group: Group, home: type[DdrHome | SsdHome | PmemHome]) -> None:
    if home is DdrHome:
        train_and_compare(group, DdrHome())
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd() if home is SsdHome else PMEM) as folder:
        train_and_compare(group, home(paths=(folder,), capacity_bytes=64 << 20))
