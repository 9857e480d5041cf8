"""The fused kernels do what the tensor operations beside them do. Without a GPU they run in Triton's interpreter (conftest.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch

ON_GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA wheels; pip install triton to run its kernels on a CPU")

from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType  # noqa: E402
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode  # noqa: E402
from hypothesis import HealthCheck, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torchrec_mtrains.kernels import device_batches, device_fused, device_kernels_exchange, device_sequences  # noqa: E402
from torchrec_mtrains.kernels.deferred_init import UniformInit  # noqa: E402
from torchrec_mtrains.kernels.device_fused import FusedDirectory  # noqa: E402
from torchrec_mtrains.kernels.device_planes import Moves, Planes  # noqa: E402
from torchrec_mtrains.kernels.device_sequences import SEQUENCES  # noqa: E402
from torchrec_mtrains.kernels.device_tbe import DeviceTBE  # noqa: E402
from torchrec_mtrains.kernels.tiered_tbe import TieredTable  # noqa: E402

from torchrec_mtrains import DdrCache, DdrHome, TierChain  # noqa: E402
from torchrec_mtrains.errors import MTrainsError  # noqa: E402

CPU, DEVICE = torch.device("cpu"), torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """Within it, pools on a CPU take the kernels, with blocks so small that a batch has several, and fewer programs than those."""

    @contextmanager
    def within() -> Iterator[None]:
        with monkeypatch.context() as m:
            for module in (device_sequences, device_fused, device_kernels_exchange):
                m.setattr(module, "BLOCK", 16)
                m.setattr(module, "PROGRAMS", 2)
            m.setattr(device_fused, "LOOK_PROGRAMS", 4)
            m.setattr(device_fused, "SLOT_BLOCK", 16)
            m.setattr(device_batches, "directory_type", lambda device: FusedDirectory)
            m.setattr(
                Planes,
                "exchange",
                lambda self, moves, firsts: self.exchange_by_kernel(moves, firsts),
            )
            yield

    return within


def group(seed: int, cached: bool) -> DeviceTBE:
    """Three tables of different widths, the second with two features; pools that a batch can just fill. With ``cached``, rows are below."""
    sizes = [(30, 8, 14), (50, 4, 24), (20, 12, 12)]
    return DeviceTBE(
        [
            TieredTable(
                f"t{i}", rows, dim, TierChain(pool, (DdrCache(pool), DdrHome()) if cached else (DdrHome(),)),
                init=UniformInit(seed + i, -1, 1, columns=dim),
            )
            for i, (rows, dim, pool) in enumerate(sizes)
        ],
        [0, 1, 1, 2], PoolingMode.SUM, SparseType.FP32, EmbOptimType.EXACT_ROWWISE_ADAGRAD, rank=0, learning_rate=0.1, eps=1e-3,
        device=CPU,
    )  # fmt: skip


@example(seed=615, narrow=False, cached=False, steps=["train", "train", "bad", *["train"] * 5])
@pytest.mark.skipif(ON_GPU, reason="pools on the GPU take the kernels: benchmarks/gpu.py and test_gpu.py")
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1000),
    narrow=st.booleans(),
    cached=st.booleans(),
    steps=st.lists(st.sampled_from(["train", "ahead", "evaluate", "bad", "hold"]), min_size=8, max_size=16),
)
def test_a_pool_with_kernels_is_step_by_step_in_the_state_of_one_with_tensor_operations(
    fused: Callable[[], AbstractContextManager[None]], seed: int, narrow: bool, cached: bool, steps: list[str]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    plain = group(seed, cached)
    with fused():
        ours = group(seed, cached)
        assert type(ours._pool.directory) is FusedDirectory
    held: list[list[torch.Tensor]] = []
    coming: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in steps:
        lengths = torch.randint(1, 4, (4 * 3,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        ids = torch.randint(0, 20, (int(offsets[-1]),), generator=generator)
        if step == "bad" and ids.numel():
            ids[-1] = -1
        ids, offsets = (ids.int(), offsets.int()) if narrow else (ids, offsets)
        if step == "ahead":  # announced, and prefetched one batch before
            coming.append((ids, offsets))
        outputs: list[torch.Tensor] = []
        errors_: list[str] = []
        for tbe, context in ((plain, nullcontext), (ours, fused)):
            with context(), torch.set_grad_enabled(step != "evaluate"):
                try:
                    if step == "ahead":
                        tbe.announce(ids, offsets)
                        if len(coming) > 1:
                            tbe.prefetch(*coming[-2])
                        if len(coming) < 3:
                            continue
                    outputs.append(tbe(*(coming[-3] if step == "ahead" else (ids, offsets))))
                except MTrainsError as e:
                    errors_.append(str(e))
        assert len(set(errors_)) == (1 if errors_ else 0)
        assert len(outputs) in (0, 2)
        if outputs:
            assert torch.equal(*outputs)
            if step == "hold":
                held.append(outputs)
            elif step != "evaluate":
                for tbe_output in outputs:
                    tbe_output.sum().backward()
        a, b = plain._pool.directory, ours._pool.directory
        for name in ("place_of_row", "row_of_place", "stamp", "window"):
            assert torch.equal(getattr(a, name)[:-1], getattr(b, name)[:-1]), name
        b.check()
        assert plain.stats() == ours.stats()
        assert plain._pool.attempted == ours._pool.attempted
        for upper, other in zip(plain._parts, ours._parts, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(upper, other, strict=True))


@pytest.mark.skipif(ON_GPU, reason="pools on the GPU take the kernels: test_gpu.py")
def test_a_prefetched_batch_is_found_however_many_others_train_before_its_turn(fused: Callable[[], AbstractContextManager[None]]) -> None:
    def bags(row: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((4,), row), torch.arange(5)

    with fused():
        tbe, coming = group(0, False), bags(1)
        tbe.prefetch(*coming)
        for _ in range(3 * SEQUENCES):  # the kernels' rooms are used again
            tbe(*bags(2)).sum().backward()
        ticket = next(iter(tbe._waiting)).seq
        assert tbe._pool.alive(ticket)
        before = tbe._pool.batches
        output = tbe(*coming)
        assert tbe._pool.batches == before, "no batch was begun for it"
    plain = group(0, False)
    assert torch.equal(output, plain(*coming))


@settings(max_examples=15, deadline=None)
@given(
    dims=st.lists(st.sampled_from([4, 8, 12, 32, 1028]), min_size=1, max_size=4),
    two_ranges=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    ids=st.sampled_from([1, 100, 100_000]),  # of the batch: the fewer of them miss, the fewer programs there are
    seed=st.integers(0, 1000),
)
def test_an_exchange_moves_the_records_that_tensor_operations_do(
    dims: list[int], two_ranges: bool, dtype: torch.dtype, ids: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shard_dims = [d for i, d in enumerate(dims) for d in ([d, 8] if two_ranges and i == 0 else [d])]
    table_of_shard = [i for i, _ in enumerate(dims) for _ in range(2 if two_ranges and i == 0 else 1)]
    slots, places, results = 6, 7, []
    weights = torch.randn(sum(d * slots for d in shard_dims), generator=generator).to(dtype)
    states = torch.randn(len(shard_dims) * slots, generator=generator)
    lowers = [torch.randn(sum(d * places for d in shard_dims), generator=generator).to(dtype), torch.randn(len(shard_dims) * places)]
    counts = [int(torch.randint(0, slots + 1, (1,), generator=generator)) for _ in dims]
    table = torch.repeat_interleave(torch.arange(len(dims)), torch.tensor(counts))
    firsts = (torch.arange(len(dims)) * slots, 1000 + torch.arange(len(dims)) * places)
    some = [(torch.randperm(slots, generator=generator)[:n], torch.randperm(places, generator=generator)[:n]) for n in counts]
    up = torch.cat([s for s, _ in some]) + firsts[0][table]
    down = torch.cat([h for _, h in some]) + firsts[1][table]
    count = torch.tensor([up.numel(), ids])
    for by_kernel in (False, True):
        device = DEVICE if by_kernel else CPU
        parts = _views([weights.to(device, copy=True), states.to(device, copy=True)], shard_dims, slots)
        planes = Planes(parts, table_of_shard, [places] * len(dims))
        for plane, lower in zip(planes._planes, lowers, strict=True):
            plane.lower.copy_(lower.view(plane.lower.shape))
        if by_kernel:
            moves = Moves(*(t.to(device) for t in (up, down, table, count)))
            planes.exchange_by_kernel(moves, (firsts[0].to(device), firsts[1].to(device)))
            torch.cuda.synchronize() if ON_GPU else None
        else:
            planes.exchange(Moves(up, down, table, count), firsts)
        results.append([t.cpu() for p in planes._planes for t in (p.upper.clone(), p.lower.clone())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def _views(flat: list[torch.Tensor], dims: list[int], slots: int) -> list[list[torch.Tensor]]:
    """As the stock TBE's: by shard its weights, and one state of one value a row."""
    weights = torch.split(flat[0], [d * slots for d in dims])
    return [[w.view(slots, d), s] for w, d, s in zip(weights, dims, flat[1].split(slots), strict=True)]
