"""``Turns``: batches that gave way, and whose turn it is.

A batch whose ticket gave way begins anew later, with another ticket. What it keeps until then is its *standing*: its turn, which is before
that of every batch that came after it, and what was announced for it. Who releases a ticket that gave way does not want the batch any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Standing:
    """Of a batch, which it keeps when its ticket gives way."""

    turn: int  # the number of its first ticket
    announced: int = 0  # its number, while that stands
    counted: bool = False


class Turns:
    """Of the batches of a group, by ticket. Tickets are released on any thread, all else is under the lock of ``DeviceBatches``."""

    def __init__(self) -> None:
        self._gave_way: dict[int, Standing] = {}  # of batches that have not begun anew
        self._unwanted: deque[int] = deque()  # announced batches that gave way and will not come
        self.began_anew = 0
        """The last ticket, if its batch had one before."""

    def standing_of(self, lost: int, ticket: int, announced: int) -> Standing:
        """Of the batch that comes with ``ticket``, and had ``lost``, or 0."""
        return self._gave_way.get(lost) or Standing(ticket, announced)

    def others_are_before(self, standing: Standing) -> bool:
        """Whether an earlier batch waits for room."""
        return any(other.turn < standing.turn for other in tuple(self._gave_way.values()))

    def gives_way(self, ticket: int, standing: Standing) -> None:
        """The batch of this ticket has no slots."""
        self._gave_way[ticket] = standing

    def forget(self, ticket: int) -> None:
        """The batch of this ticket waits no longer, if it did: it has another, or will not come."""
        self._gave_way.pop(ticket, None)

    def began(self, ticket: int, lost: int) -> None:
        """The batch of ``ticket``, which had ``lost``, or 0, has begun."""
        self.forget(lost)
        self.began_anew = ticket if lost else 0

    def released(self, ticket: int) -> None:
        """Nobody wants the batch of this ticket, if it gave way."""
        gone = self._gave_way.pop(ticket, None)
        if gone is not None and gone.announced:
            self._unwanted.append(gone.announced)

    def unwanted(self) -> Iterator[int]:
        """The numbers of announced batches that will not come, each once."""
        while self._unwanted:
            yield self._unwanted.popleft()

    def __contains__(self, ticket: int) -> bool:
        return ticket in self._gave_way
