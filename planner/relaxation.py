"""The LP relaxation of the placement problem over all ranks together, and the bound it proves.

One variable a candidate, the share of its table that is kept that way, and z, the step::

    min z    each table's shares add up to 1
             memory of all shards, tier by tier                 ≤ memory of all ranks
             mean busy time of a resource                       ≤ z    (a shared one: of all ranks of a host, mean over hosts)
             the busiest resource of a table's own shard        ≤ z    (rows added for tables that break it)

Candidates that no rank can hold are left out. Every plan meets these rows with shares of 0 and 1, so no plan's step is below z. Few
columns matter: HiGHS solves the program with some of the candidates, its dual values price all others, and each table's cheapest ones
join, until none is cheaper. Any non-negative dual values prove a bound (weak duality), so that stopping early costs tightness and not
truth. Rounds are counted; time is a last resort: cut short before its first round is solved, the relaxation is the candidates of least
memory, without a bound.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array, hstack, vstack

from .choices import Choices, Floats, Ints, Ranks, fitting

_FIRST_PRICES = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 1e6)  # of all memory, in steps of the fastest candidates
_NEIGHBOUR_PRICES = (1.0, 0.7, 1.4)  # pricing memory a little lower and higher as well halves the rounds
_SHORT = 1e5  # steps of the fastest candidates that memory beyond the capacity costs: more than it can ever buy
_TIE_BREAK = 1e-3  # weight of all busy time together beside z: among equal steps, the plan that does less
_CLOSE = 1e-4  # of z: what pricing may still find when we stop
_MOST_ROUNDS = 60
_OUT_OF_TIME = 1  # scipy's status


@dataclass(frozen=True)
class Relaxation:
    """``bound_ms``: no plan is faster. ``share``: (candidates,) of the best solution found. ``memory_price``: (tiers,) milliseconds of the
    bound that one more byte on every rank buys. ``busy_price``: (resources,) how much the bound depends on each, adding up to
    1 at most. ``excess``: (tiers,) memory that is missing, as a part of the capacity. ``columns``: the candidates of the last program."""

    bound_ms: float
    share: Floats
    memory_price: Floats
    busy_price: Floats
    excess: Floats
    columns: Ints


def relax(choices: Choices, ranks: Ranks, deadline_s: float = float("inf"), near: Relaxation | None = None) -> Relaxation:
    """Solves the relaxation, as closely as ``deadline_s`` (of ``time.perf_counter``) allows. ``near``: of the same choices with other
    capacities, whose program is where this one begins."""
    which = fitting(choices, ranks)
    program = _Program(choices.take(which), ranks)
    columns = program.first_columns() if near is None else np.union1d(program.least_memory(), np.flatnonzero(np.isin(which, near.columns)))
    now = best = program.unsolved()
    for _ in range(_MOST_ROUNDS):
        solved = program.round(columns, deadline_s)
        if solved is None:
            break
        now, fresh, gain = solved
        if now.bound_ms >= best.bound_ms:
            best = now
        broken = program.add_own_rows(now.share)
        if not broken and (not len(np.setdiff1d(fresh, columns)) or gain <= _CLOSE * program.last_z):
            break
        if time.perf_counter() > deadline_s:
            break
        columns = np.union1d(columns, fresh)
    share = np.zeros(len(choices.table))
    share[which] = now.share
    return Relaxation(best.bound_ms, share, best.memory_price, best.busy_price, now.excess, which[columns])


class _Program:
    """Rows of the program for all candidates; ``round`` solves it with some of them."""

    def __init__(self, choices: Choices, ranks: Ranks) -> None:
        self._choices = choices
        self._starts = choices.starts
        copies = np.where(choices.spread, ranks.count, 1)[:, None]
        self._capacity = ranks.capacity.mean(axis=0)
        self._unit = np.maximum(self._capacity, 1.0)
        self._memory = choices.memory * copies / ranks.count / self._unit
        self._room = self._capacity / self._unit  # 1, or 0 where there is none of a tier
        crowd = np.where(ranks.shared, ranks.per_host, 1)
        self._busy = choices.busy * copies / ranks.count * crowd
        self._base = ranks.base_busy_ms * crowd
        alone = np.where(choices.spread[:, None], crowd, 1)
        self._own = (self._base + choices.busy * alone).max(axis=1, initial=0.0)
        self._fastest = float(np.minimum.reduceat(self._busy.sum(axis=1), self._starts[:-1]).sum() + self._base.sum()) or 1.0
        self._own_tables: list[int] = []
        self.last_z = 0.0

    def first_columns(self) -> Ints:
        """Each table's cheapest candidate at several prices of memory."""
        memory, busy = self._memory.sum(axis=1), self._busy.sum(axis=1)
        return np.unique(np.concatenate([self._cheapest(busy + p * self._fastest * memory + 1e-12 * memory) for p in _FIRST_PRICES]))

    def least_memory(self) -> Ints:
        """Each table's candidate of least memory: with these every program has a solution."""
        return self._cheapest(self._memory.sum(axis=1))

    def _cheapest(self, cost: Floats) -> Ints:
        least = np.minimum.reduceat(cost, self._starts[:-1])
        hits = np.flatnonzero(cost == least[self._choices.table])
        return hits[np.unique(self._choices.table[hits], return_index=True)[1]]

    def unsolved(self) -> Relaxation:
        """What is known without solving anything."""
        share = np.zeros(len(self._choices.table))
        share[self.least_memory()] = 1.0
        excess = np.maximum(0.0, share @ self._memory - self._room)
        return Relaxation(0.0, share, np.zeros(self._memory.shape[1]), np.zeros(self._busy.shape[1]), excess, self.least_memory())

    def round(self, columns: Ints, deadline_s: float) -> tuple[Relaxation, Ints, float] | None:
        """The solution with these candidates, the candidates that would better it, and by how much at most; None where the time was up."""
        tiers, resources, own = self._memory.shape[1], self._busy.shape[1], len(self._own_tables)
        short_cost = _SHORT * self._fastest
        cost = np.concatenate([[1.0], np.full(tiers, short_cost), _TIE_BREAK * self._busy[columns].sum(axis=1)])
        z_column = np.concatenate([np.zeros(tiers), -np.ones(resources + own)])[:, None]
        short_columns = np.vstack([-np.eye(tiers), np.zeros((resources + own, tiers))])
        table = self._choices.table[columns]
        of_own = csr_array((own, len(columns)))
        if own:
            row = np.full(self._choices.tables, -1)
            row[self._own_tables] = np.arange(own)
            inside = np.flatnonzero(row[table] >= 0)
            of_own = csr_array((self._own[columns[inside]], (row[table[inside]], inside)), shape=(own, len(columns)))
        rows = vstack([csr_array(self._memory[columns].T), csr_array(self._busy[columns].T), of_own])
        a_ub = hstack([csr_array(z_column), csr_array(short_columns), rows]).tocsr()
        b_ub = np.concatenate([self._room, -self._base, np.zeros(own)])
        ones = csr_array((np.ones(len(columns)), (table, np.arange(len(columns)))), shape=(self._choices.tables, len(columns)))
        a_eq = hstack([csr_array((self._choices.tables, 1 + tiers)), ones]).tocsr()
        limit = {} if deadline_s == float("inf") else {"time_limit": max(0.0, deadline_s - time.perf_counter())}
        solved = linprog(cost, A_ub=a_ub, b_ub=b_ub, A_eq=a_eq, b_eq=np.ones(self._choices.tables), method="highs", options=limit)
        if solved.status == _OUT_OF_TIME:
            return None
        if solved.x is None:
            raise RuntimeError(f"HiGHS did not solve the placement's relaxation: {solved.message}")
        share = np.zeros(len(self._choices.table))
        share[columns] = solved.x[1 + tiers :]
        self.last_z = float(solved.x[0])

        duals = np.maximum(0.0, -solved.ineqlin.marginals)
        duals = duals / max(1.0, duals[tiers:].sum())
        memory_price, busy_price = duals[:tiers], duals[tiers : tiers + resources]
        own_price = np.zeros(self._choices.tables)
        own_price[self._own_tables] = duals[tiers + resources :]

        def value(of_memory: float) -> Floats:
            cost_of_own = own_price[self._choices.table] * self._own
            return of_memory * self._memory @ memory_price + self._busy @ busy_price + cost_of_own

        pure = value(1.0)
        least = np.minimum.reduceat(pure, self._starts[:-1])
        bound = float(least.sum() - memory_price @ self._room + busy_price @ self._base)
        nudge = _TIE_BREAK * self._busy.sum(axis=1)
        gain = float((solved.eqlin.marginals - np.minimum.reduceat(pure + nudge, self._starts[:-1])).sum())
        fresh = np.unique(np.concatenate([self._cheapest(value(factor) + nudge) for factor in _NEIGHBOUR_PRICES]))
        excess = solved.x[1 : 1 + tiers]
        return Relaxation(max(0.0, bound), share, memory_price / self._unit, busy_price, excess, columns), fresh, gain

    def add_own_rows(self, share: Floats) -> bool:
        """Rows for the tables whose own shards exceed z in this solution. Returns whether there were any."""
        own = np.add.reduceat(share * self._own, self._starts[:-1])
        broken = [int(t) for t in np.flatnonzero(own > self.last_z * (1 + 1e-6)) if t not in self._own_tables]
        self._own_tables += broken
        return bool(broken)
