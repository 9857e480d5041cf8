"""The ids of a batch as the groups of tiered tables on this rank will get them, and telling those groups that they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.nn.parallel import DistributedDataParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from .kernels.compute_kernel import TieredKernel
from .sharding import TieredLookup

Ids = Iterable[tuple[Any, Any]]
"""Sharded modules, and what input dist has brought to each."""


def announce(ids: Ids) -> bool:
    """Tells eviction about a batch that will come after those announced before. False: some group has no room for another one."""
    told: list[tuple[TieredKernel, KeyedJaggedTensor]] = []
    for kernel, features in _features(ids):
        if not kernel.announce(features):
            for earlier, its_features in told:
                earlier.withdraw(its_features)
            return False
        told.append((kernel, features))
    return True


def prefetch(ids: Ids, forward_stream: Any) -> None:
    """Rows of tiered tables come into slots. Not those of stock tables in UVM caching: FBGEMM gives each forward the places that it found
    for the next batch in a queue of prefetched ones, so that whoever prefetches must begin with the batch that trains next."""
    for kernel, features in _features(ids):
        kernel.prefetch(features, forward_stream)


def withdraw(ids: Ids) -> None:
    """The announced batch will not come, or nobody knows when."""
    for kernel, features in _features(ids):
        kernel.withdraw(features)


def _features(ids: Ids) -> Iterator[tuple[TieredKernel, KeyedJaggedTensor]]:
    for module, of_module in ids:
        lookups = getattr(module, "_lookups", ())  # managed-collision modules have none: their ids are made when they train
        for lookup, features in zip(lookups, of_module, strict=False):
            while isinstance(lookup, DistributedDataParallel):
                lookup = lookup.module
            if isinstance(lookup, TieredLookup):
                yield from lookup.tiered_features(features)
