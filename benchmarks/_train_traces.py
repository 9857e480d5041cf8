"""Traces: which rows of a table each batch uses. All of them are functions of a seed.

    zipf 1.05, zipf 0.9   every lookup drawn with probability ∝ rank^-exponent, ranks scattered over the table by a permutation
    …, drifting           the same, and with every batch a thousandth of the ranks changes hands, hot and cold alike
    …, drifting slowly    3 in 10,000 of them
    mixture               lookups of two populations of their own scatter, Zipf 1.05 and 0.9, 9 : 1; 1 : 9 after half of those measured
    ml-100k users, items  one lookup an event of ``COPIES`` copies of ml-100k, each with rows of its own by hashing

Of ml-100k the ratings are in the order of time, a user's in bursts as they were made. Copies start at times of their own, spread over
the whole span, and go round it; a batch is the next events of all of them. Where two rows hash alike they are one, as in real tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from _common import ZipfIds
from torchrec_mtrains.data.scatter import hash32, stream_key

COPIES = 128
USERS, ITEMS = 943, 1682  # of ml-100k
ZIPFS = {
    "zipf 1.05": (1.05, 0.0),
    "zipf 1.05, drifting": (1.05, 1e-3),
    "zipf 0.9": (0.9, 0.0),
    "zipf 0.9, drifting": (0.9, 1e-3),
    "zipf 1.05, drifting slowly": (1.05, 3e-4),
}
"""Exponents, and the share of the ranks that changes hands with every batch."""
SHARE = 0.9  # of the mixture's lookups that one population has


@dataclass(frozen=True)
class Trace:
    """The batches of one table. Shapes: ids (batches, lookups of a batch) int64 in [0, rows)."""

    name: str
    rows: int
    ids: np.ndarray


@dataclass(frozen=True)
class Stretch:
    """Batches before what is measured, in it, and after it: what an optimum with an infinite future looks into."""

    warm: int
    measured: int
    future: int

    @property
    def batches(self) -> int:
        return self.warm + self.measured + self.future


def _seeded(table: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000 * table + stream)


def drift(zipf: ZipfIds, share: float) -> None:
    """A share of the ranks changes hands: rows of these ranks are shuffled among them."""
    rows = len(zipf.row_of_rank)
    ranks = torch.randint(rows, (max(2, round(rows * share)),), generator=zipf.generator).unique()
    zipf.row_of_rank[ranks] = zipf.row_of_rank[ranks[torch.randperm(len(ranks), generator=zipf.generator)]]


def zipf_trace(name: str, rows: int, lookups: int, stretch: Stretch, table: int) -> Trace:
    """One of ``ZIPFS``. They share their scatter, and drifting ones begin where the others stay."""
    exponent, drifts = ZIPFS[name]
    zipf = ZipfIds(rows, exponent, _seeded(table, 0))
    zipf.generator = _seeded(table, 10 + list(ZIPFS).index(name))
    ids = zipf.ranks(stretch.batches * lookups).view(stretch.batches, lookups).numpy()
    for b in range(stretch.batches):
        ids[b] = zipf.row_of_rank.numpy()[ids[b]]
        if drifts:
            drift(zipf, drifts)
    return Trace(name, rows, ids)


def mixture_trace(rows: int, lookups: int, stretch: Stretch, table: int) -> Trace:
    steep, flat = ZipfIds(rows, 1.05, _seeded(table, 1)), ZipfIds(rows, 0.9, _seeded(table, 2))
    shape = (stretch.batches, lookups)
    share = np.where(np.arange(stretch.batches) < stretch.warm + stretch.measured // 2, SHARE, 1 - SHARE)
    of_steep = np.random.default_rng(table).random(shape) < share[:, None]
    ids = np.where(of_steep, *(z.draw(of_steep.size).view(shape).numpy() for z in (steep, flat)))
    return Trace("mixture", rows, ids)


def movielens_trace(file: Path, column: str, copies: int, lookups: int, stretch: Stretch) -> Trace:
    """``column``: "users" or "items". The table has a row for each user or item of each copy."""
    users, items, _rating, seconds = np.loadtxt(file, np.int64, skiprows=1, delimiter="\t", unpack=True, converters=float)
    in_time = np.argsort(seconds, kind="stable")
    of_event, known = (users[in_time], USERS) if column == "users" else (items[in_time], ITEMS)
    events = np.arange(stretch.batches * lookups)
    copy = events % copies
    starts = np.random.default_rng(7).integers(len(of_event), size=copies)
    token = of_event[(starts[copy] + events // copies) % len(of_event)]
    rows = copies * known
    hashed = hash32((copy * (1 << 20) + token).astype(np.uint64), stream_key(len(column), known))
    row = (hashed * np.uint64(rows) >> np.uint64(32)).astype(np.int64)
    return Trace(f"ml-100k {column}", rows, row.reshape(stretch.batches, lookups))


def traces(rows: int, lookups: int, stretch: Stretch, movielens: Path | None, copies: int, table: int) -> dict[str, Callable[[], Trace]]:
    """The traces by name, each made when it is called for. ``table``: of a kind's tables which; ml-100k has one of each."""
    made: dict[str, Callable[[], Trace]] = {name: lambda n=name: zipf_trace(n, rows, lookups, stretch, table) for name in ZIPFS}
    made["mixture"] = lambda: mixture_trace(rows, lookups, stretch, table)
    if movielens:
        for column in ("users", "items"):
            made[f"ml-100k {column}"] = lambda c=column: movielens_trace(movielens, c, copies, lookups // 4, stretch)
    return made
