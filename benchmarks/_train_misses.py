"""How often a batch's rows are missing: our slot pool against LRU and against an optimum that knows the whole future.

A *miss* is a unique row of a batch that is not in the pool when the batch begins. All rows of a batch must be in the pool at once,
under every policy. Misses ÷ unique rows are counted over the measured batches of each trace (``_train_traces.py``), after the pool has
come to its steady state. Tables have pools of their own and a kind's tables are alike, so few of them stand for all.

    LRU         the least recently used batch leaves first, within a batch the row used first
    optimum     the row leaves whose next use is furthest away (Belady). It looks into batches after the measured ones too
    ours        the real slot pool, one batch at a time. Records have 4 bytes and live in memory: nothing trains, hits and misses are
                what they would be
    ahead       the same, with this batch and the next 63 announced
    neighbours  the same over an SSD volume of records of 64 floats and a state, every row of it put in a random order: rows that
                announced batches want come along with the blocks that are read. Its I/O is real, so it begins ``SSD_WARM`` batches before
                those measured
"""

from __future__ import annotations

import tempfile
from collections import deque
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torchrec_mtrains.kernels import MemoryVolume, SsdVolume

from _common import Figure
from _store_writes import AnnouncedIds, PooledTable, filled
from _train_traces import ZIPFS, Stretch, Trace, traces

LOOKAHEAD = 64
SSD_RECORD_BYTES = 260  # 64 floats and a state: 14 records a block
SSD_WARM = 600  # batches
OURS = ("ours", "ahead", "neighbours")

Uses = list[np.ndarray]
"""By batch: its distinct rows, in the order of their last use in it."""


def uses_of(trace: Trace) -> Uses:
    uses = []
    for ids in trace.ids:
        unique, from_end = np.unique(ids[::-1], return_index=True)
        uses.append(unique[np.argsort(-from_end)])
    return uses


def lru(uses: Uses, rows: int, pool_rows: int) -> np.ndarray:
    """Misses by batch."""
    used_in = np.full(rows, -1, np.int32)  # the last batch that did; -1: not resident
    oldest: deque[tuple[int, np.ndarray]] = deque()  # batches and their rows; some of these were used again, or have left
    misses, free = np.zeros(len(uses), np.int64), pool_rows
    for b, used in enumerate(uses):
        misses[b] = np.count_nonzero(used_in[used] < 0)
        free -= misses[b]
        used_in[used] = b
        while free < 0:
            batch, candidates = oldest.popleft()
            candidates = candidates[used_in[candidates] == batch]
            leave, stay = candidates[:-free], candidates[-free:]
            used_in[leave] = -1
            free += len(leave)
            if len(stay):
                oldest.appendleft((batch, stay))
        oldest.append((b, used))
    return misses


def next_uses(uses: Uses) -> Uses:
    """By batch, for each of its rows, the next batch that uses it; ``len(uses)`` where none does."""
    rows = np.concatenate(uses)
    batch = np.repeat(np.arange(len(uses), dtype=np.int32), [len(u) for u in uses])
    by_row = np.argsort(rows, kind="stable")
    following = np.full(len(rows), len(uses), np.int32)
    again = rows[by_row[1:]] == rows[by_row[:-1]]
    following[by_row[:-1][again]] = batch[by_row[1:][again]]
    return np.split(following, np.cumsum([len(u) for u in uses])[:-1])


def optimum(uses: Uses, rows: int, pool_rows: int) -> np.ndarray:
    """Misses by batch."""
    resident = np.zeros(rows, bool)
    # By batch: the resident rows that it will use next, in pieces. None is used before, so each is in exactly one of these.
    waiting: list[Uses] = [[] for _ in range(len(uses) + 1)]
    furthest = 0
    misses, free = np.zeros(len(uses), np.int64), pool_rows
    for b, (used, following) in enumerate(zip(uses, next_uses(uses), strict=True)):
        misses[b] = np.count_nonzero(~resident[used])
        free -= misses[b]
        while free < 0:
            while furthest > b and not waiting[furthest]:
                furthest -= 1
            if furthest == b:
                raise ValueError(f"a pool of {pool_rows} rows cannot hold batch {b}, which uses {len(used)}")
            piece = waiting[furthest].pop()
            leave, stay = piece[:-free], piece[-free:]
            resident[leave] = False
            free += len(leave)
            if len(stay):
                waiting[furthest].append(stay)
        resident[used] = True
        waiting[b].clear()
        order = np.argsort(following, kind="stable")
        batches, first = np.unique(following[order], return_index=True)
        for batch, piece in zip(batches, np.split(used[order], first[1:]), strict=True):
            waiting[batch].append(piece)
        furthest = max(furthest, int(batches[-1]))
    return misses


def ours(trace: Trace, pool_rows: int, lookahead: int, volume: MemoryVolume | SsdVolume, record_bytes: int) -> np.ndarray:
    """Misses by batch of a slot pool that knows the ``lookahead`` batches that come next."""
    pooled = PooledTable(volume, trace.rows, record_bytes, pool_rows)
    ids = [torch.from_numpy(of_batch) for of_batch in trace.ids]
    announced: deque[AnnouncedIds] = deque()
    counts = np.zeros(len(ids) + 1, np.int64)
    for b in range(len(ids)):
        announced.extend(pooled.announce(coming) for coming in ids[b + len(announced) : b + lookahead])
        pooled.train(ids[b], announced.popleft().number if announced else 0)
        counts[b + 1] = pooled.misses
    return np.diff(counts)


def ours_on_ssd(trace: Trace, pool_rows: int, folder: Path, stretch: Stretch) -> np.ndarray:
    """``ours`` with lookahead over a volume of blocks, which bring neighbours along; the batches before ``SSD_WARM`` are left out."""
    skipped = max(0, stretch.warm - SSD_WARM)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        volume = filled(Path(name) / "volume", trace.rows, SSD_RECORD_BYTES, 3 * trace.rows * (SSD_RECORD_BYTES + 36) + (256 << 20))
        seen = replace(trace, ids=trace.ids[skipped : stretch.warm + stretch.measured + LOOKAHEAD])
        misses = ours(seen, pool_rows, LOOKAHEAD, volume, SSD_RECORD_BYTES)
        volume.close()
    return np.concatenate([np.zeros(skipped, np.int64), misses])


def _counted(made: list[Trace], stretch: Stretch, shares: tuple[float, ...], folder: Path) -> dict[str, Any]:
    """``made``: tables that are alike."""
    uses, rows, inside = [uses_of(trace) for trace in made], made[0].rows, slice(stretch.warm, stretch.warm + stretch.measured)
    unique = sum(len(u) for of_table in uses for u in of_table[inside])
    pools = {}
    for share in shares:
        start, pool_rows = perf_counter(), int(rows * share)
        by_batch = {
            "lru": [lru(u, rows, pool_rows) for u in uses],
            "optimum": [optimum(u, rows, pool_rows) for u in uses],
            "ours": [ours(trace, pool_rows, 0, MemoryVolume(), 4) for trace in made],
            "ahead": [ours(trace, pool_rows, LOOKAHEAD, MemoryVolume(), 4) for trace in made],
            "neighbours": [ours_on_ssd(trace, pool_rows, folder, stretch) for trace in made],
        }
        ratios = {policy: float(sum(m[inside].sum() for m in misses) / unique) for policy, misses in by_batch.items()}
        pools[str(share)] = {"pool_rows": pool_rows, **ratios, "seconds": perf_counter() - start}
    return {"rows": rows, "unique_rows_per_batch": unique / stretch.measured / len(made), "pools": pools}


def measure(
    root: Path,
    *,
    rows: int,
    lookups: int,
    tables: int,
    stretch: Stretch,
    pools: tuple[float, ...],
    movielens: Path | None,
    copies: int,
    only: list[str] | None,
) -> dict[str, Any]:
    """``pools``: shares of a table's rows."""
    f: dict[str, Any] = {"rows": rows, "lookups": lookups, "tables": tables, "stretch": vars(stretch), "traces": {}}
    by_table = [traces(rows, lookups, stretch, movielens, copies, t) for t in range(tables)]
    _print_line("trace", "rows", "unique", "pool", "LRU", "optimum", *(head for p in OURS for head in (p, "÷ LRU")), "÷ optimum", "s")
    for name in only or by_table[0]:
        made = [of_table[name]() for of_table in by_table[: 1 if name.startswith("ml-") else tables]]
        f["traces"][name] = counted = _counted(made, stretch, pools, root)
        for share, r in counted["pools"].items():
            sizes = f"{counted['rows']:,}", f"{counted['unique_rows_per_batch']:,.0f}", f"{float(share):.0%}"
            ratios = r["lru"], r["optimum"], *(x for p in OURS for x in (r[p], r[p] / r["lru"])), r["neighbours"] / r["optimum"]
            _print_line(name, *sizes, *(f"{x:.3f}" for x in ratios), f"{r['seconds']:.1f}")
    return f


def _print_line(name: str, *cells: str) -> None:
    print(f"{name:<22}" + "".join(f"{c:>11}" for c in cells), flush=True)


def show(f: dict[str, Any]) -> None:
    """Printed as it is measured."""


def figures(f: dict[str, Any]) -> list[Figure]:
    without = {name: 0.91 if drifts else 0.86 for name, (_, drifts) in ZIPFS.items()}
    looking = {"0.02": 0.75, "0.05": 0.78, "0.1": 0.80}
    lines = []
    for name, trace in f["traces"].items():
        for share, r in trace["pools"].items():
            where = f"{name}, pool {float(share):.0%}"
            alone = without.get(name, 1.0) if float(share) >= 0.05 else 1.0
            both = looking.get(share, 1.0) if name == "zipf 1.05" else 1.0
            lines.append(Figure(f"misses ÷ LRU's, no lookahead: {where}", r["ours"] / r["lru"], f"≤ {alone:.2f}", 3))
            lines.append(Figure(f"misses ÷ LRU's, lookahead and neighbours: {where}", r["neighbours"] / r["lru"], f"≤ {both:.2f}", 3))
            lines.append(Figure(f"misses ÷ optimum's, no lookahead: {where}", r["ours"] / r["optimum"]))
            lines.append(Figure(f"misses ÷ optimum's, lookahead and neighbours: {where}", r["neighbours"] / r["optimum"]))
    return lines
