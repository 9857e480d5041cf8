"""What is a device pool's own: its host places, reads that fail, what it says of its tiers. The rest is in test_tickets.py."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torchrec_mtrains.kernels import _core, device_batches, device_below
from torchrec_mtrains.kernels.deferred_init import UniformInit
from torchrec_mtrains.kernels.device_tbe import DeviceTBE
from torchrec_mtrains.kernels.tiered_tbe import TieredTable, TieredTBE

from test_tier_chains import damage
from torchrec_mtrains.errors import ConfigurationError, DamagedRecordError, VolumeFullError
from torchrec_mtrains.tiers import Cache, DdrCache, DdrHome, Home, SsdHome, TierChain

ROWS, POOL = 100, 10


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        yield name


ON_CPU = partial(DeviceTBE, device=torch.device("cpu"))


def make(*below: Cache | Home, pool_rows: int = POOL, kind: Any = ON_CPU) -> DeviceTBE:
    init = UniformInit(0, -1, 1, columns=8)
    return kind(
        [TieredTable("t", ROWS, 8, TierChain(pool_rows, below), init=init)], [0], PoolingMode.SUM, SparseType.FP32,
        EmbOptimType.EXACT_ROWWISE_ADAGRAD, rank=0, learning_rate=0.1, eps=1e-3,
    )  # fmt: skip


def train(tbe: DeviceTBE, first: int, count: int = POOL) -> None:
    tbe(torch.arange(first, first + count), torch.arange(count + 1)).sum().backward()


def test_a_ddr_cache_smaller_than_its_pool_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"table 't': .* got rows=9 below pool_rows=10"):
        make(DdrCache(9), DdrHome())


@pytest.mark.parametrize("pool_rows", [POOL, ROWS])
def test_it_counts_what_pools_in_host_memory_count(pool_rows: int) -> None:
    counted = make(DdrHome(), pool_rows=pool_rows, kind=TieredTBE).stats()[0]
    assert {"admitted_rows", "refetched_rows"} < set(counted)
    assert set(make(DdrHome(), pool_rows=pool_rows).stats()[0]) == set(counted) - {"batches"}


def test_a_chain_without_a_ddr_cache_has_host_places_for_its_pool_and_under_a_ddr_home_for_its_table(folder: str) -> None:
    assert make(SsdHome((folder,), capacity_bytes=64 << 20)).tier_stats()[0][1]["rows"] == POOL
    assert make(DdrHome()).tier_stats()[0][1]["rows"] == ROWS


def test_rows_sink_from_the_pool_through_host_places_to_their_home_and_come_back(folder: str) -> None:
    tbe = make(DdrCache(2 * POOL), SsdHome((folder,), capacity_bytes=64 << 20))
    for first in range(0, 50, POOL):
        train(tbe, first)
    pool, ddr, home = tbe.tier_stats()[0]
    assert (pool["tier"], ddr["tier"], home["tier"]) == ("pool", "DdrCache", "SsdHome")
    assert (pool["misses"], pool["evictions"], pool["write_backs"]) == (50, 40, 40)
    assert (ddr["resident_rows"], ddr["misses"], ddr["evictions"], ddr["write_backs"]) == (20, 50, 20, 20)
    train(tbe, 20)  # still in host places
    assert tbe.tier_stats()[0][1]["hits"] == POOL
    train(tbe, 0)  # in the home
    assert tbe.tier_stats()[0][1]["misses"] == 60


def test_rows_that_cannot_be_read_leave_the_pool_and_what_was_in_their_slots_is_there_again(folder: str) -> None:
    tbe = make(SsdHome((folder,), capacity_bytes=64 << 20))
    for first in range(0, 60, POOL):
        train(tbe, first)
    tbe.flush()
    values = tbe.read_rows(0, 50, 10)
    damage(folder)
    with pytest.raises(DamagedRecordError):
        train(tbe, 0)
    tbe._pool.check()
    assert tbe._pool.outstanding == 0
    for mine, before in zip(tbe.read_rows(0, 50, 10), values, strict=True):
        assert torch.equal(mine, before)
    train(tbe, 50)


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_rows_are_read_while_others_are_evicted_and_none_is_lost_where_evicting_fails(
    folder: str, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    monkeypatch.setattr(device_below, "PIECE_ROWS", 3)
    tbe, stock = make(SsdHome((folder,), capacity_bytes=64 << 20)), make(DdrHome(), pool_rows=ROWS)
    for first in [*range(0, 60, POOL), 0]:
        for of in (tbe, stock):
            train(of, first)
    in_host_places = tbe.tier_stats()[0][1]["resident_rows"]
    evict, pieces = _core.evict_rows, []

    def evict_some(*args: Any) -> None:
        pieces.append(args)
        if len(pieces) == fails_at:
            raise VolumeFullError("no room")
        evict(*args)

    with monkeypatch.context() as m:
        m.setattr(_core, "evict_rows", evict_some)
        with pytest.raises(VolumeFullError):
            train(tbe, 20)
    tbe._pool.check()
    assert tbe.tier_stats()[0][1]["resident_rows"] == in_host_places, "what was read before is there"
    for after in (None, 20, 70):
        if after is not None:
            for of in (tbe, stock):
                train(of, after)
        for mine, theirs in zip(tbe.read_rows(0, 0, ROWS), stock.read_rows(0, 0, ROWS), strict=True):
            assert torch.equal(mine, theirs)
    assert tbe.tier_stats()[0][1]["misses"] == 8 * POOL + POOL - 3 * (fails_at - 1), "they were not read again"


def test_large_pools_let_tickets_go_late_and_batches_that_need_their_slots_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_batches, "LATE_EVERY", 1)
    tbe = make(DdrHome(), pool_rows=64)
    values = {}
    for i in range(40):  # rows of 2, so the pool has room for 32 batches
        train(tbe, 2 * (i % 50), 2)
        values[i] = len(tbe._pool._held)
    assert values[0] == 1
    assert values[39] == 1 + device_batches.MOST_LATE
    kept = sorted(tbe._pool._held)
    tbe._pool.check()
    train(tbe, 30, 64)  # all slots: of those kept, too
    assert all(seq not in tbe._pool._held for seq in kept)
    assert tbe._pool.declined == 0
    tbe.flush()
    assert tbe._pool.outstanding == 0
    stock = make(DdrHome(), pool_rows=ROWS)  # which evicts nothing
    for i in range(40):
        train(stock, 2 * (i % 50), 2)
    train(stock, 30, 64)
    for mine, theirs in zip(tbe.read_rows(0, 0, ROWS), stock.read_rows(0, 0, ROWS), strict=True):
        assert torch.equal(mine, theirs)
