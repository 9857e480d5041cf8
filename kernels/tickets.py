"""What a group of tiered tables holds of batches on their way: their ids, and the tickets of those that have begun.

Both are found by the identity of a batch's ids (``ByIds``), and live as long as the pool may use them.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from torch import Tensor

WAITING_LIMIT = 64
"""Prefetched batches that wait for their forward before those that were revoked meanwhile are forgotten."""


class Ids:
    """The ids of one batch: ``batch`` as the pool reads them, from ``read`` and what is ``kept`` besides until the batch has begun or was
    withdrawn."""

    __slots__ = ("batch", "kept", "read")

    def __init__(self, batch: Any, read: Tensor, *kept: Tensor) -> None:
        self.batch, self.read, self.kept = batch, read, kept


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


T = TypeVar("T")


class ByIds(Generic[T]):
    """Items of batches, found by the identity of the ids tensor, whatever it is cast to later; of several with one, the oldest first."""

    def __init__(self) -> None:
        self._queues: dict[tuple[int, int], deque[T]] = {}

    def __len__(self) -> int:
        return len(self._queues)

    def __iter__(self) -> Iterator[T]:
        return itertools.chain.from_iterable(self._queues.values())

    def put(self, indices: Tensor, item: T) -> None:
        """Behind the others of this tensor."""
        self._queues.setdefault(_key(indices), deque()).append(item)

    def take(self, indices: Tensor) -> T | None:
        """The oldest of this tensor; None, if there is none."""
        queue = self._queues.get(_key(indices))
        if queue is None:
            return None
        item = queue.popleft()
        if not queue:
            del self._queues[_key(indices)]
        return item

    def keep(self, which: Callable[[T], bool]) -> None:
        """Forgets the others."""
        kept = {key: deque(filter(which, queue)) for key, queue in self._queues.items()}
        self._queues = {key: queue for key, queue in kept.items() if queue}

    def clear(self) -> None:
        """Forgets all."""
        self._queues.clear()


def _key(indices: Tensor) -> tuple[int, int]:
    return indices.data_ptr(), indices.numel()
