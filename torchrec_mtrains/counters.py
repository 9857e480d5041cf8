"""The counters of a sharded model's tiered tables and of the volumes below them, on this rank."""

from __future__ import annotations

from typing import Any

from torch import nn

from .groups import tiered_groups
from .kernels import durability

_TABLE = ("lookups", "unique_rows", "misses", "evictions", "write_backs")
_VOLUME = ("get_rows", "get_rows_initial", "read_ios", "read_bytes", "write_ios", "write_bytes", "read_wait_seconds")


def tables(module: nn.Module) -> list[dict[str, Any]]:
    """One dict a tiered table shard: sizes and counters since creation."""
    return [stats for group in tiered_groups(module) for stats in group.stats()]


def caches(module: nn.Module) -> list[dict[str, Any]]:
    """One dict a cache of a tiered table shard: its table, its depth below the pool (1 is the first), sizes and counters."""
    result = []
    for group in tiered_groups(module):
        for table, tiers in zip(group.stats(), group.tier_stats(), strict=True):
            for depth, cache in enumerate(tiers[1:-1], start=1):
                result.append({"table": table["table"], "depth": depth, "record_bytes": table["record_bytes"], **cache})
    return result


def volumes(module: nn.Module) -> list[dict[str, Any]]:
    """One dict a volume: its back end and counters since it was opened."""
    return [{"backend": volume.backend, **volume.stats()} for volume in durability.volumes(tiered_groups(module))]


def total(module: nn.Module) -> dict[str, float]:
    """The counters that a step moves, summed over tables and volumes."""
    sums: dict[str, float] = {}
    for names, stats in ((_TABLE, tables(module)), (_VOLUME, volumes(module))):
        for one in stats:
            for name in names:
                sums[name] = sums.get(name, 0) + one[name]
    return sums
