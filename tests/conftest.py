"""What the whole suite shares: one thread, the same examples every time, the name of the I/O back end, and fixtures of several files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

# Batches are tiny: a second thread costs more than it brings, and 2 ranks share the cores.
torch.set_num_threads(1)

# A property is held against the same examples in every run, so that a run says something of the change it is for. `make soak` draws others.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, which reads it then: tests/test_device_kernels.py


LONGEST = ["benchmarks", "native", "fail_together", "planner", "torchrec_harness", "planner_benchmark", "training_loops", "gpu_planner"]
"""Files of 20 seconds and more, the longest first: begun first, they end while others of the processes still have something to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files by their length, as far as it matters; a file's tests as they stand in it."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_report_header() -> str:
    """Names the I/O back end of SSD volumes; tests/test_io_backend.py judges it."""
    from torchrec_mtrains.kernels import SsdVolume

    with tempfile.TemporaryDirectory() as folder:
        volume = SsdVolume(paths=(folder,), capacity_bytes=1 << 30)
        backend = volume.backend
        volume.close()
    return f"I/O back end of SSD volumes: {backend}"


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """A gloo world of this process, for the length of a test file."""
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    del os.environ["LOCAL_WORLD_SIZE"]
