"""How many coming batches a pipeline holds beyond those that it prefetches: the lookahead window.

Input dist is a collective, so every rank must start as many of them in every step. What a rank wishes, and what it has room for,
depends on its own batches and pools; the window is the largest wish of all ranks, as far as every one of them has room. They agree on
the window of a step while the step before trains.

A rank wishes for what was asked for, or else for what its pools can use (``TieredTBE.useful_lookahead``), which may be nothing. It has
room for as many batches as fit in ``limit_bytes``, and for at most one more than it has: a window fills while the job trains, not before
its first step.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from .errors import ConfigurationError

MOST_BATCHES = 64
"""As many as a slot pool keeps in mind: one bit a batch in the window of a row."""

POOLS_OF_BATCHES = 8
"""Batches share most of their rows, so that so many times as many as a pool has room for still tell eviction something new."""

LOOKAHEAD_BYTES = 256 << 20
"""What the batches of a window hold on a rank, unless its pipeline says otherwise."""


def useful_batches(held: float) -> int:
    """The window that a pool can use which has room for the distinct rows of ``held`` batches: 1 to 64."""
    return max(1, min(MOST_BATCHES, math.ceil(POOLS_OF_BATCHES * held)))


class _Smallest:
    """The smallest of two numbers each, of all ranks. On a GPU on a stream of its own, so that the host waits for all ranks to have begun
    their step, not for what it has launched since."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._work: Any = None
        on_gpu = device.type == "cuda"
        self._numbers = torch.zeros(2, dtype=torch.int64, pin_memory=on_gpu)
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._event = torch.cuda.Event() if on_gpu else None

    def begin(self, numbers: tuple[int, int], pg: Any) -> None:
        self._numbers[:] = torch.tensor(numbers)
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            there = self._numbers.to(self._device, non_blocking=True)
            self._work = dist.all_reduce(there, dist.ReduceOp.MIN, group=pg, async_op=True)
            if self._event is not None:
                self._work.wait()
                self._numbers.copy_(there, non_blocking=True)
                self._event.record()

    def end(self) -> list[int] | None:
        """None where it was not begun."""
        if self._work is None:
            return None
        if self._event is not None:
            self._event.synchronize()
        else:
            self._work.wait()
        self._work = None
        return [int(n) for n in self._numbers]


class Lookahead:
    """The window of one pipeline, in batches. ``asked`` None: what the pools can use."""

    def __init__(self, asked: int | None, limit_bytes: int) -> None:
        if asked is not None and not 0 <= asked <= MOST_BATCHES:
            raise ConfigurationError(f"lookahead must be 0 to {MOST_BATCHES} batches, or None for what the pools can use, got {asked}")
        if limit_bytes < 0:
            raise ConfigurationError(f"lookahead_bytes must be at least 0, got {limit_bytes}")
        self.asked, self.limit_bytes = asked, limit_bytes
        self.batches = 0
        self._agreeing: _Smallest | None = None
        self._held_bytes: Sequence[int] = ()
        self._warned = False

    def propose(self, held_bytes: Sequence[int], one_more: int, wish: int, pg: dist.ProcessGroup | None, device: torch.device) -> None:
        """Begin to agree on the next step's window. Called in every step, by all ranks of ``pg``.

        ``held_bytes``: of the batches in the window, the next one first. ``one_more``: of a batch to come, as far as can be known.
        ``wish``: the batches that this rank would have in the window.
        """
        self._held_bytes = [*held_bytes, one_more]
        room = self._room()
        if pg is None or pg.size() == 1:
            self._take(room, wish)
        else:
            if self._agreeing is None:
                self._agreeing = _Smallest(device)
            self._agreeing.begin((room, -wish), pg)

    def agree(self) -> None:
        """The window of this step: the end of what the step before has begun."""
        said = self._agreeing.end() if self._agreeing else None
        if said is not None:
            self._take(said[0], -said[1])

    def _room(self) -> int:
        return sum(taken <= self.limit_bytes for taken in itertools.accumulate(self._held_bytes))

    def _take(self, room: int, wish: int) -> None:
        """Room and wish of all ranks."""
        self.batches = min(room, wish)
        if self.batches == self._room() < min(wish, len(self._held_bytes)):
            self._say(self.batches, max(self._held_bytes))

    def _say(self, count: int, largest: int) -> None:
        if not self._warned:
            self._warned = True
            asked = "as many batches as the pools can use" if self.asked is None else f"{self.asked} batches"
            warnings.warn(
                f"lookahead: {count} batches instead of {asked}: those in the window have up to {largest:,} bytes each, and together "
                f"may have lookahead_bytes={self.limit_bytes:,}; the job trains the same bits, with more misses",
                RuntimeWarning,
                stacklevel=2,
            )
