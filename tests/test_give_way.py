"""Prefetched batches that give way: pools without room for all batches in flight read every row once, in the order of the batches."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torchrec_mtrains.kernels import _core
from torchrec_mtrains.kernels.deferred_init import UniformInit
from torchrec_mtrains.kernels.device_tbe import DeviceTBE
from torchrec_mtrains.kernels.tickets import WAITING_LIMIT
from torchrec_mtrains.kernels.tiered_tbe import TieredTable, TieredTBE

from torchrec_mtrains.tiers import DdrHome, Home, SsdHome, TierChain

DIM, IDS, STEPS, DEPTH = 8, 6, 40, 2
ROWS = IDS * (STEPS + WAITING_LIMIT)
Batch = tuple[torch.Tensor, torch.Tensor]

Make = Callable[..., TieredTBE]


def made(kind: Any, below: Home, *pools: int) -> TieredTBE:
    """A table of ``ROWS`` rows for each pool; row-wise Adagrad, learning rate 1."""
    chains = [TierChain(pool, (below,)) for pool in pools]
    return kind(
        [TieredTable(f"t{i}", ROWS, DIM, chain, init=UniformInit(i, -1, 1, columns=DIM)) for i, chain in enumerate(chains)],
        list(range(len(pools))),
        PoolingMode.SUM,
        SparseType.FP32,
        rank=0,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=1.0,
        eps=1e-3,
    )


@pytest.fixture(params=["in host memory", "on a device", "on a device over an SSD"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Tables whose pools are there."""
    kind = TieredTBE if request.param == "in host memory" else partial(DeviceTBE, device=torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        yield partial(made, kind, SsdHome((folder,), capacity_bytes=64 << 20) if "SSD" in request.param else DdrHome())


def batches(tables: int) -> list[Batch]:
    """No row is in two of them; one id a bag."""
    ids = torch.arange(STEPS * IDS).view(STEPS, 1, IDS).expand(STEPS, tables, IDS)
    return [(of_batch.flatten().clone(), torch.arange(tables * IDS + 1)) for of_batch in ids]


def prefetch_all_begun(tbe: TieredTBE, batch: Batch) -> None:
    """A step takes longer than the lookups beside it."""
    tbe.prefetch(*batch)
    tbe._pool.check()


@pytest.mark.parametrize("in_the_pool", [1, 1.5, 2, 2.5, 3], ids=lambda n: f"room for {n} batches")
def test_no_row_is_read_twice_however_few_batches_have_room(make: Make, in_the_pool: float) -> None:
    tbe, full = make(int(in_the_pool * IDS), ROWS - 1), made(TieredTBE, DdrHome(), ROWS, ROWS)
    coming = batches(2)
    for k, batch in enumerate(coming):
        for ahead in coming[1 : 1 + DEPTH] if k == 0 else coming[k + DEPTH : k + DEPTH + 1]:
            prefetch_all_begun(tbe, ahead)
        outputs = [t(*batch) for t in (tbe, full)]
        assert torch.equal(*outputs)
        for output in outputs:
            output.square().sum().backward()
    reads = [stats["misses"] + stats["refetched_rows"] for stats in tbe.stats()]
    assert max(reads) <= STEPS * IDS + IDS, "but for what the first one, which was not prefetched, drove out"
    for shard in range(2):
        for mine, theirs in zip(tbe.read_rows(shard, 0, ROWS), full.read_rows(shard, 0, ROWS), strict=True):
            assert torch.equal(mine, theirs)


def test_a_batch_that_gave_way_has_its_rows_before_its_turn_if_there_is_room_by_then(make: Make) -> None:
    tbe, coming = make(2 * IDS, ROWS - 1), batches(2)
    trains = tbe(*coming[0])
    for batch in coming[1:3]:
        prefetch_all_begun(tbe, batch)
    assert tbe._pool.declined == 1
    trains.sum().backward()
    trains = tbe(*coming[1])
    prefetch_all_begun(tbe, coming[3])
    assert [stats["misses"] for stats in tbe.stats()] == [3 * IDS] * 2, "the third batch has begun, the fourth has not"
    trains.sum().backward()
    tbe(*coming[2]).sum().backward()
    assert [stats["misses"] for stats in tbe.stats()] == [3 * IDS] * 2
    assert tbe._pool.revoked == 0


def test_a_prefetch_waits_for_no_reads_that_it_has_begun(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tbe, coming = make(2 * IDS, ROWS - 1), batches(2)
    if isinstance(tbe._pool, _core.SlotPool):
        pytest.skip("its reads are waited for on a thread of its own")
    finish, waited_for = tbe._pool._finish, list[int]()

    def finishes(fill: Any) -> None:
        waited_for.append(fill.seq)
        finish(fill)

    monkeypatch.setattr(tbe._pool, "_finish", finishes)
    for k, batch in enumerate(coming[:-DEPTH]):
        for ahead in coming[1 : 1 + DEPTH] if k == 0 else [coming[k + DEPTH]]:
            before = tbe._pool._last_seq
            waited_for.clear()
            tbe.prefetch(*ahead)
            assert all(seq <= before for seq in waited_for)
        tbe(*batch).sum().backward()


def test_batches_that_give_way_and_never_come_are_forgotten(make: Make) -> None:
    tbe = make(IDS, ROWS - 1)
    trains = tbe(*batches(2)[0])
    for k in range(2 * WAITING_LIMIT):
        first = torch.arange(k % WAITING_LIMIT, k % WAITING_LIMIT + IDS) + STEPS * IDS
        prefetch_all_begun(tbe, (first.repeat(2), torch.arange(2 * IDS + 1)))
    assert len(tbe._waiting) <= WAITING_LIMIT + 1
    trains.sum().backward()
    tbe._waiting.clear()
    prefetch_all_begun(tbe, (ahead := batches(2)[1]))
    misses = [stats["misses"] for stats in tbe.stats()]
    tbe(*ahead).sum().backward()
    assert misses == [stats["misses"] for stats in tbe.stats()] == [2 * IDS] * 2, "it was prefetched: none that is gone was waited for"


def test_what_was_announced_of_batches_that_give_way_and_never_come_is_withdrawn(make: Make) -> None:
    tbe, coming = make(IDS, ROWS - 1), batches(2)
    trains = tbe(*coming[0])
    for ahead in coming[1:4]:
        assert tbe.announce(*ahead)
    for ahead in coming[1:4]:
        prefetch_all_begun(tbe, ahead)
    assert tbe._pool.announced >= 2, "they have not begun"
    tbe._waiting.clear()
    trains.sum().backward()
    prefetch_all_begun(tbe, coming[4])
    assert tbe._pool.announced == 0
    tbe(*coming[4]).sum().backward()
    assert [stats["misses"] for stats in tbe.stats()] == [2 * IDS] * 2
