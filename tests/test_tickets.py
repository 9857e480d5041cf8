"""The life of a batch: prefetch, forward, backward, and everything that users do between them."""

from __future__ import annotations

import functools
import gc
import sys

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, PoolingMode
from torchrec_mtrains.kernels.deferred_init import UniformInit
from torchrec_mtrains.kernels.device_tbe import DeviceTBE
from torchrec_mtrains.kernels.tiered_tbe import TieredTable, TieredTBE

from torchrec_mtrains import DdrHome, TierChain
from torchrec_mtrains.errors import (
    ConfigurationError,
    IdOutOfRangeError,
    PoolTooSmallError,
    TicketError,
    UnsupportedError,
)

ROWS, DIM = 40, 8
KERNELS = {"native": TieredTBE, "device": functools.partial(DeviceTBE, device=torch.device("cpu"))}


@pytest.fixture(autouse=True, params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test is for both directories: the native one, and the one in tensor operations."""
    monkeypatch.setattr(sys.modules[__name__], "TieredTBE", KERNELS[request.param])


def make(pool_rows: int, *, rows: int = ROWS, tables: int = 1, **kwargs) -> TieredTBE:
    """`tables` tables with a feature each; row-wise Adagrad, sum pooling, learning rate 1."""
    options = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 1.0, "eps": 1e-3, **kwargs}
    return TieredTBE(
        [
            TieredTable(f"t{i}", rows, DIM, TierChain(pool_rows, (DdrHome(),)), init=UniformInit(i, -1, 1, columns=DIM))
            for i in range(tables)
        ],
        list(range(tables)),
        PoolingMode.SUM,
        SparseType.FP32,
        rank=0,
        **options,
    )


def bags(*ids: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One id a bag."""
    return torch.tensor(ids, dtype=torch.int64), torch.arange(len(ids) + 1)


def train(tbe: TieredTBE, *ids: int) -> torch.Tensor:
    output = tbe(*bags(*ids))
    output.sum().backward()
    return output.detach()


def rows_of(tbe: TieredTBE) -> list[torch.Tensor]:
    return tbe.read_rows(0, 0, tbe.tables[0].rows)


def twin() -> TieredTBE:
    """The same table with every row in its pool, so that nothing is ever evicted."""
    return make(ROWS)


def assert_same(a: TieredTBE, b: TieredTBE) -> None:
    for x, y in zip(rows_of(a), rows_of(b), strict=True):
        assert torch.equal(x, y)


def test_an_untouched_row_has_its_initial_value_and_zero_state() -> None:
    tbe = make(4)
    weights, state = rows_of(tbe)
    assert torch.equal(weights, UniformInit(0, -1, 1, columns=DIM).materialize(0, ROWS))
    assert torch.equal(state, torch.zeros(ROWS))


def test_an_evicted_row_comes_back_with_its_optimizer_state() -> None:
    tbe, full = make(2), twin()
    for t in (tbe, full):
        for ids in [(0, 1), (2, 3), (0, 1), (4, 5), (0, 3)]:
            train(t, *ids)
    assert tbe.stats()[0]["write_backs"] > 0
    assert_same(tbe, full)


def test_repeated_ids_take_one_slot() -> None:
    tbe, full = make(2), twin()
    for t in (tbe, full):
        train(t, 7, 7, 7, 9, 9)
        train(t, 1, 1)
    assert tbe.stats()[0]["misses"] == 3
    assert_same(tbe, full)


def test_an_empty_batch_trains_nothing_and_holds_nothing() -> None:
    tbe = make(2)
    output = tbe(torch.empty(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    assert output.shape == (3, DIM)
    output.sum().backward()
    assert tbe._pool.outstanding == 0


def test_several_forwards_before_their_backwards_keep_their_rows() -> None:
    tbe, full = make(4), twin()
    for t in (tbe, full):
        first, second = t(*bags(0, 1)), t(*bags(2, 3))
        second.sum().backward()
        train(t, 4, 5)  # needs the slots of 2 and 3: those of 0 and 1 are pinned
        first.sum().backward()
    assert_same(tbe, full)


def test_a_batch_that_pending_backwards_leave_no_room_for_is_refused_and_changes_nothing() -> None:
    tbe, full = make(4), twin()
    held = tbe(*bags(0, 1, 2))
    full_held = full(*bags(0, 1, 2))
    with pytest.raises(PoolTooSmallError, match=r"2 distinct rows, its slot pool has 4 .* 3 slots are pinned .* at least 5"):
        tbe(*bags(3, 4))
    tbe._pool.check()
    held.sum().backward()
    full_held.sum().backward()
    train(tbe, 3, 4)
    train(full, 3, 4)
    assert_same(tbe, full)


def test_a_batch_larger_than_the_pool_is_refused_and_changes_nothing() -> None:
    tbe = make(3)
    before = rows_of(tbe)
    with pytest.raises(PoolTooSmallError, match="pool_rows to at least 4"):
        tbe(*bags(0, 1, 2, 3))
    tbe._pool.check()
    assert torch.equal(before[0], rows_of(tbe)[0])
    train(tbe, 0, 1, 2)


@pytest.mark.parametrize("bad", [-1, ROWS, 2**40])
def test_an_id_out_of_range_is_refused_before_anything_changes(bad: int) -> None:
    tbe = make(2)
    with pytest.raises(IdOutOfRangeError, match=rf"id {bad} of table 't0'.*position 1.*\[0, {ROWS}\)"):
        tbe(*bags(0, bad))
    b = bags(0, bad)
    with pytest.raises(IdOutOfRangeError):  # noqa: PT012 – on a device the host looks at what became of a prefetch when its forward comes
        tbe.prefetch(*b)
        tbe(*b)
    tbe._pool.check()
    assert tbe.stats()[0]["lookups"] == 0
    assert tbe._pool.outstanding == 0


@pytest.mark.parametrize("mode", [BoundsCheckMode.WARNING, BoundsCheckMode.IGNORE])
def test_a_lenient_bounds_check_mode_reads_row_zero_as_the_stock_tbe_does(mode: BoundsCheckMode) -> None:
    tbe = make(3, bounds_check_mode=mode)
    output = tbe(*bags(5, ROWS + 3))
    assert torch.equal(output[1], rows_of(tbe)[0][0])


def test_a_dropped_output_releases_its_rows() -> None:
    tbe = make(2)
    output = tbe(*bags(0, 1))
    assert tbe._pool.outstanding == 1
    del output
    gc.collect()
    assert tbe._pool.outstanding == 0
    train(tbe, 2, 3)


def test_an_output_whose_loss_was_made_but_dropped_releases_its_rows() -> None:
    tbe = make(2)
    loss = tbe(*bags(0, 1)).sum() * 2
    del loss
    gc.collect()
    assert tbe._pool.outstanding == 0


def test_a_backward_that_raises_releases_its_rows_once_the_graph_is_gone() -> None:
    tbe = make(2)
    output = tbe(*bags(0, 1))

    def fail(_gradient: torch.Tensor) -> None:
        raise RuntimeError("planned")

    output.register_hook(fail)
    with pytest.raises(RuntimeError, match="planned"):
        output.sum().backward()
    del output
    gc.collect()
    assert tbe._pool.outstanding == 0
    train(tbe, 2, 3)


def test_a_second_backward_over_a_retained_graph_raises() -> None:
    tbe = make(2)
    loss = tbe(*bags(0, 1)).sum()
    loss.backward(retain_graph=True)
    after_one = rows_of(tbe)
    with pytest.raises(TicketError, match="retain_graph"):
        loss.backward()
    assert torch.equal(after_one[0], rows_of(tbe)[0])


def test_evaluation_between_a_forward_and_its_backward_changes_nothing() -> None:
    tbe, full = make(4), twin()
    for t in (tbe, full):
        pending = t(*bags(0, 1))
        with torch.no_grad():
            seen = t(*bags(2, 3))
        assert torch.equal(seen, UniformInit(0, -1, 1, columns=DIM).materialize(2, 2))
        pending.sum().backward()
    assert_same(tbe, full)
    assert tbe._pool.outstanding == 0


def test_evaluation_dirties_no_row() -> None:
    tbe = make(2)
    with torch.no_grad():
        for i in range(0, ROWS, 2):
            tbe(*bags(i, i + 1))
    assert tbe.stats()[0]["write_backs"] == 0


def test_prefetch_brings_the_rows_so_that_forward_misses_nothing() -> None:
    tbe, full = make(6), twin()
    batches = [bags(0, 1), bags(2, 3), bags(4, 0)]
    for b in batches:
        tbe.prefetch(*b)
    tbe._pool.check()  # after what was prefetched
    assert tbe.stats()[0]["misses"] == 5
    for b in batches:
        tbe(*b).sum().backward()
        full(*b).sum().backward()
    assert tbe.stats()[0]["misses"] == 5
    assert_same(tbe, full)


def test_a_prefetch_with_misses_between_forward_and_backward_disturbs_no_gradient() -> None:
    tbe, full = make(4), twin()
    for i in range(0, 30, 2):
        outputs = [t(*bags(i, i + 1)) for t in (tbe, full)]
        tbe.prefetch(*bags(i + 5, i + 7))
        assert torch.equal(*outputs)
        for o in outputs:
            o.square().sum().backward()
    assert_same(tbe, full)


def test_a_forward_in_need_of_room_revokes_the_youngest_prefetch() -> None:
    tbe, full = make(4), twin()
    ahead = [bags(2, 3), bags(4, 5)]
    for b in ahead:
        tbe.prefetch(*b)
    train(tbe, 0, 1)
    train(full, 0, 1)
    assert tbe._pool.revoked == 1
    for b in ahead:
        tbe(*b).sum().backward()
        full(*b).sum().backward()
    assert_same(tbe, full)


def test_a_batch_whose_slots_were_taken_back_is_counted_once() -> None:
    tbe = make(4)
    for first in range(0, 30, 6):
        ahead = bags(first, first + 1, first)
        tbe.prefetch(*ahead)
        tbe._pool.check()  # after what was prefetched
        train(tbe, *range(first + 2, first + 6))
        tbe(*ahead).sum().backward()
    counted, below = tbe.stats()[0], tbe.tier_stats()[0][1]
    assert tbe._pool.revoked == 5
    assert counted["lookups"] == 5 * (3 + 4)
    assert counted["unique_rows"] == counted["misses"] == 5 * (2 + 4)
    assert counted["refetched_rows"] == 5 * 2
    assert below["hits"] + below.get("misses", 0) == 5 * (2 + 4 + 2)


def test_a_prefetch_without_room_leaves_the_work_to_its_forward() -> None:
    tbe, full = make(2), twin()
    held = [t(*bags(0, 1)) for t in (tbe, full)]
    b = bags(2, 3)
    tbe.prefetch(*b)
    tbe._pool.check()
    assert tbe._pool.declined == 1
    for o in held:
        o.sum().backward()
    for t in (tbe, full):
        t(*b).sum().backward()
    assert_same(tbe, full)


def test_prefetched_batches_that_are_never_used_do_not_starve_the_pool() -> None:
    tbe, full = make(4), twin()
    for i in range(100):
        tbe.prefetch(*bags(i % ROWS, (i + 1) % ROWS))
        train(tbe, (i + 2) % ROWS, (i + 3) % ROWS)
        train(full, (i + 2) % ROWS, (i + 3) % ROWS)
    assert len(tbe._waiting) <= 65
    assert_same(tbe, full)


def test_a_row_prefetched_without_grad_and_then_trained_is_written_back() -> None:
    tbe, full = make(2), twin()
    b = bags(0, 1)
    with torch.no_grad():
        tbe.prefetch(*b)
    tbe(*b).sum().backward()
    full(*b).sum().backward()
    for t in (tbe, full):
        train(t, 2, 3)
    assert_same(tbe, full)


def test_a_flush_between_forward_and_backward_loses_no_update() -> None:
    tbe, full = make(2), twin()
    for t in (tbe, full):
        output = t(*bags(0, 1))
        t.flush()
        output.sum().backward()
        train(t, 2, 3)
    assert_same(tbe, full)


def test_activation_recomputation_runs_forward_twice_and_trains_once() -> None:
    results = []
    for t in (make(4), twin()):
        indices, offsets = bags(0, 1)

        def block(x: torch.Tensor, t=t, indices=indices, offsets=offsets) -> torch.Tensor:
            return (t(indices, offsets) * x).square()

        x = torch.ones(2, DIM, requires_grad=True)
        torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
        train(t, 2, 3)
        results.append((rows_of(t), x.grad))
        gc.collect()
        assert t._pool.outstanding == 0
    assert torch.equal(results[0][0][0], results[1][0][0])
    assert torch.equal(results[0][1], results[1][1])


def test_batch_numbers_are_renumbered_before_they_run_out() -> None:
    tbe, full = make(4, batch_limit=8), twin()
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        ids = torch.randint(0, ROWS, (3,), generator=generator).tolist()
        train(tbe, *ids)
        train(full, *ids)
        tbe._pool.check()
    assert_same(tbe, full)


def test_rows_can_be_written_and_read_wherever_they_are() -> None:
    tbe = make(2)
    train(tbe, 0, 1)  # resident and dirty; the others are in the home or were never written
    weights = torch.arange(ROWS * DIM, dtype=torch.float32).reshape(ROWS, DIM)
    state = rows_of(tbe)[1]
    tbe.write_rows(0, 0, [weights, None])
    assert torch.equal(rows_of(tbe)[0], weights)
    assert torch.equal(rows_of(tbe)[1], state)
    assert state[0] > 0
    assert torch.equal(tbe(*bags(0, 30)).detach(), weights[[0, 30]])


def test_tables_of_a_group_have_pools_of_their_own() -> None:
    tbe = make(2, tables=2)
    with pytest.raises(PoolTooSmallError, match="'t1'"):
        tbe(torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 2, 5]))
    tbe._pool.check()
    tbe(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, 4])).sum().backward()


def test_an_optimizer_off_the_list_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="ADAM"):
        make(2, optimizer=EmbOptimType.ADAM)


def test_offsets_that_do_not_fit_the_features_are_refused() -> None:
    tbe = make(2, tables=2)
    with pytest.raises(ConfigurationError, match="2 features"):
        tbe(torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(ConfigurationError, match="offsets"):
        tbe(torch.tensor([0, 1]), torch.tensor([0, 1, 9]))
    with pytest.raises(ConfigurationError, match="int32 or int64"):
        tbe(torch.tensor([0.0]), torch.tensor([0, 1, 1]))


def test_a_variable_batch_is_refused_by_name_where_fbgemm_has_none() -> None:
    tbe = make(2, optimizer=EmbOptimType.EXACT_ADAGRAD)
    with pytest.raises(UnsupportedError, match="variable batch per feature for EXACT_ADAGRAD"):
        tbe(*bags(0), batch_size_per_feature_per_rank=[[1]])


def test_batch_sizes_that_do_not_fit_their_offsets_are_refused() -> None:
    tbe = make(4, tables=2)
    for sizes in ([[1]], [[1], [2]], [[1], [1], [1]]):
        with pytest.raises(ConfigurationError, match="batch sizes"):
            tbe(*bags(0, 1), batch_size_per_feature_per_rank=sizes)
    assert tbe._pool.outstanding == 0


@pytest.mark.parametrize("mode", [BoundsCheckMode.WARNING, BoundsCheckMode.IGNORE])
def test_bad_ids_of_a_variable_batch_become_row_0_as_in_stock(mode: BoundsCheckMode) -> None:
    tbe = make(4, tables=2, bounds_check_mode=mode)
    output = tbe(*bags(ROWS, 3, -7), batch_size_per_feature_per_rank=[[1], [2]])
    assert torch.equal(output, make(4, tables=2)(*bags(0, 3, 0), batch_size_per_feature_per_rank=[[1], [2]]))
