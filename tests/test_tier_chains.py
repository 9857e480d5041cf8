"""Chains of tiers: what the vocabulary admits, and how a kernel's rows move through caches between its pools and their homes."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torchrec_mtrains.kernels import durability
from torchrec_mtrains.kernels.deferred_init import UniformInit
from torchrec_mtrains.kernels.tiered_tbe import TieredTable, TieredTBE

from strategies import PMEM
from torchrec_mtrains.errors import ConfigurationError, DamagedRecordError
from torchrec_mtrains.tiers import Cache, DdrCache, DdrHome, PmemCache, PmemHome, SsdHome, TierChain

CAPACITY = 64 << 20


@pytest.fixture
def folder() -> Iterator[str]:
    """On the disk of the checkout: /tmp may be in memory, where there is no O_DIRECT."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        yield name


def tiered(chains: list[tuple[Cache, ...]], home: SsdHome | DdrHome, rows: int = 200, pool_rows: int = 16) -> TieredTBE:
    tables = [
        TieredTable(f"t{i}", rows, 8, TierChain(pool_rows, (*chain, home)), init=UniformInit(i, -1, 1, columns=8))
        for i, chain in enumerate(chains)
    ]
    features = list(range(len(chains)))
    return TieredTBE(
        tables, features, PoolingMode.SUM, SparseType.FP32, EmbOptimType.EXACT_ROWWISE_ADAGRAD, rank=0, learning_rate=0.1, eps=1e-3
    )


def train(tbe: TieredTBE, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = 8 * len(tbe.tables)
    for _ in range(steps):
        indices = torch.randint(0, tbe.tables[0].rows, (count,), generator=generator)
        tbe(indices, torch.arange(count + 1)).sum().backward()


def damage(folder: str) -> None:
    """Turns over every byte of the log after its first header."""
    for segment in Path(folder).rglob("segment_*.log"):
        data = torch.from_file(str(segment), shared=True, size=segment.stat().st_size, dtype=torch.uint8)
        data[4096:].bitwise_not_()


@pytest.mark.parametrize(
    "tiers",
    [(), (DdrCache(1),), (DdrHome(), DdrCache(1)), (DdrHome(), DdrHome()), (DdrCache(1), SsdHome(("/x",), 1), DdrHome()), ("ssd",)],
)
def test_a_chain_is_any_number_of_caches_and_then_one_home(tiers: tuple[Cache, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"any number of caches .* then exactly one home"):
        TierChain(4, tiers)


def test_every_chain_of_caches_over_every_home_is_legal() -> None:
    for home in (DdrHome(), SsdHome(("/x",), 1), PmemHome(("/x",), 1)):
        for chain in ((), (DdrCache(1),), (PmemCache("/p", 1),), (DdrCache(1), PmemCache("/p", 1), PmemCache("/q", 1))):
            assert (TierChain(4, (*chain, home)).caches, TierChain(4, (*chain, home)).home) == (chain, home)


def test_tiers_without_room_or_folder_are_refused() -> None:
    for bad in (lambda: DdrCache(0), lambda: PmemCache("/p", -1), lambda: PmemCache("", 1), lambda: PmemHome((), 1)):
        with pytest.raises(ConfigurationError):
            bad()


def test_tier_stats_follow_the_rows_down_the_chain(folder: str) -> None:
    tbe = tiered([(DdrCache(20), PmemCache(PMEM, 30)), ()], SsdHome((folder,), CAPACITY))
    train(tbe, 60)
    first, second = tbe.tier_stats()
    assert [t["tier"] for t in first] == ["pool", "DdrCache", "PmemCache", "SsdHome"]
    assert [t["tier"] for t in second] == ["pool", "SsdHome"]
    for above, below in itertools.pairwise(first):
        assert above["misses"] == below["hits"] + below.get("misses", 0)
    assert all(t["hits"] > 0 and t["read_bytes"] == t["hits"] * 36 for t in first)
    assert first[1]["evictions"] == first[2]["inserted_rows"] == first[1]["write_backs"] > 0
    home = tbe.volume_stats()[0]
    assert home["get_rows"] == first[-1]["hits"] + second[-1]["hits"]
    tbe.flush()
    assert tbe.volume_stats()[0]["put_rows"] * 36 == sum(t[-1]["written_bytes"] for t in tbe.tier_stats())


def test_training_moves_rows_and_copies_none(folder: str) -> None:
    """After a step the rows of a pool are in no cache: pool and caches together hold as many rows as they have room for."""
    tbe = tiered([(DdrCache(20), DdrCache(20))], SsdHome((folder,), CAPACITY), pool_rows=16)
    train(tbe, 60)
    (tiers,) = tbe.tier_stats()
    assert tiers[0]["resident_rows"] == 16
    (cached,) = tbe._cached.values()
    in_pool = {r for r in range(200) if tbe._pool.slot_of_row(0, r) >= 0}
    before = tiers[1]["hits"] + tiers[2]["hits"]
    out = torch.empty(len(in_pool), 36, dtype=torch.uint8)
    tbe._below_pools[0].get(torch.tensor(sorted(in_pool)), out)
    after = cached.cache_stats(tbe._below_pools[0])
    assert after[0]["hits"] + after[1]["hits"] == before


def test_a_volume_that_fails_costs_the_tables_of_the_others_nothing(folder: str) -> None:
    """What the caches above a healthy home gave to the pool stays there when the read of another home fails."""
    chains: list[tuple[Cache, ...]] = [(DdrCache(200),), ()]
    tbe = TieredTBE(
        [
            TieredTable(f"t{i}", 200, 8, TierChain(16, (*chain, home)), init=UniformInit(i, -1, 1, columns=8))
            for i, (chain, home) in enumerate(zip(chains, (DdrHome(), SsdHome((folder,), CAPACITY)), strict=True))
        ],
        [0, 1], PoolingMode.SUM, SparseType.FP32, EmbOptimType.EXACT_ROWWISE_ADAGRAD, rank=0, learning_rate=0.1, eps=1e-3,
    )  # fmt: skip
    train(tbe, 60)
    tbe.flush()
    train(tbe, 30, seed=1)
    tbe._home_tables[1].volume.flush()
    before = tbe.read_rows(0, 0, 200)
    damage(folder)
    failed = 0
    for first in range(0, 200, 8):
        rows = torch.arange(first, first + 8)
        try:
            tbe(torch.cat([rows, rows]), torch.arange(17)).sum()
        except DamagedRecordError:
            failed += 1
    assert failed > 10
    for a, b in zip(tbe.read_rows(0, 0, 200), before, strict=True):
        assert torch.equal(a, b)


def test_evaluation_loses_no_training(folder: str) -> None:
    tbe = tiered([(DdrCache(60), PmemCache(PMEM, 60))], SsdHome((folder,), CAPACITY))
    train(tbe, 60)
    before = tbe.read_rows(0, 0, 200)
    with torch.no_grad():
        for _ in range(2):
            for first in range(0, 200, 8):
                tbe(torch.arange(first, first + 8), torch.arange(9))
    for a, b in zip(tbe.read_rows(0, 0, 200), before, strict=True):
        assert torch.equal(a, b)


def test_evaluation_brings_rows_into_the_cache_too(folder: str) -> None:
    tbe = tiered([(DdrCache(200),)], SsdHome((folder,), CAPACITY))
    train(tbe, 60)
    tbe.forget()
    tbe._cached[id(tbe._home_tables[0].volume)].forget()
    before = tbe.volume_stats()[0]["get_rows"]
    with torch.no_grad():
        for _ in range(3):
            for first in range(0, 200, 8):
                tbe(torch.arange(first, first + 8), torch.arange(9))
    assert tbe.volume_stats()[0]["get_rows"] - before == 200


def test_a_flush_leaves_the_pools_rows_out_of_the_caches() -> None:
    tbe = tiered([(DdrCache(100),)], DdrHome())
    train(tbe, 2)
    before = tbe.tier_stats()[0][1]["resident_rows"]
    tbe.flush()
    assert tbe.tier_stats()[0][1]["resident_rows"] == before


def test_a_checkpoint_holds_what_was_in_the_caches_and_restoring_it_empties_them(folder: str) -> None:
    chains: list[tuple[Cache, ...]] = [(DdrCache(30), PmemCache(PMEM, 30)), ()]
    home = SsdHome((folder,), CAPACITY)
    tbe = tiered(chains, home)
    train(tbe, 60)
    committed = [tbe.read_rows(t, 0, 200) for t in range(2)]
    durability.checkpoint([tbe], 1)
    train(tbe, 60, seed=1)

    def assert_committed(tbe: TieredTBE) -> None:
        durability.restore([tbe], 1)
        for t, parts in enumerate(committed):
            for a, b in zip(tbe.read_rows(t, 0, 200), parts, strict=True):
                assert torch.equal(a, b)

    assert_committed(tbe)
    train(tbe, 60, seed=2)
    durability.close([tbe])
    del tbe
    again = tiered(chains, home)
    assert_committed(again)
    durability.close([again])


def test_tables_with_and_without_caches_share_one_way_to_their_volume(folder: str) -> None:
    """A pool submits one batch a volume: with one object above the SSD, all tables' reads are in flight together."""
    tbe = tiered([(DdrCache(4),), (), (PmemCache(PMEM, 4),)], SsdHome((folder,), CAPACITY))
    assert len({id(t.volume) for t in tbe._below_pools}) == 1
    assert len({id(t.volume) for t in tbe._home_tables}) == 1
