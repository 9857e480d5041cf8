"""The counters of a sharded model's tiered tables and of the volumes below them, on this rank."""

from __future__ import annotations

from collections import Counter
from typing import Any, Protocol

from torch import nn

from .groups import tiered_groups
from .kernels import durability

_TABLE = ("lookups", "unique_rows", "misses", "evictions", "write_backs")
_OF_POOL = ("lookups", "unique_rows", "refetched_rows", "admitted_rows", "flushed_rows", "trickled_rows")
_VOLUME = (
    "get_rows",
    "get_rows_initial",
    "read_ios",
    "read_bytes",
    "write_ios",
    "write_bytes",
    "read_wait_seconds",
    "io_busy_seconds",
    "io_flight_seconds",
)


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
    groups = tiered_groups(module)
    if groups:
        sums["stall_seconds"] = sum(group.stall_seconds for group in groups)
    return sums


def counters(module: nn.Module) -> dict[str, dict[str, float]]:
    """What the tiers below a ``DistributedModelParallel`` have done on this rank, since it was made: numbers by name, by place.

    Places are ``table/<table>/<tier>``, from the pool down, ``volume/<paths>``, and ``forward`` with the time that forward passes have
    stood still for rows. Rows unless a name says otherwise; what each number counts: docs/train.md.
    """
    groups, result = tiered_groups(module), {}
    often = Counter(table.name for group in groups for table in group.tables)
    for number, group in enumerate(groups):
        for table, tiers, stats in zip(group.tables, group.tier_stats(), group.stats(), strict=True):
            name = table.name if often[table.name] == 1 else f"{table.name}@{number}"  # tables of two collections may share one
            for depth, tier in enumerate(tiers):
                of_tier = {key: value for key, value in tier.items() if key not in ("tier", "rows")}
                of_pool = {key: stats[key] for key in _OF_POOL} if depth == 0 else {}
                alike = sum(other["tier"] == tier["tier"] for other in tiers)
                label = tier["tier"] if alike == 1 else f"{tier['tier']}{depth}"
                result[f"table/{name}/{label}"] = {**of_pool, **of_tier}
    for volume in {id(v): v for group in groups for v in group.volumes()}.values():
        result[_place(volume, result)] = _of_volume(volume.stats())
    if groups:
        result["forward"] = {"stall_seconds": sum(group.stall_seconds for group in groups)}
    return result


def _place(volume: Any, taken: dict[str, Any]) -> str:
    place = "volume/" + ("+".join(getattr(volume, "paths", ())) or type(volume).__name__)
    return place if place not in taken else next(p for n in range(2, len(taken) + 2) if (p := f"{place}@{n}") not in taken)


def _of_volume(stats: dict[str, Any]) -> dict[str, float]:
    read = stats["get_rows"] - stats["get_rows_initial"] - stats["get_rows_buffered"]
    busy = stats["io_busy_seconds"]
    return {
        **stats,
        "rows_per_io": (read + stats["neighbour_rows"]) / stats["read_ios"] if stats["read_ios"] else 0.0,
        "queue_depth": stats["io_flight_seconds"] / busy if busy else 0.0,
    }


class ScalarWriter(Protocol):
    """As TensorBoard's ``SummaryWriter``."""

    def add_scalars(self, main_tag: str, tag_scalar_dict: dict[str, float], global_step: int) -> None:
        """A point of several curves."""


def write_scalars(writer: ScalarWriter, module: nn.Module, step: int) -> None:
    """Gives ``counters`` to a writer, place by place. Counters grow from the model's beginning: their slope is the rate."""
    for place, numbers in counters(module).items():
        writer.add_scalars(place, numbers, step)
