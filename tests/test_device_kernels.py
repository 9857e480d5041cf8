"""The fused kernels do what the tensor operations beside them do. Without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA wheels; pip install triton to run its kernels on a CPU")

from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec_mtrains.kernels import device_kernels
from torchrec_mtrains.kernels.device_directory import DeviceDirectory
from torchrec_mtrains.kernels.device_planes import Planes

CPU, DEVICE = torch.device("cpu"), torch.device("cuda" if ON_GPU else "cpu")


def a_directory(rows: list[int], table_of_feature: list[int], seed: int) -> DeviceDirectory:
    """Half of each table's rows have a place, in slots or in host memory, with stamps of earlier batches."""
    slots = [max(1, r // 3) for r in rows]
    directory = DeviceDirectory([f"t{i}" for i in range(len(rows))], rows, slots, slots, table_of_feature, CPU)
    generator = torch.Generator().manual_seed(seed)
    for table, count in enumerate(rows):
        order = torch.randperm(count, generator=generator)
        for kind in (0, 1):
            segment = directory.segment(kind, table)
            for k, place in enumerate(range(segment.start, segment.stop)):
                if k % 2 == 0 and 2 * k + kind < count:
                    row = int(order[2 * k + kind])
                    directory.row_of_place[place] = row
                    directory.place_of_row[directory.first_row[table] + row] = place
                    directory.stamp[place] = int(torch.randint(0, 8, (1,), generator=generator))
    directory.check()
    return directory


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    repeats=st.integers(1, 3),
    lengths=st.lists(st.integers(0, 900), min_size=12, max_size=12),
    dirty=st.booleans(),
    narrow=st.booleans(),
    bad=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_lookup_finds_stamps_and_counts_what_tensor_operations_do(
    rows: list[int], repeats: int, lengths: list[int], dirty: bool, narrow: bool, bad: bool, seed: int
) -> None:
    table_of_feature = sorted(list(range(len(rows))) * repeats)
    directory = a_directory(rows, table_of_feature, seed)
    generator = torch.Generator().manual_seed(seed)
    mine = lengths[: len(table_of_feature)]
    low = -1 if bad else 0
    ids = torch.cat([torch.randint(low, rows[t] - low, (n,), generator=generator) for n, t in zip(mine, table_of_feature, strict=True)])
    ids = ids.int() if narrow else ids
    starts = torch.tensor([0, *mine]).cumsum(0)
    outputs = []
    stamp = directory.stamp.clone()
    for search in (directory._search, _by_kernel(directory)):
        directory.stamp.copy_(stamp)
        place, slot = torch.zeros(ids.numel(), dtype=torch.int64), torch.zeros(ids.numel(), dtype=torch.int64)
        missing = torch.zeros(ids.numel(), dtype=torch.bool)
        summary = torch.zeros(2 + len(rows), dtype=torch.int64)
        search(ids, starts, 9, dirty, place, slot, missing, summary)
        hit = ~missing & (place >= 0)
        outputs.append((place, slot[hit], missing, summary, directory.stamp[:-1].clone()))
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)


def _by_kernel(directory: DeviceDirectory):
    def search(ids, starts, seq, dirty, place, slot, missing, summary) -> None:
        of_feature = (directory._feature_row, directory._feature_rows, directory._feature_slot, directory._feature_table)
        there = [t.to(DEVICE) for t in (ids, starts, *of_feature, directory.place_of_row, directory.stamp, place, slot, missing, summary)]
        device_kernels.lookup(*there[:2], tuple(there[2:6]), *there[6:8], directory.slots, seq, dirty, *there[8:])
        for tensor, of_device in zip((directory.stamp, place, slot, missing, summary), there[7:], strict=True):
            tensor.copy_(of_device)

    return search


@settings(max_examples=15, deadline=None)
@given(
    dims=st.lists(st.sampled_from([4, 8, 12, 32, 1028]), min_size=1, max_size=4),
    two_ranges=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_an_exchange_moves_the_records_that_tensor_operations_do(dims: list[int], two_ranges: bool, dtype: torch.dtype, seed: int) -> None:
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
    for by_kernel in (False, True):
        device = DEVICE if by_kernel else CPU
        parts = _views([weights.to(device, copy=True), states.to(device, copy=True)], shard_dims, slots)
        planes = Planes(parts, table_of_shard, [places] * len(dims))
        for plane, lower in zip(planes._planes, lowers, strict=True):
            plane.lower.copy_(lower.view(plane.lower.shape))
        if by_kernel:
            planes.exchange_by_kernel(*(t.to(device) for t in (up, down, table)), tuple(f.to(device) for f in firsts))
            torch.cuda.synchronize() if ON_GPU else None
        else:
            planes.exchange(up, down, table, firsts, counts)
        results.append([t.cpu() for p in planes._planes for t in (p.upper.clone(), p.lower.clone())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def _views(flat: list[torch.Tensor], dims: list[int], slots: int) -> list[list[torch.Tensor]]:
    """As the stock TBE's: by shard its weights, and one state of one value a row."""
    weights = torch.split(flat[0], [d * slots for d in dims])
    return [[w.view(slots, d), s] for w, d, s in zip(weights, dims, flat[1].split(slots), strict=True)]
