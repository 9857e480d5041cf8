"""What a state of the search costs, and what it would cost with one more table, at every place of that table at once.

Smaller is better: the slowest step, plus a little of the mean of all ranks (so that a move that helps a rank which is not the slowest
counts), plus a little of all work, plus a penalty for memory beyond a capacity (so that a start which does not fit is repaired by the same
moves). A *place* of a table is a candidate and a rank, -1 for one that is spread over all. Arrays have tiers and resources first: numpy
is fast over what comes last, and there are few of them; those of which no candidate has anything are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .choices import Choices, Floats, Ints, Load, Ranks

ON_ALL = -1

_MEAN = 0.05  # weight of the mean step beside the slowest
WORK = 1e-4  # weight of all busy time: prefers the plan that does less


@dataclass(frozen=True)
class _Ways:
    """Candidates of one table. Shapes: memory (tiers, n, 1), in units of it; own and shared (resources, n, 1); work (n, 1)."""

    memory: Floats
    own: Floats
    shared: Floats
    work: Floats


class Placing:
    """Of a load that changes; tables are put into it and taken out by others. ``excess_ms``: what memory beyond a rank's whole
    capacity costs. ``unit``: what memory is counted in, (tiers,) bytes."""

    def __init__(self, choices: Choices, ranks: Ranks, load: Load, excess_ms: float) -> None:
        self._ranks, self._load, self._excess_ms = ranks, load, excess_ms
        self.unit = np.maximum(ranks.capacity.mean(axis=0), 1.0)
        self._tiers = np.flatnonzero((choices.memory > 0).any(axis=0))
        busy = (choices.busy > 0).any(axis=0) | (ranks.base_busy_ms > 0)
        self._own, self._shared = np.flatnonzero(busy & ~ranks.shared), np.flatnonzero(busy & ranks.shared)
        self._first_of_host = np.arange(0, ranks.count, ranks.per_host)
        self._host_of = ranks.host_of
        self._spread: list[_Ways] = []
        self._single: list[_Ways] = []
        self.places: list[tuple[Ints, Ints]] = []
        for first, last in pairwise(choices.starts):
            candidates = np.arange(first, last)
            spread, single = candidates[choices.spread[first:last]], candidates[~choices.spread[first:last]]
            self._spread.append(self._ways(choices, spread))
            self._single.append(self._ways(choices, single))
            self.places.append(
                (
                    np.concatenate([spread, np.repeat(single, ranks.count)]),
                    np.concatenate([np.full(len(spread), ON_ALL), np.tile(np.arange(ranks.count), len(single))]),
                )
            )

    def _ways(self, choices: Choices, which: Ints) -> _Ways:
        memory, busy = (choices.memory[which] / self.unit).T[:, :, None], choices.busy[which].T[:, :, None]
        return _Ways(memory[self._tiers], busy[self._own], busy[self._shared], choices.busy[which].sum(axis=1)[:, None])

    def total(self, slowest: Any, mean: Any, excess: Any, work: Any) -> Any:
        """The cost. ``mean``, ``work``: of all ranks; ``excess``: in capacities, of all together."""
        return slowest + self._excess_ms * excess + (_MEAN * mean + WORK * work)

    def cost(self) -> float:
        """Of the state as it is."""
        own, host = self._load.own_ms(), self._load.host_busy_ms().max(axis=1, initial=0.0)
        excess = (self._load.excess() / self.unit).sum()
        return float(self.total(max(own.max(), host.max()), own.mean() + host.mean(), excess, self._load.busy.sum() / len(own)))

    def costs(self, table: int) -> Floats:
        """Of the state with a table, which is out, at each of its ``places``. Shape (places,)."""
        busy = self._load.busy.T
        own, shared = busy[self._own][:, None], np.add.reduceat(busy[self._shared], self._first_of_host, axis=1)[:, None]
        room = ((self._ranks.capacity - self._load.memory) / self.unit).T[self._tiers][:, None]
        on_all = self._on_all(self._spread[table], own, shared, room)
        return np.concatenate([on_all, self._on_one(self._single[table], own, shared, room).ravel()])

    # Shapes below: own (resources, 1, ranks), shared (resources, 1, hosts), room (tiers, 1, ranks).

    def _on_all(self, ways: _Ways, own: Floats, shared: Floats, room: Floats) -> Floats:
        """Shape (candidates,)."""
        own_ms = _largest(own + ways.own)
        host_ms = _largest(shared + self._ranks.per_host * ways.shared)
        excess = np.maximum(ways.memory - room, 0.0).sum(axis=0).sum(axis=1)
        slowest = np.maximum(own_ms.max(axis=1), host_ms.max(axis=1))
        mean = own_ms.sum(axis=1) / self._ranks.count + host_ms.sum(axis=1) / len(self._first_of_host)
        work = self._load.busy.sum() / self._ranks.count + ways.work[:, 0]
        return np.asarray(self.total(slowest, mean, excess, work))

    def _on_one(self, ways: _Ways, own: Floats, shared: Floats, room: Floats) -> Floats:
        """Shape (candidates, ranks)."""
        count, hosts = self._ranks.count, len(self._first_of_host)
        own_now, host_now, excess_now = _largest(own)[0], _largest(shared)[0], np.maximum(-room, 0.0).sum(axis=0)[0]
        own_ms, host_ms = _largest(own + ways.own), _largest(shared + ways.shared)
        excess = np.maximum(ways.memory - room, 0.0).sum(axis=0)
        of_host = np.maximum(host_ms, others(host_now))
        host_mean = (host_now.sum() - host_now + host_ms) / hosts
        if hosts > 1:
            of_host, host_mean = of_host[:, self._host_of], host_mean[:, self._host_of]
        slowest = np.maximum(np.maximum(own_ms, others(own_now)), of_host)
        mean = own_ms / count + (host_mean + (own_now.sum() - own_now) / count)
        work = (self._load.busy.sum() + ways.work) / count
        return np.asarray(self.total(slowest, mean, excess + (excess_now.sum() - excess_now), work))


def _largest(busy: Floats) -> Floats:
    """Over the resources, of which there may be none."""
    return np.asarray(busy.max(axis=0, initial=0.0))


def others(values: Floats) -> Floats:
    """The largest of all other values, for each. Shape (n,) → (n,)."""
    if len(values) == 1:
        return np.zeros(1)
    second, largest = np.partition(values, -2)[-2:]
    return np.where(np.arange(len(values)) == np.argmax(values), second, largest)
