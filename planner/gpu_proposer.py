"""What to propose for GPUs: TorchRec's plans as long as everything fits in HBM, then the one that ``search`` finds; and why there is none."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torchrec.distributed.planner.types import ShardingOption, Storage

from .candidates import TIERS, candidates
from .errors import InsufficientStorageError
from .proposers import TieredProposer
from .relaxation import relax
from .search import search

_ADVICE = {
    "hbm": "Raise hbm_budget_bytes, add ranks, shrink the batch (pools hold the rows of a batch at least; see min_pool_rows) or the tables",
    "ddr": "Raise ddr_budget_bytes, add ranks, or give TieredTopology an ssd if it has none",
    "ssd": "Raise the ssd's capacity_bytes, commit a checkpoint more often or keep fewer of them, add ranks, or raise ddr_budget_bytes",
}


class GpuProposer(TieredProposer):
    """``TieredProposer`` where tables train in HBM."""

    def _in_turn(self) -> Iterator[list[ShardingOption]]:
        everything = sum(self.capacity.storage, Storage(0, 0, 0))
        if all(self.stock) and sum(min(o.total_storage.hbm for o in of_table) for of_table in self.stock) <= everything.hbm:
            yield from self._without_tiers()
        if self._fits or not all(self._tables):
            return
        seconds = 0.5 + 0.04 * len(self._tables) if self._search_seconds is None else self._search_seconds
        self.result = search(self._tables, self.capacity, self._model, seconds)
        if self.result is not None:
            yield self.result.options

    def shortage(self) -> InsufficientStorageError:
        """Why nothing was proposed that fits. On several ranks, where the tables would fit together, shards too large for what is left of
        each: what is named is then the tier that is scarcest."""
        have = {tier: max(getattr(s, tier) for s in self.capacity.storage) for tier in _ADVICE}
        for of_table, name in zip(self._ways, self._names, strict=True):
            needs = [{tier: max(getattr(s.storage, tier) for s in o.shards) - have[tier] for tier in _ADVICE} for o in of_table]
            least = min(needs, key=lambda need: sum(max(0, more) for more in need.values()))
            for tier, more in least.items():
                if more > 0:
                    what = f"table {name!r} needs {have[tier] + more} bytes on one rank, the largest has {have[tier]}"
                    return _error(tier, more, what)
        offered = candidates(self._tables, self._model, False)
        relaxation = relax(offered.choices, self.capacity.ranks(self._model))
        capacity = self.capacity.ranks(self._model).capacity.sum(axis=0)
        price = relaxation.memory_price * capacity
        short = relaxation.excess * capacity
        at = int(np.argmax(short)) if short.max() >= 1 else int(np.argmax(price))
        bytes_ = max(1, int(np.ceil(short[at])))
        return _error(TIERS[at], bytes_, f"the tables together do not fit, whatever is put where; the ranks have {int(capacity[at])}")


def _error(tier: str, short: int, what: str) -> InsufficientStorageError:
    return InsufficientStorageError(f"no plan: {tier} is {short} bytes short: {what}. {_ADVICE[tier]}", tier, short)
