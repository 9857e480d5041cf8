"""How few misses are possible without knowing the future, on the drifting Zipf traces: a policy that knows the law they are drawn from.

For every row it keeps the exact posterior (a Bayes filter): how likely each of ``BINS`` popularities is, given every batch so far, the
exponent, and that a share of the ranks changes hands with every batch. It keeps the rows most likely to be in the next batch. No real
policy has either the law or 100 bytes and a pass over all rows a batch; what this one cannot do, none that learns from the past will.

Counted on one smaller table (rows, lookups and pool by one factor), beside LRU and our pool on the same batches.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchrec_mtrains.kernels import MemoryVolume

from _common import Figure
from _train_misses import Uses, lru, ours, uses_of
from _train_traces import ZIPFS, Stretch, zipf_trace

BINS = 24
RENORMALISED_EVERY = 16  # batches


class Popularities:
    """The posterior of every row. ``in_next``: how likely each is in the next batch, up to one factor a row that cancels out."""

    def __init__(self, rows: int, lookups: int, exponent: float, drift: float) -> None:
        share = np.arange(1, rows + 1, dtype=np.float64) ** -exponent
        in_batch = -np.expm1(-lookups * share / share.sum())  # by rank
        edges = np.unique(np.concatenate([[0], np.geomspace(1, rows, BINS).astype(int)]))
        bins = list(itertools.pairwise(edges))
        self.prior = torch.tensor([(last - first) / rows for first, last in bins], dtype=torch.float32)
        self.used = torch.tensor([in_batch[first:last].mean() for first, last in bins], dtype=torch.float32)
        self.drift, self.batches = drift, 0
        self.of_row = self.prior[:, None].repeat(1, rows)
        self._sums()

    def _sums(self) -> None:
        self.whole, in_next = torch.stack([torch.ones_like(self.used), self.used]) @ self.of_row
        self.in_next = in_next / self.whole

    def see(self, rows: torch.Tensor) -> None:
        """A batch has used these rows and no others."""
        stays, comes = 1 - self.drift, self.drift * self.prior
        of_used = self.used[:, None] * (stays * self.of_row[:, rows] + comes[:, None] * self.whole[rows])
        unused = 1 - self.used
        self.of_row.mul_((unused * stays)[:, None]).addr_(unused * comes, self.whole)
        self.of_row[:, rows] = of_used
        self.batches += 1
        if self.batches % RENORMALISED_EVERY == 0:
            self.of_row.div_(self.of_row.sum(0))
        self._sums()


def best(uses: Uses, rows: int, lookups: int, exponent: float, drift: float, pools: list[int]) -> list[np.ndarray]:
    """For each size of a pool its misses by batch, when it keeps the rows most likely to be used next."""
    popularities = Popularities(rows, lookups, exponent, drift)
    resident = [torch.zeros(rows, dtype=torch.bool) for _ in pools]
    misses = [np.zeros(len(uses), np.int64) for _ in pools]
    for b, used in enumerate(map(torch.from_numpy, uses)):
        popularities.see(used)
        for mine, of_pool, pool_rows in zip(resident, misses, pools, strict=True):
            of_pool[b] = torch.count_nonzero(~mine[used])
            mine[used] = True
            (held,) = mine.nonzero(as_tuple=True)
            if len(held) > pool_rows:
                mine[held[popularities.in_next[held].topk(len(held) - pool_rows, largest=False).indices]] = False
    return misses


def measure(root: Path, *, rows: int, lookups: int, stretch: Stretch, pools: tuple[float, ...]) -> dict[str, Any]:
    """``pools``: shares of the table's rows."""
    f: dict[str, Any] = {"rows": rows, "lookups": lookups, "traces": {}}
    inside = slice(stretch.warm, stretch.warm + stretch.measured)
    sizes = [int(rows * share) for share in pools]
    for name, (exponent, drift) in ZIPFS.items():
        if not drift:
            continue
        trace = zipf_trace(name, rows, lookups, stretch, 0)
        uses = uses_of(trace)
        bound = best(uses, rows, lookups, exponent, drift, sizes)
        f["traces"][name] = {
            str(share): {
                "lru": int(lru(uses, rows, size)[inside].sum()),
                "ours": int(ours(trace, size, 0, MemoryVolume(), 4)[inside].sum()),
                "bound": int(of_pool[inside].sum()),
            }
            for share, size, of_pool in zip(pools, sizes, bound, strict=True)
        }
        for share, m in f["traces"][name].items():
            print(f"{name}, pool {share}: ÷ LRU: law known {m['bound'] / m['lru']:.3f}, ours {m['ours'] / m['lru']:.3f}", flush=True)
    return f


def show(f: dict[str, Any]) -> None:
    """Printed as it is measured."""


def figures(f: dict[str, Any]) -> list[Figure]:
    return [
        Figure(f"misses ÷ LRU's, {what}: {name}, pool {float(share):.0%} of {f['rows']:,} rows", m[policy] / m["lru"], digits=3)
        for name, of_trace in f["traces"].items()
        for share, m in of_trace.items()
        for what, policy in (("law known", "bound"), ("ours", "ours"))
    ]
