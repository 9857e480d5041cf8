"""The best sizes for tables that stay where they are: the relaxation's program with every rank's memory for itself.

One variable a candidate that leaves its table in its place (on the same rank, or split over all), the share of the table kept that way,
and z, the step::

    min z    each table's shares add up to 1
             memory of a rank, tier by tier      ≤ its capacity
             busy time of each of its resources  ≤ z    (a shared one: of all ranks of its host)

Rows that nothing fills are left out. Few tables have more than one share: about as many as rows are tight.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from .choices import Choices, Floats, Ints, Ranks

_WORK = 1e-4  # weight of all busy time beside z: among equal steps, the plan that does less


def best_shares(choices: Choices, ranks: Ranks, rank_of: Ints, offered: Ints, seconds: float = float("inf")) -> Floats | None:
    """Shares of all candidates in the best mixture of the ``offered`` ones; None where the time was up or nothing fits. Shapes: rank_of
    (tables,), -1 for a table on all ranks; offered: candidates that leave their tables there → (candidates,)."""
    of_tiers, of_resources = choices.memory[offered], choices.busy[offered]
    everywhere, place = choices.spread[offered], rank_of[choices.table[offered]]
    unit = np.maximum(ranks.capacity.mean(axis=0), 1.0)
    entries: list[tuple[Ints, Ints, Floats]] = []
    limits: list[Floats] = []
    columns = 1 + np.arange(len(offered))

    def rows(values: Floats, where: Ints, members: Ints) -> None:
        """A row for each group of so many members; of a candidate everywhere, each member has a shard."""
        groups = len(members)
        first = sum(map(len, limits))
        one, all_ = np.flatnonzero(~everywhere & (values > 0)), np.flatnonzero(everywhere & (values > 0))
        entries.append((first + where[one], columns[one], values[one]))
        on_each = np.repeat(first + np.arange(groups), len(all_))
        entries.append((on_each, np.tile(columns[all_], groups), np.outer(members, values[all_]).ravel()))

    for tier in np.flatnonzero((of_tiers > 0).any(axis=0)):
        rows(of_tiers[:, tier] / unit[tier], place, np.ones(ranks.count, np.int64))
        limits.append(ranks.capacity[:, tier] / unit[tier])
    for resource in np.flatnonzero((of_resources > 0).any(axis=0) | (ranks.base_busy_ms > 0)):
        shared = bool(ranks.shared[resource])
        members = np.bincount(ranks.host_of) if shared else np.ones(ranks.count, np.int64)
        rows(of_resources[:, resource], ranks.host_of[place] if shared else place, members)
        first, groups = sum(map(len, limits)), len(members)
        entries.append((first + np.arange(groups), np.zeros(groups, np.int64), -np.ones(groups)))
        limits.append(-ranks.base_busy_ms[resource] * members)
    row, column, value = (np.concatenate(parts) for parts in zip(*entries, strict=True))
    upper = np.concatenate(limits)
    solved = linprog(
        np.concatenate([[1.0], _WORK * of_resources.sum(axis=1)]),
        A_ub=coo_array((value, (row, column)), shape=(len(upper), 1 + len(offered))).tocsr(),
        b_ub=upper,
        A_eq=coo_array((np.ones(len(offered)), (choices.table[offered], columns)), shape=(choices.tables, 1 + len(offered))).tocsr(),
        b_eq=np.ones(choices.tables),
        method="highs",
        options={} if seconds == float("inf") else {"time_limit": seconds},
    )
    if solved.status != 0:
        return None
    share = np.zeros(len(choices.table))
    share[offered] = solved.x[1:]
    return share


def rows_of_program(ranks: Ranks, tables: int, tiers: int, resources: int) -> int:
    """At most, which is what solving it costs."""
    return tables + ranks.count * (tiers + resources)
