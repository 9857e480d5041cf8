"""What a group of tiered tables holds of batches on their way: their ids, and the tickets of those that have begun.

Both are found by the identity of a batch's ids (``key``), and live as long as the pool may use them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

WAITING_LIMIT = 64
"""Prefetched batches that wait for their forward before those that were revoked meanwhile are forgotten."""


class Ids:
    """The ids of one batch: ``batch`` as the pool reads them, which needs what is ``kept`` until the batch has begun or was withdrawn."""

    __slots__ = ("batch", "count", "kept")

    def __init__(self, batch: Any, count: int, *kept: Tensor) -> None:
        self.batch, self.count, self.kept = batch, count, kept


class Ticket:
    """One batch on its way: its number, its slots, and whether its rows are already marked as to be changed. One that nobody claims
    is released with its last reference."""

    __slots__ = ("dirty", "ids", "seq", "slots", "unclaimed_in")

    def __init__(self, seq: int, slots: Tensor, ids: Ids, dirty: bool) -> None:
        self.seq, self.slots, self.ids, self.dirty = seq, slots, ids, dirty
        self.unclaimed_in: Any = None  # a pool

    def __del__(self) -> None:
        if self.unclaimed_in is not None:
            self.unclaimed_in.release(self.seq)


class Token:
    """Lives in an autograd node's metadata, so that the node's death releases the ticket. The pool may use its slots and ids until then."""

    __slots__ = ("_kept", "_pool", "_seq")

    def __init__(self, pool: Any, ticket: Ticket) -> None:
        self._pool, self._seq, self._kept = pool, ticket.seq, (ticket.slots, ticket.ids)

    def __del__(self) -> None:
        self._pool.release(self._seq)


def key(indices: Tensor) -> tuple[int, int]:
    """The identity of a batch's ids, whatever they are cast to later."""
    return indices.data_ptr(), indices.numel()
