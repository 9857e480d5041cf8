"""The ids of batches that wait for their turn in a ``TieredTrainPipeline``, beside those of the batch that trains.

A batch is held twice until then. As the dataloader gave it: on every rank its own part, in host memory, of all tables. As input dist
brought it, in the order of the kernels' tables: where a table's shard is, from all ranks, in the memory that it trains in; of tables
in memory too. (On one rank whose tables are all of a kind the two are one, so that half is charged in vain.)

Waiting are batches that are prefetched, one that arrives, and those of the lookahead window. That is as long as the largest pool of
all ranks can use, which is known of a whole plan alone: in most plans one table has a pool for the longest window, and it is
everybody's, small pools' and tables' in memory. So charged is the longest that there can be::

    window = min(64, lookahead_bytes ÷ bytes of a batch on a rank)

By then every rank must have room for it, so the mean of the ranks is on the safe side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..lookahead import MOST_BATCHES

ID_BYTES, BAG_BYTES = 8, 12
"""An id, and what is held of a bag of ids: its length (int32) and its offset (int64)."""

BATCHES_WAITING = 3
"""Beside the one that trains and those of the window: prefetched ones and one that arrives (torchrec_mtrains/train_pipeline.py)."""


@dataclass(frozen=True)
class WaitingIds:
    """So many ``batches`` wait, each of ``given_bytes`` on a rank as the dataloader gave it."""

    batches: int = 0
    given_bytes: float = 0.0

    @classmethod
    def of(cls, tables: Iterable[tuple[float, float]], world_size: int, lookahead_bytes: int) -> WaitingIds:
        """``tables``: lookups and bags of each in a batch of all ranks. ``lookahead_bytes``: the pipeline's."""
        given = sum(_ids_bytes(lookups, bags) for lookups, bags in tables) / world_size
        window = min(MOST_BATCHES, math.ceil(lookahead_bytes / (2 * given))) if given else MOST_BATCHES
        return cls(BATCHES_WAITING + window, given)

    @property
    def of_rank(self) -> int:
        """Bytes of a rank's host memory, wherever the tables are."""
        return math.ceil(self.batches * self.given_bytes)

    def of_shard(self, lookups: float, bags: float) -> int:
        """Bytes beside a shard with so many lookups in so many bags a batch, in the memory that it trains in."""
        return math.ceil(self.batches * _ids_bytes(lookups, bags))


def _ids_bytes(lookups: float, bags: float) -> float:
    return ID_BYTES * lookups + BAG_BYTES * bags
