"""``explain``: what a sharded model's tiers do, beside what its plan gave them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from .groups import tiered_collections
from .sizes import show_bytes


@dataclass(frozen=True)
class TierUse:
    """One tier of one table on this rank.

    The plan gave it room for ``planned_rows``; ``resident_rows`` are in it (None: a home, which has every row that was given away).
    Of the distinct rows that batches came to it for it answered ``hits`` and passed on ``misses``. Bytes are of rows.
    """

    table: str
    sharding: str
    tier: str
    planned_rows: int
    resident_rows: int | None
    hits: int
    misses: int
    write_backs: int
    read_bytes: int
    written_bytes: int

    @property
    def hit_ratio(self) -> float | None:
        """Of what came to this tier; None before anything did."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else None


@dataclass(frozen=True)
class VolumeUse:
    """One volume of this rank: what it read and wrote. An I/O may bring several rows."""

    volume: str
    rows_read: int
    read_ios: int
    read_bytes: int
    write_ios: int
    write_bytes: int
    disk_bytes: int
    capacity_bytes: int | None
    read_wait_seconds: float

    @property
    def rows_per_io(self) -> float | None:
        """Rows that one read brought; None before any did."""
        return self.rows_read / self.read_ios if self.read_ios else None


@dataclass(frozen=True)
class Explanation:
    """``str`` of it is two tables to read."""

    tiers: list[TierUse]
    volumes: list[VolumeUse]

    def __str__(self) -> str:
        text = io.StringIO()
        console = Console(file=text, width=160)
        console.print(_tier_table(self.tiers))
        console.print(_volume_table(self.volumes))
        return text.getvalue()


def explain(module: nn.Module) -> Explanation:
    """The tiered tables and volumes of this rank below a ``DistributedModelParallel``, since it was made (or resized)."""
    tiers: list[TierUse] = []
    volumes: dict[int, Any] = {}
    for collection in tiered_collections(module):
        shardings = collection.tiered_tables()
        for group in (kernel.emb_module for kernel in collection.tiered_kernels()):
            for table, of_table in zip(group.tables, group.tier_stats(), strict=True):
                tiers += [_tier_use(table.name, shardings[table.name].sharding_type, t) for t in of_table]
            volumes |= {id(volume): volume for volume in group.volumes()}
    return Explanation(tiers, [_volume_use(v) for v in volumes.values()])


def _tier_use(table: str, sharding: str, tier: dict[str, Any]) -> TierUse:
    return TierUse(
        table=table,
        sharding=sharding,
        tier=tier["tier"],
        planned_rows=tier["rows"],
        resident_rows=tier.get("resident_rows"),
        hits=tier["hits"],
        misses=tier.get("misses", 0),
        write_backs=tier.get("write_backs", 0),
        read_bytes=tier["read_bytes"],
        written_bytes=tier["written_bytes"],
    )


def _volume_use(volume: Any) -> VolumeUse:
    stats = volume.stats()
    return VolumeUse(
        volume=" ".join([type(volume).__name__, *getattr(volume, "paths", ())]),
        rows_read=stats["get_rows"] - stats["get_rows_initial"] - stats["get_rows_buffered"],
        read_ios=stats["read_ios"],
        read_bytes=stats["read_bytes"],
        write_ios=stats["write_ios"],
        write_bytes=stats["write_bytes"],
        disk_bytes=stats["disk_bytes"],
        capacity_bytes=getattr(volume, "capacity_bytes", None),
        read_wait_seconds=stats["read_wait_seconds"],
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or column in ("sharding", "tier") else "right")
    return table


def _tier_table(tiers: list[TierUse]) -> Table:
    table = _table(
        "tiered tables (this rank)",
        *("table", "sharding", "tier", "rows planned", "rows in it"),
        *("hits", "misses", "hit ratio", "write-backs", "read", "written"),
    )
    for t in tiers:
        table.add_row(
            t.table,
            t.sharding,
            t.tier,
            f"{t.planned_rows:,}",
            "" if t.resident_rows is None else f"{t.resident_rows:,}",
            f"{t.hits:,}",
            f"{t.misses:,}",
            "" if t.hit_ratio is None else f"{t.hit_ratio:.3f}",
            f"{t.write_backs:,}",
            show_bytes(t.read_bytes),
            show_bytes(t.written_bytes),
        )
    return table


def _volume_table(volumes: list[VolumeUse]) -> Table:
    table = _table(
        "volumes (this rank)", "volume", "rows read", "reads", "rows a read", "read", "writes", "written", "on disk", "of", "waited"
    )
    for v in volumes:
        table.add_row(
            v.volume,
            f"{v.rows_read:,}",
            f"{v.read_ios:,}",
            "" if v.rows_per_io is None else f"{v.rows_per_io:.2f}",
            show_bytes(v.read_bytes),
            f"{v.write_ios:,}",
            show_bytes(v.write_bytes),
            show_bytes(v.disk_bytes),
            "" if v.capacity_bytes is None else show_bytes(v.capacity_bytes),
            f"{v.read_wait_seconds:.2f} s",
        )
    return table
