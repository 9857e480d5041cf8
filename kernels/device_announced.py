"""``Announced``: batches that are announced and have not begun, and which of them the directory has heard of.

The last one is left to the next attempt, which tells it beside its own look-up. Those before are told alone.
"""

from __future__ import annotations

from typing import Any

from .device_directory import WINDOW, DeviceDirectory
from .device_ids import Batch
from .device_streams import Streams


class Announced:
    """Of a group, by number, in order."""

    def __init__(self, directory: DeviceDirectory, streams: Streams) -> None:
        self._directory, self._streams = directory, streams
        self._batches: dict[int, Batch] = {}
        self._untold: dict[int, Any] = {}  # of those, which the directory does not know yet, and the stream that announced each
        self._last = 0

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def oldest(self) -> int:
        """Its number; 0: there is none."""
        return next(iter(self._batches), 0)

    def announce(self, batch: Batch) -> int:
        """Returns its number; 0: too many are announced."""
        number = self._last + 1
        if self._batches and number - self.oldest >= WINDOW:
            return 0
        self._last = number
        self._batches[number], self._untold[number] = batch, self._streams.current()
        self.tell_but(1)
        return number

    def tell_but(self, last: int) -> None:
        """The directory hears of all but so many of the last ones."""
        if len(self._untold) > last:
            with self._streams.on_directory():
                for number in list(self._untold)[: len(self._untold) - last]:
                    self._streams.wait_for_stream(self._untold.pop(number))
                    self._directory.announce(self._batches[number], number, True)

    def told_by_attempt(self) -> tuple[Batch, int] | None:
        """The last one, if the directory has not heard of it: the attempt that is queued next tells it."""
        self.tell_but(1)
        for number in list(self._untold):
            self._streams.wait_for_stream(self._untold.pop(number))
            return self._batches[number], number
        return None

    def begins(self, number: int) -> None:
        """The batch is announced no longer; where the directory has heard of it, its look-up says so. 0: it was not."""
        self._batches.pop(number, None)
        self._untold.pop(number, None)

    def withdraw(self, number: int) -> None:
        """The batch will not come."""
        with self._streams.on_directory():
            batch = self._batches.pop(number)
            if self._untold.pop(number, self) is self:
                self._directory.announce(batch, number, False)
                self._streams.keep(self._streams.now(), batch)
