"""The job's process group: what torchrun describes, or a world of this one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from .rank_failures import fail_together


@contextmanager
def process_group() -> Iterator[dist.ProcessGroup]:
    """A gloo group for the length of a job, whose ranks fail together. One that is already there is used, and left."""
    if dist.is_initialized():
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
        return
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        with fail_together():
            yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
