"""A finished job's tables and volumes as one line a tier, from the pool down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .train import TrainResult


@dataclass(frozen=True)
class TierRow:
    """One tier of this rank.

    ``rows`` fit in it (an SSD: were written to it at least) and ``bytes`` it takes. Of ``lookups`` that came to it, it answered
    ``hits``. ``reads`` and ``writes`` are I/Os where the tier is a device, rows elsewhere.
    """

    tier: str
    rows: int
    bytes: int
    lookups: int
    hits: int
    reads: int
    read_bytes: int
    writes: int
    written_bytes: int


def tier_rows(result: TrainResult) -> list[TierRow]:
    """Pools, caches, first-touch generator and volumes; and the tables that are whole in memory."""
    rows = []
    whole = [r for r in result.plan if r["pool_rows"] is None]
    if whole:
        rows.append(TierRow("memory (whole tables)", sum(r["rows"] for r in whole), sum(r["ddr_bytes"] for r in whole), 0, 0, 0, 0, 0, 0))
    if result.tables:
        total = {k: sum(t[k] for t in result.tables) for k in ("pool_rows", "lookups", "misses", "refetched_rows")}
        pool_bytes = sum(t["pool_rows"] * t["record_bytes"] for t in result.tables)
        record = pool_bytes / max(1, total["pool_rows"])
        hits, came = total["lookups"] - total["misses"], total["misses"] + total["refetched_rows"]
        rows.append(
            TierRow(
                "ddr (slot pools)",
                total["pool_rows"],
                pool_bytes,
                total["lookups"],
                hits,
                hits,
                round(hits * record),
                came,
                round(came * record),
            )
        )
    rows += _caches(result)
    for volume in result.volumes:
        never = volume["get_rows_initial"]
        read = volume["get_rows"] - never
        rows.append(TierRow("first touch (generated)", 0, 0, volume["get_rows"], never, 0, 0, 0, 0))
        rows.append(
            TierRow(
                f"ssd ({volume['backend']})",
                max(0, never - _rows_above(result)),
                volume["disk_bytes"],
                read,
                read,
                volume["read_ios"],
                volume["read_bytes"],
                volume["write_ios"],
                volume["write_bytes"],
            )
        )
    return rows


def _caches(result: TrainResult) -> list[TierRow]:
    """One line a kind of cache and depth, over all tables that have it there."""
    kinds: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for cache in result.caches:
        kinds.setdefault((cache["depth"], cache["tier"]), []).append(cache)
    rows = []
    for (_, tier), caches in sorted(kinds.items()):
        sums = {k: sum(c[k] for c in caches) for k in ("rows", "hits", "misses", "read_bytes", "inserted_rows", "written_bytes")}
        room = sum(c["rows"] * c["record_bytes"] for c in caches)
        hits = sums["hits"]
        rows.append(
            TierRow(
                f"{tier.removesuffix('Cache').lower()} (caches)",
                sums["rows"],
                room,
                hits + sums["misses"],
                hits,
                hits,
                sums["read_bytes"],
                sums["inserted_rows"],
                sums["written_bytes"],
            )
        )
    return rows


def _rows_above(result: TrainResult) -> int:
    """Rows that are in a pool or a cache, and so maybe not in the volume."""
    return sum(one["resident_rows"] for one in (*result.tables, *result.caches))


def written_row_bytes(result: TrainResult) -> int:
    """Bytes of the distinct rows that this rank gave to its SSD, each row counted once and without its header.

    A row is generated when it is first touched and trained at once, so one that was ever touched and is in no pool or cache any more
    has been given away. The last few MiB may still be in the volume's write buffer.
    """
    touched = sum(volume["get_rows_initial"] for volume in result.volumes)
    given = max(0, touched - _rows_above(result)) * min((table["record_bytes"] for table in result.tables), default=0)
    return min(given, sum(volume["write_bytes"] for volume in result.volumes))
