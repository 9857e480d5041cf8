"""What to propose for GPUs: TorchRec's plans as long as everything fits in HBM, then the one that ``search`` finds; why there is none."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torchrec.distributed.planner.types import ShardingOption

from .assignment import solve
from .candidates import TIERS, candidates
from .choices import Load
from .errors import InsufficientStorageError
from .proposers import TieredProposer
from .search import search

_SHORTAGE_SECONDS = 0.5
_ADVICE = {
    "hbm": "Raise hbm_budget_bytes, add ranks, shrink the batch (pools hold the rows of a batch at least; see min_pool_rows) or the tables",
    "ddr": "Raise ddr_budget_bytes, add ranks, or give TieredTopology an ssd if it has none",
    "ssd": "Raise the ssd's capacity_bytes, commit a checkpoint more often or keep fewer of them, add ranks, or raise ddr_budget_bytes",
}


class GpuProposer(TieredProposer):
    """``TieredProposer`` where tables train in HBM."""

    def _in_turn(self) -> Iterator[list[ShardingOption]]:
        if all(self.stock) and sum(min(o.total_storage.hbm for o in of_table) for of_table in self.stock) <= self._in_memory_bytes:
            yield from self._without_tiers()
        if self._fits or not all(self._tables):
            return
        self.result = search(self._tables, self.capacity, self._model, self._seconds)
        if self.result is not None:
            yield self.result.options

    def shortage(self) -> InsufficientStorageError:
        """Why nothing was proposed that fits: a table that no rank has room for, or what the closest assignment found lacks on a rank; that
        may be more than is needed."""
        have = {tier: max(getattr(s, tier) for s in self.capacity.storage) for tier in _ADVICE}
        for of_table, name in zip(self._ways, self._names, strict=True):
            needs = [{tier: max(getattr(s.storage, tier) for s in o.shards) - have[tier] for tier in _ADVICE} for o in of_table]
            least = min(needs, key=lambda need: sum(max(0, more) for more in need.values()))
            for tier, more in least.items():
                if more > 0:
                    what = f"table {name!r} needs {have[tier] + more} bytes on one rank, {more} more than any has beside ids that wait"
                    return self._error(tier, more, what)
        offered, ranks = candidates(self._tables, self._model, False), self.capacity.ranks(self._model)
        closest = solve(offered.choices, ranks, _SHORTAGE_SECONDS).assignment
        excess = Load.of(offered.choices, ranks, closest).excess().max(axis=0)
        at = int(np.argmax(excess / np.maximum(1.0, ranks.capacity.max(axis=0))))
        what = f"of what was tried, it is least over the memory of a rank, {int(ranks.capacity[:, at].max())}"
        return self._error(TIERS[at], max(1, int(np.ceil(excess[at]))), what)

    def _error(self, tier: str, short: int, what: str) -> InsufficientStorageError:
        short = self.capacity_short(short) if tier == "ssd" else short
        return InsufficientStorageError(f"no plan: {tier} is {short} bytes short: {what}. {_ADVICE[tier]}", tier, short)
