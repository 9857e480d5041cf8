"""An access profile for people: a table for the terminal, and a page with the two pictures that storage tiers rest on.

How uneven the bandwidths of tables are, and how soon rows come again, are MTrainS's two observations (arXiv 2305.01515); the
curves are what slot pools make of the second.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from .html_page import document, picture, png, table
from .planner.access_profile import AccessProfile, MissCurve, TableAccess
from .sizes import show_bytes

_CURVES = 8
_HEADS = ("table", "rows", "used", "pooling", "unique rows a batch", "bytes/s", "drift", "misses: pool 1%", "pool 10%", "LRU's at 10%")


def _by_demand(profile: AccessProfile) -> list[TableAccess]:
    return sorted(profile.tables.values(), key=lambda t: (-t.lookups_per_batch * (t.row_bytes or 1), t.name))


def _cells(t: TableAccess, samples_per_s: float) -> list[str]:
    def ratio(curve: MissCurve, share: float) -> str:
        pool_rows = t.rows * share
        holds_a_batch = 0 < t.unique_rows_per_batch <= pool_rows
        return f"{curve.misses(pool_rows) / t.unique_rows_per_batch:.3f}" if holds_a_batch else "–"

    return [
        t.name,
        f"{t.rows:,}",
        f"{t.used_rows / t.rows:.1%}",
        f"{t.pooling_factor:.3g}",
        f"{t.unique_rows_per_batch:,.0f}",
        show_bytes(t.bytes_per_s(samples_per_s)),
        f"{t.drift:.2f}",
        ratio(t.miss_curve, 0.01),
        ratio(t.miss_curve, 0.1),
        ratio(t.lru_miss_curve, 0.1),
    ]


def summary(profile: AccessProfile, samples_per_s: float) -> Table:
    """A line a table, the one that reads most bytes first."""
    lines = Table(title=f"{profile.source}, at {samples_per_s:,.0f} samples/s", title_justify="left")
    for k, head in enumerate(_HEADS):
        lines.add_column(head, justify="right" if k else "left")
    for t in _by_demand(profile):
        lines.add_row(*_cells(t, samples_per_s))
    return lines


def _axes(xlabel: str, ylabel: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4))
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def bandwidth_picture(tables: Sequence[TableAccess], samples_per_s: float) -> str:
    """Bars: bytes/s of each table, sorted. Lines: the share of all bytes/s, and of all bytes, in the tables so far."""
    figure, axes = _axes("tables, by bytes/s", "GB/s")
    demand = np.array([t.bytes_per_s(samples_per_s) for t in tables])
    size = np.array([t.rows * (t.row_bytes or 0) for t in tables], np.float64)
    at = np.arange(len(tables)) + 1
    axes.bar(at, demand / 1e9, color="tab:blue", alpha=0.6)
    shares = axes.twinx()
    for values, label, color in ((demand, "share of bytes/s", "tab:blue"), (size, "share of bytes", "tab:orange")):
        shares.plot(at, values.cumsum() / max(values.sum(), 1e-300), color=color, label=label, marker=".")
    shares.set_ylim(0, 1.05)
    shares.set_ylabel("share in the tables so far")
    shares.legend(frameon=False, loc="center right")
    return png(figure)


def _distances(classes: int) -> list[str]:
    names = ["1", "2", *(f"{2 ** (k - 1) + 1}-{2**k}" for k in range(2, classes - 1))]
    return [*names[: classes - 1], "first or\nlater"]


def reuse_picture(tables: Sequence[TableAccess]) -> str:
    """Of the uses of rows in batches, the share by batches since the row's last one."""
    figure, axes = _axes("batches since the row's last use", "share of the uses")
    for t in tables[:_CURVES]:
        axes.plot(t.reuse_batches, marker=".", label=t.name)
    names = _distances(len(tables[0].reuse_batches))
    axes.set_xticks(range(len(names)), names, rotation=45, fontsize=7)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=7)
    return png(figure)


def miss_picture(tables: Sequence[TableAccess]) -> str:
    """Misses ÷ unique rows by pool size; LRU's dashed."""
    figure, axes = _axes("pool ÷ rows of the table", "misses ÷ unique rows")
    for k, t in enumerate(tables[:_CURVES]):
        unique = max(t.unique_rows_per_batch, 1e-300)
        for curve, style, label in ((t.miss_curve, "-", t.name), (t.lru_miss_curve, "--", None)):
            sizes = np.array(curve.pool_rows[1:]) / t.rows
            axes.plot(sizes, np.array(curve.misses_per_batch[1:]) / unique, style, color=f"C{k}", label=label, marker=".", markersize=3)
    axes.set_xscale("log")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=7, title="ours; dashed: LRU", title_fontsize=7)
    return png(figure)


def popularity_picture(tables: Sequence[TableAccess]) -> str:
    """Share of the lookups that the most used rows have."""
    figure, axes = _axes("share of the rows, the most used first", "share of the lookups")
    for t in tables[:_CURVES]:
        axes.plot(*zip(*t.lookup_share_by_popularity, strict=True), marker=".", label=t.name)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=7)
    return png(figure)


def range_picture(tables: Sequence[TableAccess]) -> str:
    """Lookups by range of rows, times what they would be if all ranges had as many."""
    figure, axes = _axes("rows, in equal ranges", "tables, by bytes/s")
    share = np.array([t.lookup_share_by_row_range for t in tables])
    image = axes.imshow(share * share.shape[1], aspect="auto", vmin=0, interpolation="none", extent=(0, 1, len(tables) + 0.5, 0.5))
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="× an even share")
    return png(figure)


def page(profile: AccessProfile, samples_per_s: float) -> str:
    """The profile as one HTML file."""
    tables = _by_demand(profile)
    shown = "" if len(tables) <= _CURVES else f" (the {_CURVES} tables with most bytes/s)"
    return document(
        f"Access profile: {profile.source}",
        [
            f"<h1>{html.escape(profile.source)}</h1>",
            f"<p>{html.escape(profile.date)}; bytes/s are what lookups read at {samples_per_s:,.0f} samples/s.</p>",
            table(_HEADS, [_cells(t, samples_per_s) for t in tables]),
            picture("Bandwidth by table", bandwidth_picture(tables, samples_per_s)),
            picture(f"When rows come again{shown}", reuse_picture(tables)),
            picture(f"Misses by pool size{shown}", miss_picture(tables)),
            picture(f"Popularity{shown}", popularity_picture(tables)),
            picture("Lookups by range of rows", range_picture(tables)),
        ],
    )
