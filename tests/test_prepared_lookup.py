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
from torchrec_mtrains.kernels.device_tbe import DEVICE_STATES
from torchrec_mtrains.kernels.prepared_lookup import PreparedLookup
from torchrec_mtrains.kernels.tiered_tbe import STATES

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


def ids(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(DIMS) * BAGS,), generator=generator)
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
@given(changes=st.lists(st.sampled_from([*CHANGES, ""]), min_size=6, max_size=12), seed=st.integers(0, 99))
def test_it_trains_as_the_stock_forward_does_whatever_changes_in_between(optimizer: EmbOptimType, changes: list[str], seed: int) -> None:
    ours, theirs = made(optimizer), made(optimizer)
    lookup = PreparedLookup(ours)
    for i, change in enumerate(changes):
        if change:
            CHANGES[change](ours)
            CHANGES[change](theirs)
        batch = ids(seed + i)
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
