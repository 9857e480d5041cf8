"""What announced batches cost the slot directory: ns an id more, when every row that is used is in the pool.

Each table has one row more than the pool, which no batch uses: pools that hold their whole table take no announcements.

As ``hit_path.py``: the directory runs on one thread between steps of the TBE, so that its memory is as cold as in training. Stretches
with ``LOOKAHEAD`` batches announced and stretches without take turns on the same pools and batches. Announcing a batch is counted, and so
are its lookup, its ticket and its release; neighbours play no part.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import torch

from _common import Figure, median, seconds
from _train_misses import LOOKAHEAD
from _train_traces import Stretch, zipf_trace
from hit_path import tiered

WARM = 5  # steps of each stretch that are not counted


def measure(root: Path, *, tables: int, rows: int, dim: int, batch_size: int, pooling: int, batches: int, rounds: int) -> dict[str, Any]:
    lookups = batch_size * pooling
    traces = [zipf_trace("zipf 1.05", rows, lookups, Stretch(0, batches, 0), t) for t in range(tables)]
    offsets = torch.arange(0, tables * lookups + 1, pooling)
    ids = [torch.cat([torch.from_numpy(t.ids[b]) for t in traces]) for b in range(batches)]
    gradient = torch.randn(batch_size, tables * dim, generator=torch.Generator().manual_seed(0))
    tbe = tiered(tables, rows + 1, dim, rows)
    with torch.no_grad():
        for batch in ids:
            tbe(batch, offsets)
    misses = sum(t["misses"] for t in tbe.stats())

    def step(batch: int) -> float:
        """Seconds of the directory in one step."""
        ticket: list[Any] = []

        def begin() -> None:
            ticket.append(tbe._begin(ids[batch], offsets, None, dirty=True))
            tbe._pool.wait(ticket[0].seq)

        spent = seconds(begin)
        tbe.tbe(ticket[0].slots, offsets).backward(gradient)
        return spent + seconds(lambda: tbe._pool.release(ticket[0].seq))

    def stretch(lookahead: int) -> list[float]:
        times, coming = [], deque(range(batches if lookahead else 0))
        for b in range(batches):
            spent = 0.0
            while coming and coming[0] < b + lookahead:
                batch = coming.popleft()
                spent += seconds(lambda batch=batch: tbe.announce(ids[batch], offsets))
            assert tbe._pool.announced == min(lookahead, batches - b), "batches were not announced"
            times.append(spent + step(b))
        # The first step announces a whole window, and in the last steps nothing is left to announce.
        return times[WARM : batches - lookahead]

    times: dict[int, list[float]] = {0: [], LOOKAHEAD: []}
    for _ in range(rounds):
        for lookahead, of_kind in times.items():
            of_kind += stretch(lookahead)
    assert misses == sum(t["misses"] for t in tbe.stats()), "a row was missing: this is no hit path"
    ns_per_id = {str(lookahead): 1e9 * median(of_kind) / (tables * lookups) for lookahead, of_kind in times.items()}
    return {"lookups": tables * lookups, "ns_per_id": ns_per_id, "ns_more": ns_per_id[str(LOOKAHEAD)] - ns_per_id["0"]}


def show(f: dict[str, Any]) -> None:
    print(", ".join(f"{ns:.2f} ns an id with {ahead} batches announced" for ahead, ns in f["ns_per_id"].items()))


def figures(f: dict[str, Any]) -> list[Figure]:
    return [Figure("directory cost of lookahead, ns an id", f["ns_more"], "≤ 12")]
