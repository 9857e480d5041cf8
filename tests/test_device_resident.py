"""Groups whose pools have a slot for every row, on a device's tensor code: bits, checkpoints, and kernels that leave the same stamps."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, PoolingMode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchrec_mtrains.kernels.deferred_init import UniformInit
from torchrec_mtrains.kernels.device_ids import Batch
from torchrec_mtrains.kernels.device_resident import ResidentPool
from torchrec_mtrains.kernels.device_sequences import SEQUENCES
from torchrec_mtrains.kernels.device_stamps import FusedStamps, Stamps
from torchrec_mtrains.kernels.device_tbe import DeviceTBE
from torchrec_mtrains.kernels.tiered_tbe import TieredTable

from strategies import PMEM, Group, groups
from test_equality_kernel import train_and_compare
from test_tier_chains import damage
from torchrec_mtrains import DdrHome, PmemCache, SsdHome, TierChain
from torchrec_mtrains.errors import ConfigurationError, DamagedRecordError, IdOutOfRangeError, TicketError
from torchrec_mtrains.tiers import Cache, DdrCache, Home

CPU = torch.device("cpu")
ROWS, DIM = 100, 8


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        yield name


def make(*below: Cache | Home, pool_rows: int = ROWS, mode: BoundsCheckMode = BoundsCheckMode.FATAL) -> DeviceTBE:
    init = UniformInit(0, -1, 1, columns=DIM)
    return DeviceTBE(
        [TieredTable("t", ROWS, DIM, TierChain(pool_rows, below), init=init)], [0], PoolingMode.SUM, SparseType.FP32,
        EmbOptimType.EXACT_ROWWISE_ADAGRAD, rank=0, device=CPU, learning_rate=0.1, eps=1e-3, bounds_check_mode=mode,
    )  # fmt: skip


def ids(*rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(rows), torch.arange(len(rows) + 1)


def train(tbe: DeviceTBE, *rows: int) -> None:
    tbe(*ids(*rows)).sum().backward()


def weights(tbe: DeviceTBE) -> torch.Tensor:
    return tbe.read_rows(0, 0, ROWS)[0]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(groups(), st.sampled_from([DdrHome, SsdHome]), st.booleans())
def test_whole_pools_train_bit_for_bit_like_the_stock_tbe_through_flushes_and_resizes(group: Group, home: type[Home], stay: bool) -> None:
    group.pool_rows = list(group.rows)
    if stay:
        group.other_pool_rows = list(group.rows)
    most = [max(sizes) for sizes in zip(group.rows, group.other_pool_rows, strict=True)]
    group.caches = [
        (DdrCache(caches[0].rows + pool), *caches[1:]) if caches and isinstance(caches[0], DdrCache) else caches
        for caches, pool in zip(group.caches, most, strict=True)
    ]
    with tempfile.TemporaryDirectory(dir=PMEM) as path:
        chain_home = DdrHome() if home is DdrHome else SsdHome((path,), capacity_bytes=64 << 20)
        group.caches = [tuple(c if isinstance(c, DdrCache) else PmemCache(path, c.rows) for c in of) for of in group.caches]
        train_and_compare(group, chain_home, "device")


def test_nothing_is_read_before_the_first_batch_and_nothing_is_missed_after_it() -> None:
    tbe = make(DdrHome())
    assert isinstance(tbe._pool, ResidentPool)
    assert tbe.stats()[0]["resident_rows"] == 0
    train(tbe, 3, 3, 5)
    stats = tbe.stats()[0]
    assert (stats["resident_rows"], stats["lookups"], stats["unique_rows"], stats["misses"]) == (ROWS, 3, 2, 0)
    assert tbe.useful_lookahead == 0


def test_a_flush_writes_what_was_changed_and_again_only_what_a_forward_may_still_change(folder: str) -> None:
    tbe = make(SsdHome((folder,), capacity_bytes=64 << 20))
    train(tbe, 1, 2)
    with torch.no_grad():
        tbe(*ids(7, 8))
    output = tbe(*ids(2, 3))
    flushed = []
    for _ in range(2):
        tbe.flush()
        flushed.append(tbe.stats()[0]["flushed_rows"])
    output.sum().backward()
    for _ in range(2):
        tbe.flush()
        flushed.append(tbe.stats()[0]["flushed_rows"])
    assert flushed == [3, 5, 7, 7]  # rows 1, 2, 3; twice 2, 3; none


def test_rows_come_anew_from_their_home_when_they_were_forgotten(folder: str) -> None:
    tbe = make(SsdHome((folder,), capacity_bytes=64 << 20))
    train(tbe, 1, 2)
    tbe.flush()
    kept = weights(tbe)
    train(tbe, 2, 3)
    assert not torch.equal(weights(tbe), kept)
    tbe.forget()
    assert torch.equal(weights(tbe), kept)


def test_pools_are_not_forgotten_while_a_backward_is_to_come() -> None:
    tbe = make(DdrHome())
    output = tbe(*ids(1))
    with pytest.raises(TicketError, match="1 forward passes"):
        tbe.forget()
    output.sum().backward()
    tbe.forget()


def test_a_second_backward_is_refused() -> None:
    tbe = make(DdrHome())
    output = tbe(*ids(1)).sum()
    output.backward(retain_graph=True)
    with pytest.raises(TicketError, match="second time"):
        output.backward()


def test_rows_in_a_cache_below_come_changed_into_a_pool_that_has_become_whole(folder: str) -> None:
    with tempfile.TemporaryDirectory(dir=PMEM) as pmem:
        tbe = make(PmemCache(pmem, 60), SsdHome((folder,), capacity_bytes=64 << 20), pool_rows=10)
        for first in range(0, 60, 10):
            train(tbe, *range(first, first + 10))
        values = weights(tbe)
        tbe.resize(0, ROWS)
        assert isinstance(tbe._pool, ResidentPool)
        assert torch.equal(weights(tbe), values)
        train(tbe, 0, 59)
        values = weights(tbe)
        tbe.resize(0, 10)  # whatever the cache has had is older
        assert torch.equal(weights(tbe), values)


def test_bad_ids_are_refused_by_the_forward_of_their_batch_and_change_nothing() -> None:
    tbe = make(DdrHome())
    train(tbe, 1)
    before = weights(tbe)
    for bad in (ids(1, ROWS), ids(-1, 2)):
        tbe.prefetch(*bad)
        good = ids(4)
        tbe.prefetch(*good)
        with pytest.raises(IdOutOfRangeError, match="table 't'"):
            tbe(*bad)
        assert torch.equal(weights(tbe), before)
        with torch.no_grad():
            tbe(*good)
        with pytest.raises(IdOutOfRangeError, match="table 't'"):
            tbe(*bad)
    with pytest.raises(ConfigurationError, match="offsets"):
        tbe(torch.tensor([1, 2]), torch.tensor([0, 1, 1]))
    assert tbe._pool.outstanding == 0


def test_bad_ids_read_row_0_where_they_are_rewritten() -> None:
    tbe = make(DdrHome(), mode=BoundsCheckMode.IGNORE)
    bad = ids(ROWS, 1)
    tbe.prefetch(*bad)
    with torch.no_grad():
        assert torch.equal(tbe(*bad), weights(tbe)[:2])


def test_narrow_ids_train_as_wide_ones() -> None:
    narrow, wide = make(DdrHome()), make(DdrHome())
    batch = ids(5, 5, 9)
    narrow.prefetch(small := batch[0].int(), offsets := batch[1].int())
    narrow(small, offsets).sum().backward()
    wide(*batch).sum().backward()
    assert torch.equal(weights(narrow), weights(wide))


def test_rows_that_cannot_be_read_are_an_error_and_nobody_has_them(folder: str) -> None:
    tbe = make(SsdHome((folder,), capacity_bytes=64 << 20))
    train(tbe, *range(ROWS))
    tbe.flush()
    tbe.forget()
    damage(folder)
    with pytest.raises(DamagedRecordError):
        train(tbe, 0)
    assert (tbe._pool.outstanding, tbe.stats()[0]["resident_rows"]) == (0, 0)


def test_rows_unused_for_long_trickle_to_a_durable_home(folder: str) -> None:
    tbe = make(SsdHome((folder,), capacity_bytes=64 << 20))
    train(tbe, 1, 2)
    for _ in range(3):
        train(tbe, 2)
    assert (tbe.trickle(2, 0.5), tbe.trickle(2, 0.5), tbe.trickle(2, 1)) == (1, 0, 0)
    tbe.flush()
    assert tbe.stats()[0]["flushed_rows"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes the kernels: test_gpu.py")
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    narrow=st.booleans(),
    steps=st.lists(st.tuples(st.sampled_from(["good", "low", "high", "unsorted"]), st.booleans()), min_size=1, max_size=2 * SEQUENCES),
)
def test_kernels_leave_the_same_stamps_and_tell_the_same_as_tensor_operations(
    seed: int, narrow: bool, steps: list[tuple[str, bool]]
) -> None:
    pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA wheels; pip install triton to run its kernels on a CPU")
    generator = torch.Generator().manual_seed(seed)
    rows, features = [30, 700, 20], [0, 1, 1, 2]
    plain, fused = (kind(["a", "b", "c"], rows, [r + 3 for r in rows], features, CPU) for kind in (Stamps, FusedStamps))
    for seq, (what, dirty) in enumerate(steps, start=1):
        lengths = torch.randint(0, 200, (4, 3), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
        values = torch.cat(
            [torch.randint(0, rows[t], (int(n.sum()),), generator=generator) for t, n in zip(features, lengths, strict=True)]
        )
        if what == "unsorted":
            offsets[3] = offsets[6] + 1
        elif what != "good" and values.numel():
            at = int(torch.randint(0, values.numel(), (1,), generator=generator))
            values[at] = -1 if what == "low" else 700
        batch = Batch(*((values.int(), offsets.int()) if narrow else (values, offsets)), 3)
        if not values.numel():
            continue
        said = []
        for stamps in (plain, fused):
            use = stamps.use(batch, seq, dirty)
            try:
                said.append(stamps.outcome(use).tolist())
            except (IdOutOfRangeError, ConfigurationError) as e:
                said.append(str(e))
        assert said[0] == said[1]
        if what != "unsorted":  # where offsets are broken anything may be stamped
            assert torch.equal(plain.stamp[:-1], fused.stamp[:-1])
