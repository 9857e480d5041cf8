"""From the relaxation to a plan: round, place, and improve table by table and pair by pair.

``placing.py`` says what a state costs. A *re-placement* takes a table out and puts it back as the candidate and on the rank of least
cost. A *resizing* leaves every table where it is and chooses the sizes of all anew, by another linear program. No re-placement that raises
the cost is ever made; a resizing may, and the best state is kept.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from .budget import Budget
from .choices import Assignment, Choices, Floats, Ints, Load, Ranks, fitting, objective_ms
from .placing import ON_ALL, WORK, Placing
from .relaxation import Relaxation, relax
from .sizes_in_place import best_shares, rows_of_program

_EXCESS = 1e4  # steps that memory beyond the whole capacity costs
_LEAST_GAIN = 1e-6  # of the step: smaller improvements are rounding
_LEAST_RELIEF = 1e-9  # of a rank's memory: less is rounding, and would be chosen for ever
_CLOSE = 1e-4  # of the bound: nothing to search for beyond
_FORCED = 150  # places a round
_SPLIT_IF_DEARER = (-1.0, 0.1, 0.3)  # -1: never by itself
_LARGE = 0.05
_RESIZINGS = 5  # of each rounding
_PRICE_FACTORS = tuple(np.geomspace(0.2, 5.0, 9))  # of the relaxation's prices of memory: what a resizing chooses from
_PLACES_A_ROW = 300  # what a row of its program costs, in places tried
_SHORTLIST = 24  # places of the first table of a pair that are followed up
_ROUNDING = 0.5  # of the work, at most, for the start


@dataclass(frozen=True)
class Solution:
    """The best plan found. ``objective_ms`` is infinite where none was found to fit."""

    assignment: Assignment
    objective_ms: float
    relaxation: Relaxation

    @property
    def over_bound(self) -> float:
        """The plan's step ÷ the step that no plan can beat."""
        return self.objective_ms / self.relaxation.bound_ms if self.relaxation.bound_ms else 1.0


def solve(choices: Choices, ranks: Ranks, seconds: float = 5.0, start: Assignment | None = None) -> Solution:
    """A plan, and the bound that says how good it is. ``start``: a plan to improve, instead of the rounded relaxation.

    ``seconds`` of work, which is counted: the same plan every time, on any machine but one so slow or busy that time is the last resort
    (``budget.py``).
    """
    budget = Budget(seconds)
    relaxation = relax(choices, ranks, budget.deadline_s)
    which = fitting(choices, ranks) if start is None else np.union1d(fitting(choices, ranks), start.candidate)
    search = _Search(choices.take(which), ranks, replace(relaxation, share=relaxation.share[which]), budget)
    if start is None:
        search.begin(search.rounded(budget.part(_ROUNDING)))
    else:
        search.begin(Assignment(np.searchsorted(which, start.candidate), start.rank))
    found = search.search(budget)
    best = Assignment(which[found.candidate], found.rank)
    return Solution(best, objective_ms(choices, ranks, best), relaxation)


class _Search:
    """A complete assignment and its load, improved in place."""

    def __init__(self, choices: Choices, ranks: Ranks, relaxation: Relaxation, budget: Budget) -> None:
        self._choices, self._ranks, self._budget = choices, ranks, budget
        self._starts, self._relaxation = choices.starts, relaxation
        self._scale = max(relaxation.bound_ms, 1e-9)
        self._load = Load(choices, ranks)
        step_ms = max(self._scale, float(choices.busy.max()))  # a relaxation that was cut short has a low bound, or none
        self._placing = Placing(choices, ranks, self._load, _EXCESS * step_ms)
        self._candidate = np.full(choices.tables, -1, dtype=np.int64)
        self._rank = np.full(choices.tables, ON_ALL, dtype=np.int64)

    @property
    def assignment(self) -> Assignment:
        return Assignment(self._candidate.copy(), self._rank.copy())

    def begin(self, start: Assignment) -> None:
        """Starts from a plan."""
        for table, (candidate, rank) in enumerate(zip(start.candidate, start.rank, strict=True)):
            self._put(table, int(candidate), int(rank))

    def rounded(self, budget: Budget) -> Assignment:
        """The best of several roundings of the relaxation, each placed and improved by single moves.

        The relaxation does not see that large shards are hard to place: to it, a table is as good whole as split. So some roundings split
        the large ones where the relaxation's prices make that no more than so much dearer.
        """
        found: list[tuple[float, Assignment]] = []
        self._budget = budget
        for dearer in _SPLIT_IF_DEARER:
            self.place(self._rounded(dearer))
            self._settle()
            found.append((self._placing.cost(), self.assignment))
            for table in range(self._choices.tables):
                self._take(table)
        return min(found, key=lambda pair: pair[0])[1]

    def _rounded(self, dearer: float) -> Ints:
        """Of each table the candidate with the largest share; for a large one the cheapest split one, if it is cheap. Shape (tables,)."""
        c, starts, found = self._choices, self._starts, self._relaxation
        copies = np.where(c.spread, self._ranks.count, 1)[:, None] / self._ranks.count
        crowd = np.where(self._ranks.shared, self._ranks.per_host, 1)
        value = c.memory * copies @ found.memory_price + c.busy * copies * crowd @ found.busy_price
        chosen = np.empty(c.tables, dtype=np.int64)
        for table, (first, last) in enumerate(pairwise(starts)):
            pick = first + int(np.argmax(found.share[first:last]))
            split = first + np.flatnonzero(c.spread[first:last])
            if dearer >= 0 and len(split) and self._size(np.array([pick]))[0] > _LARGE:
                cheapest = split[np.argmin(value[split])]
                if value[cheapest] <= (1 + dearer) * value[first:last].min():
                    pick = int(cheapest)
            chosen[table] = pick
        return chosen

    def _size(self, candidates: Ints) -> Floats:
        """The largest part of a rank's memory, or of the step, that each takes."""
        c = self._choices
        return np.maximum((c.memory[candidates] / self._placing.unit).max(axis=1), c.busy[candidates].max(axis=1) / self._scale)

    def place(self, chosen: Ints) -> None:
        """The chosen candidates, the largest first, each where it leaves most room. Shape (tables,)."""
        c = self._choices
        for table in np.lexsort((-self._size(chosen), ~c.spread[chosen])):
            candidate = int(chosen[table])
            if c.spread[candidate]:
                self._put(table, candidate, ON_ALL)
                continue
            memory = ((self._load.memory + c.memory[candidate]) / np.maximum(self._ranks.capacity, 1.0)).max(axis=1)
            own = (self._load.busy + c.busy[candidate])[:, ~self._ranks.shared].max(axis=1, initial=0.0)
            host = (self._load.host_busy_ms() + c.busy[candidate, self._ranks.shared]).max(axis=1, initial=0.0)[self._ranks.host_of]
            fill = np.maximum(memory, np.maximum(own, host) / self._scale)
            self._put(table, candidate, int(np.lexsort((memory + own / self._scale, fill))[0]))
        for rank in np.flatnonzero(self._load.excess().any(axis=1)):
            self._shrink(int(rank))

    def _shrink(self, rank: int) -> None:
        """Cuts for a rank that does not fit: its single tables give memory up where that costs least busy time a byte."""
        c = self._choices
        here = np.flatnonzero(self._rank == rank)
        options = np.flatnonzero(np.isin(c.table, here) & ~c.spread)
        work = c.busy @ (self._relaxation.busy_price * np.where(self._ranks.shared, self._ranks.per_host, 1) + WORK)
        while len(options) and self._load.excess()[rank].any():
            now = self._candidate[c.table[options]]
            excess = (self._load.excess()[rank] / self._placing.unit).sum()
            after = self._load.memory[rank] + c.memory[options] - c.memory[now] - self._ranks.capacity[rank]
            relief = excess - (np.maximum(0.0, after) / self._placing.unit).sum(axis=1)
            relief[relief < _LEAST_RELIEF] = 0.0
            loss = np.maximum(work[options] - work[now], 1e-12 * self._scale)
            best = int(np.argmax(relief / loss))
            if relief[best] <= 0:
                return
            table = int(c.table[options[best]])
            self._take(table)
            self._put(table, int(options[best]), rank)

    def _settle(self) -> None:
        """Single moves until none helps, and other sizes of all, as long as both together help."""
        best, best_cost = self.assignment, float("inf")
        for again in range(1 + _RESIZINGS):
            if again:
                self._resize()
            while not self._budget.over and (self._sweep(-1) or self._exchanges(-1)):
                pass
            if self._placing.cost() >= best_cost - _LEAST_GAIN * self._scale or self._budget.over:
                break
            best, best_cost = self.assignment, self._placing.cost()
        if self._placing.cost() > best_cost:
            self._restore(best)

    def _resize(self) -> None:
        """Other sizes of all tables, each on the ranks where it is: a program as the relaxation's, with every rank's memory for itself;
        of its solution the largest shares."""
        c, ranks = self._choices, self._ranks
        share = best_shares(c, ranks, self._rank, self._shortlist(), self._budget.time_left_s)
        self._budget.spend(_PLACES_A_ROW * rows_of_program(ranks, c.tables, c.memory.shape[1], c.busy.shape[1]))
        if share is None:
            return
        for table in range(c.tables):
            first = self._starts[table]
            self._take(table)
            self._put(table, int(first + np.argmax(share[first : self._starts[table + 1]])), int(self._rank[table]))
        for rank in np.flatnonzero(self._load.excess().any(axis=1)):
            self._shrink(int(rank))

    def _shortlist(self) -> Ints:
        """Candidates of all tables where they are: what they are now, and those that are cheapest at several prices of memory."""
        c, found = self._choices, self._relaxation
        mine = np.flatnonzero(c.spread == (self._rank[c.table] == ON_ALL))
        starts = np.searchsorted(c.table[mine], np.arange(c.tables))
        work = c.busy[mine] * np.where(self._ranks.shared, self._ranks.per_host, 1) @ found.busy_price + WORK * c.busy[mine].sum(axis=1)
        memory = c.memory[mine] * found.memory_price
        kept, priced = [self._candidate], found.memory_price > 0
        for factors in itertools.product(_PRICE_FACTORS[:: 1 if priced.sum() < 3 else 2], repeat=int(priced.sum())):
            of_tier = np.ones(len(priced))
            of_tier[priced] = factors
            kept.append(mine[_first_least(work + memory @ of_tier, starts)])
        return np.unique(np.concatenate(kept))

    def search(self, budget: Budget) -> Assignment:
        """The best of what ``improve`` makes of the start and of the best so far with one table forced to another place, from where the
        others are improved first. Places are tried in random order; each success begins another round."""
        random = np.random.default_rng(0)
        self._budget = budget
        self._settle()
        self.improve()
        best, best_cost = self.assignment, self._placing.cost()
        options = self._placing.places
        table_of = np.repeat(np.arange(len(options)), [len(candidates) for candidates, _ in options])
        candidate_of, rank_of = (np.concatenate(parts) for parts in zip(*options, strict=True))
        queue = list(random.permutation(len(table_of))[:_FORCED])
        while queue and not budget.over and self._load.step_ms().max() > self._scale * (1 + _CLOSE):
            at = queue.pop()
            self._take(table_of[at])
            self._put(table_of[at], int(candidate_of[at]), int(rank_of[at]))
            self.improve(keep=int(table_of[at]))
            self.improve()
            if self._placing.cost() < best_cost - _LEAST_GAIN * self._scale:
                best, best_cost = self.assignment, self._placing.cost()
                queue = list(random.permutation(len(table_of))[:_FORCED])
            else:
                self._restore(best)
        return best

    def _restore(self, assignment: Assignment) -> None:
        for table in np.flatnonzero((assignment.candidate != self._candidate) | (assignment.rank != self._rank)).tolist():
            self._take(table)
            self._put(table, int(assignment.candidate[table]), int(assignment.rank[table]))

    def improve(self, keep: int = -1) -> None:
        """Re-placements until none helps, then exchanges, then re-placed pairs; from the start after each success. ``keep``
        stays where it is."""
        moves = (self._sweep, self._exchanges, self._pairs)
        at = 0
        while at < len(moves) and not self._budget.over:
            at = 0 if moves[at](keep) else at + 1

    def _sweep(self, keep: int) -> bool:
        improved = False
        before = self._placing.cost()
        for table in range(self._choices.tables):
            if self._budget.over:
                break
            if table == keep:
                continue
            self._take(table)
            candidate, rank, after = self._best(table)
            if after < before - _LEAST_GAIN * self._scale:
                self._put(table, candidate, rank)
                improved, before = True, after
            else:
                self._put(table, int(self._candidate[table]), int(self._rank[table]))
        return improved

    def _exchanges(self, keep: int) -> bool:
        """Single tables change ranks with each other, as they are; all partners of a table are tried at once."""
        improved = False
        single = np.setdiff1d(np.flatnonzero(self._rank != ON_ALL), [keep])
        for first in single[np.argsort(-self._load.step_ms()[self._rank[single]], kind="stable")]:
            if self._budget.over:
                break
            partners = single[self._rank[single] != self._rank[first]]
            if not len(partners):
                continue
            costs = self._exchanged(int(first), partners)
            self._budget.spend(len(partners))
            at = int(np.argmin(costs))
            if costs[at] < self._placing.cost() - _LEAST_GAIN * self._scale:
                second, improved = int(partners[at]), True
                places = (int(self._candidate[first]), int(self._rank[second])), (int(self._candidate[second]), int(self._rank[first]))
                for table, place in zip((int(first), second), places, strict=True):
                    self._take(table)
                    self._put(table, *place)
        return improved

    def _exchanged(self, first: int, partners: Ints) -> Floats:
        """The cost of the state with the first table and each partner on each other's rank. Shape (partners,)."""
        c, shared, host_of = self._choices, self._ranks.shared, self._ranks.host_of
        here, there = np.full(len(partners), self._rank[first]), self._rank[partners]
        mine, theirs = self._candidate[first], self._candidate[partners]
        more_memory, more_busy = c.memory[theirs] - c.memory[mine], c.busy[theirs] - c.busy[mine]
        own, host_busy = self._load.own_ms(), self._load.host_busy_ms()
        host = host_busy.max(axis=1, initial=0.0)
        excess = (self._load.excess() / self._placing.unit).sum(axis=1)
        own_sum, host_sum, excess_sum = own.sum(), host.sum(), excess.sum()
        slowest = np.maximum(_others_of_two(own, here, there), _others_of_two(host, host_of[here], host_of[there]))
        moved = np.where(host_of[here] == host_of[there], 0.0, 1.0)[:, None]
        own_sum, host_sum, excess_sum = (np.full(len(partners), x) for x in (own_sum, host_sum, excess_sum))
        for rank, sign in ((here, 1), (there, -1)):
            own_with = (self._load.busy[rank] + sign * more_busy)[:, ~shared].max(axis=1, initial=0.0)
            host_with = (host_busy[host_of[rank]] + sign * moved * more_busy[:, shared]).max(axis=1, initial=0.0)
            over = np.maximum(0.0, self._load.memory[rank] + sign * more_memory - self._ranks.capacity[rank])
            slowest = np.maximum(slowest, np.maximum(own_with, host_with))
            own_sum += own_with - own[rank]
            host_sum += host_with - host[host_of[rank]]
            excess_sum += (over / self._placing.unit).sum(axis=1) - excess[rank]
        mean = own_sum / len(own) + host_sum / len(host)
        return np.asarray(self._placing.total(slowest, mean, excess_sum, self._load.busy.sum() / len(own)))

    def _pairs(self, keep: int) -> bool:
        """Both tables of a pair out, and back where the two cost least; pairs with a table of a slowest rank first."""
        improved = False
        step = self._load.step_ms()
        slowness = np.where(self._rank == ON_ALL, step.max(), step[self._rank])
        order = np.argsort(-slowness, kind="stable")
        order = order[order != keep]
        before = self._placing.cost()
        for i, first in enumerate(order):
            for second in order[i + 1 :]:
                if self._budget.over:
                    return improved
                after = self._pair(int(first), int(second), before)
                improved, before = improved or after < before, after
        return improved

    def _pair(self, first: int, second: int, before: float) -> float:
        was = [(t, int(self._candidate[t]), int(self._rank[t])) for t in (first, second)]
        self._take(first)
        self._take(second)
        found, best = was, before - _LEAST_GAIN * self._scale
        places, costs = self._placing.places[first], self._costs(first)
        shortlist = np.argsort(costs, kind="stable")[:_SHORTLIST] if len(costs) > _SHORTLIST else np.arange(len(costs))
        for at in shortlist:
            candidate, rank = int(places[0][at]), int(places[1][at])
            self._load.add(candidate, rank)
            other_candidate, other_rank, after = self._best(second)
            self._load.add(candidate, rank, -1)
            if after < best:
                found, best = [(first, candidate, rank), (second, other_candidate, other_rank)], after
        for table, candidate, rank in found:
            self._put(table, candidate, rank)
        return best if found is not was else before

    def _put(self, table: int, candidate: int, rank: int) -> None:
        self._candidate[table], self._rank[table] = candidate, rank
        self._load.add(candidate, rank)

    def _take(self, table: int) -> None:
        self._load.add(int(self._candidate[table]), int(self._rank[table]), -1)

    def _best(self, table: int) -> tuple[int, int, float]:
        costs = self._costs(table)
        at, (candidates, ranks) = int(np.argmin(costs)), self._placing.places[table]
        return int(candidates[at]), int(ranks[at]), float(costs[at])

    def _costs(self, table: int) -> Floats:
        """Of the state with a table, which is out, at each of its places."""
        costs = self._placing.costs(table)
        self._budget.spend(len(costs))
        return costs


def _first_least(values: Floats, starts: Ints) -> Ints:
    """Of each segment, the place of the first of its least values. Shapes: values (n,), starts (segments,) → (segments,)."""
    least = np.repeat(np.minimum.reduceat(values, starts), np.diff(np.append(starts, len(values))))
    hits = np.flatnonzero(values == least)
    return hits[np.searchsorted(hits, starts)]


def _others_of_two(values: Floats, i: Ints, j: Ints) -> Floats:
    """The largest of all values but two, for each pair. Shapes: values (n,), i (m,), j (m,) → (m,)."""
    result = np.zeros(len(i))
    for at in np.argsort(values)[-3:]:
        result = np.where((i != at) & (j != at), np.maximum(result, values[at]), result)
    return result
