"""The placement problem without tables or TorchRec: arrays of candidates, ranks and what they hold.

A *candidate* is one way to keep one table: memory of its shard in every tier, and milliseconds that a step keeps each resource busy
for that shard. A candidate is *spread* (one such shard on every rank) or single (one shard on one rank). Rows of the arrays are
candidates, those of a table adjacent. A plan picks one candidate a table and a rank for each single one; its cost is the step of the
slowest rank: the largest of what its own resources are busy and of what the devices that it shares with the ranks of its host are busy
for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Choices:
    """Candidates. Shapes: table (n,), sorted, every table named; spread (n,); memory (n, tiers); busy (n, resources)."""

    table: Ints
    spread: NDArray[np.bool_]
    memory: Floats
    busy: Floats

    @property
    def tables(self) -> int:
        return int(self.table[-1]) + 1

    @property
    def starts(self) -> Ints:
        """The first candidate of every table, and the number of all."""
        return np.searchsorted(self.table, np.arange(self.tables + 1))

    def take(self, which: Any) -> Choices:
        """Some of the candidates."""
        return Choices(self.table[which], self.spread[which], self.memory[which], self.busy[which])


@dataclass(frozen=True)
class Ranks:
    """Ranks, host after host. Shapes: capacity (ranks, tiers); base_busy_ms (resources,): what every rank is busy with besides
    tables; shared (resources,): whether ranks of a host share the resource."""

    capacity: Floats
    base_busy_ms: Floats
    shared: NDArray[np.bool_]
    per_host: int = 1

    @property
    def count(self) -> int:
        return len(self.capacity)

    @property
    def hosts(self) -> int:
        return -(-self.count // self.per_host)

    @property
    def host_of(self) -> Ints:
        return np.arange(self.count) // self.per_host


@dataclass(frozen=True)
class Assignment:
    """A candidate for every table, and its rank, -1 for a spread one. Shapes: both (tables,)."""

    candidate: Ints
    rank: Ints


class Load:
    """What all ranks hold and do under an assignment; tables can be taken out and put back.

    Invariant: ``memory`` (ranks, tiers) and ``busy`` (ranks, resources) are the sums over the tables that are in.
    """

    def __init__(self, choices: Choices, ranks: Ranks) -> None:
        self._choices, self._ranks = choices, ranks
        self.memory = np.zeros_like(ranks.capacity)
        self.busy = np.tile(ranks.base_busy_ms, (ranks.count, 1))

    @classmethod
    def of(cls, choices: Choices, ranks: Ranks, assignment: Assignment) -> Load:
        load = cls(choices, ranks)
        for candidate, rank in zip(assignment.candidate, assignment.rank, strict=True):
            load.add(int(candidate), int(rank))
        return load

    def add(self, candidate: int, rank: int, sign: int = 1) -> None:
        where = slice(None) if rank < 0 else rank
        self.memory[where] += sign * self._choices.memory[candidate]
        self.busy[where] += sign * self._choices.busy[candidate]

    def own_ms(self) -> Floats:
        """What the busiest resource of its own costs each rank. Shape (ranks,)."""
        return self.busy[:, ~self._ranks.shared].max(axis=1, initial=0.0)

    def host_busy_ms(self) -> Floats:
        """What all ranks of each host keep the shared resources busy. Shape (hosts, shared resources)."""
        starts = np.arange(0, self._ranks.count, self._ranks.per_host)
        return np.add.reduceat(self.busy[:, self._ranks.shared], starts, axis=0)

    def step_ms(self) -> Floats:
        """Each rank's step. Shape (ranks,)."""
        host = self.host_busy_ms().max(axis=1, initial=0.0)
        return np.maximum(self.own_ms(), host[self._ranks.host_of])

    def excess(self) -> Floats:
        """Memory beyond the capacity of each rank. Shape (ranks, tiers)."""
        return np.maximum(0.0, self.memory - self._ranks.capacity)

    def fits(self) -> bool:
        return bool((self.memory <= self._ranks.capacity).all())


def fitting(choices: Choices, ranks: Ranks) -> Ints:
    """The candidates whose shard some rank can hold, and all of a table that has none. Shape (fitting,)."""
    fits = (choices.memory <= ranks.capacity.max(axis=0)).all(axis=1)
    some = np.logical_or.reduceat(fits, choices.starts[:-1])
    return np.flatnonzero(fits | ~some[choices.table])


def objective_ms(choices: Choices, ranks: Ranks, assignment: Assignment) -> float:
    """The step of the slowest rank; infinite where a rank's memory is exceeded."""
    load = Load.of(choices, ranks, assignment)
    return float(load.step_ms().max()) if load.fits() else float("inf")
