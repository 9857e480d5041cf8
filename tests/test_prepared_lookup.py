"""``PreparedLookup`` is the stock TBE's forward, bit by bit, whatever changes between batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec_mtrains.kernels import _core
from torchrec_mtrains.kernels.device_tbe import DEVICE_STATES
from torchrec_mtrains.kernels.graphed_lookup import TRIES
from torchrec_mtrains.kernels.prepared_lookup import PATIENCE, PreparedLookup
from torchrec_mtrains.kernels.tiered_tbe import STATES

from torchrec_mtrains.errors import ConfigurationError

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
OPTIMIZERS = list(DEVICE_STATES if ON_GPU else STATES)
ROWS, DIMS, BAGS = 40, (8, 16, 4), 6

CHANGES: dict[str, Callable[[Any], None]] = {
    "learning rate": lambda tbe: tbe.set_learning_rate(tbe.get_learning_rate() * 0.5),
    "epsilon": lambda tbe: tbe.update_hyper_parameters({"eps": tbe.optimizer_args.eps * 4}),
    "steps": lambda tbe: (tbe.iter_cpu.fill_(7), tbe.iter.fill_(7)),
    "no steps": lambda tbe: (tbe.iter_cpu.fill_(0), tbe.iter.fill_(5)),
    "no gradient": lambda tbe: tbe(*ids(5)),
}


def made(optimizer: EmbOptimType) -> SplitTableBatchedEmbeddingBagsCodegen:
    place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if ON_GPU else (EmbeddingLocation.HOST, ComputeDevice.CPU)
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, dim, *place) for dim in DIMS], pooling_mode=PoolingMode.SUM, weights_precision=SparseType.FP32, optimizer=optimizer,
        learning_rate=0.1, eps=1e-3, stochastic_rounding=False, bounds_check_mode=BoundsCheckMode.NONE, device=DEVICE,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for weights in tbe.split_embedding_weights():
        weights.data.copy_(torch.rand(weights.shape, generator=generator))
    return tbe


def ids(seed: int, one_shape: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Bags of random lengths; of ``one_shape``: as many ids in all, whatever the seed."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(DIMS) * BAGS,), generator=generator)
    if one_shape:
        lengths = (torch.arange(len(DIMS) * BAGS) % 4)[torch.randperm(len(DIMS) * BAGS, generator=generator)]
    rows = torch.randint(0, ROWS, (int(lengths.sum()),), generator=generator)
    return rows.to(DEVICE), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE)


def state(tbe: Any) -> list[torch.Tensor]:
    states = [] if tbe.optimizer is EmbOptimType.EXACT_SGD else [s for of in tbe.split_optimizer_states() for s in of]
    return [*(w.detach() for w in tbe.split_embedding_weights()), *states, tbe.iter.cpu(), tbe.iter_cpu]


@pytest.fixture(autouse=True)
def deterministic() -> Any:
    torch.use_deterministic_algorithms(ON_GPU)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.name)
@settings(max_examples=10, deadline=None)
@given(changes=st.lists(st.sampled_from([*CHANGES, "", ""]), min_size=8, max_size=16), seed=st.integers(0, 99), one_shape=st.booleans())
def test_it_trains_as_the_stock_forward_does_whatever_changes_in_between(
    optimizer: EmbOptimType, changes: list[str], seed: int, one_shape: bool
) -> None:
    ours, theirs = made(optimizer), made(optimizer)
    lookup = PreparedLookup(ours)
    for i, change in enumerate(changes):
        if change:
            CHANGES[change](ours)
            CHANGES[change](theirs)
        batch = ids(seed + i, one_shape)
        got, expected = lookup(*batch), theirs(*batch)
        assert torch.equal(got, expected)
        for output in (got, expected):
            output.backward(torch.ones_like(output))
    assert all(torch.equal(a, b) for a, b in zip(state(ours), state(theirs), strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.name)
def test_from_the_third_batch_on_the_stock_forward_does_not_run(optimizer: EmbOptimType) -> None:
    tbe = made(optimizer)
    lookup = PreparedLookup(tbe)
    for i in range(2):
        lookup(*ids(i))
    assert lookup.prepared
    expected = tbe(*ids(2))

    def refuse(*_: Any) -> None:
        raise AssertionError("the stock forward ran")

    tbe.prepare_inputs = refuse
    assert torch.equal(lookup(*ids(2)), expected)


def test_whoever_watches_the_stock_forward_sees_every_batch() -> None:
    tbe, seen = made(EmbOptimType.EXACT_SGD), []
    tbe.register_forward_hook(lambda *_: seen.append(1))
    lookup = PreparedLookup(tbe)
    for i in range(5):
        lookup(*ids(i))
    assert len(seen) == 5
    assert not lookup.prepared


needs_gpu = pytest.mark.skipif(not ON_GPU, reason="graphs need a GPU")


def graphed(optimizer: EmbOptimType) -> tuple[Any, Any, PreparedLookup]:
    """Ours, trained by graphs, stock, and what trains ours."""
    ours, theirs = made(optimizer), made(optimizer)
    lookup = PreparedLookup(ours)
    for i in range(2 + PATIENCE):
        assert not lookup.graphed
        for output in (lookup(*ids(i, True)), theirs(*ids(i, True))):
            output.backward(torch.ones_like(output))
    assert lookup.graphed
    return ours, theirs, lookup


def assert_equal(ours: Any, theirs: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(state(ours), state(theirs), strict=True))


@needs_gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.name)
def test_batches_of_one_shape_train_by_graphs_with_new_rates_and_gradients(optimizer: EmbOptimType) -> None:
    ours, theirs, lookup = graphed(optimizer)
    for i in range(20):
        for tbe in (ours, theirs):
            tbe.set_learning_rate(0.1 / (1 + i % 3))
        outputs = lookup(*ids(i, True)), theirs(*ids(i, True))
        assert torch.equal(*outputs)
        for output in outputs:
            gradient = torch.rand(output.shape[::-1], generator=torch.Generator(DEVICE).manual_seed(i), device=DEVICE).t()
            output.backward(gradient)
    assert lookup.graphed
    assert_equal(ours, theirs)


@needs_gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.name)
def test_backwards_in_any_order_and_on_any_stream_train_their_own_batches(optimizer: EmbOptimType) -> None:
    ours, theirs, lookup = graphed(optimizer)
    torch.cuda.synchronize()
    for forward in (lookup, theirs):
        first, second, dropped = (forward(*ids(i, True)) for i in (7, 8, 9))
        kept = first.detach().clone()
        del dropped
        with torch.no_grad():
            forward(*ids(10, True))
        second.backward(torch.ones_like(second))
        first.backward(torch.ones_like(first))
        assert torch.equal(first.detach(), kept)
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            output = forward(*ids(11, True))
            output.backward(torch.ones_like(output))
        torch.cuda.current_stream().wait_stream(other)
    assert_equal(ours, theirs)


@needs_gpu
@pytest.mark.parametrize("differ", [TRIES - 1, TRIES])
def test_captures_that_differ_by_chance_are_made_again(differ: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compare, left = _core.GraphNumbers, [differ]

    def differs(*of: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise ConfigurationError("two captures differ")
        return compare(*of)

    monkeypatch.setattr(_core, "GraphNumbers", differs)
    if differ < TRIES:
        graphed(EmbOptimType.EXACT_SGD)
    else:
        with pytest.warns(UserWarning, match="without CUDA graphs"), pytest.raises(AssertionError):
            graphed(EmbOptimType.EXACT_SGD)


@needs_gpu
def test_shapes_that_come_and_go_have_graphs_made_ever_more_rarely() -> None:
    ours, theirs, lookup = graphed(EmbOptimType.ADAM)
    was = []
    for i in range(12):
        one_shape = i // 4 % 2 == 0
        batch = ids(i, True) if one_shape else ids(3)
        outputs = lookup(*batch), theirs(*batch)
        was.append(lookup.graphed)
        assert torch.equal(*outputs)
        for output in outputs:
            output.backward(torch.ones_like(output))
    assert was == [True] * 4 + [False] * 4 + [True] * 4
    for _ in range(2 * PATIENCE):
        for output in (lookup(*ids(3)), theirs(*ids(3))):
            output.backward(torch.ones_like(output))
    assert lookup.graphed
    assert_equal(ours, theirs)
