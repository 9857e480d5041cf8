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
from typing import Any

import torch
import torch.distributed as dist

from .errors import ConfigurationError

MOST_BATCHES = 64
"""As many as a slot pool keeps in mind: one bit a batch in the window of a row."""

POOLS_OF_BATCHES = 8
"""Batches share most of their rows, so that so many times as many as a pool has room for still tell eviction something new."""


def useful_batches(held: float) -> int:
    """The window that a pool can use which has room for the distinct rows of ``held`` batches: 1 to 64."""
    return max(1, min(MOST_BATCHES, math.ceil(POOLS_OF_BATCHES * held)))


class Lookahead:
    """The window of one pipeline, in batches. ``asked`` None: what the pools can use."""

    def __init__(self, asked: int | None, limit_bytes: int) -> None:
        if asked is not None and not 0 <= asked <= MOST_BATCHES:
            raise ConfigurationError(f"lookahead must be 0 to {MOST_BATCHES} batches, or None for what the pools can use, got {asked}")
        if limit_bytes < 0:
            raise ConfigurationError(f"lookahead_bytes must be at least 0, got {limit_bytes}")
        self.asked, self.limit_bytes = asked, limit_bytes
        self.batches = 0
        self._agreeing: tuple[torch.Tensor, Any] | None = None
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
            smallest = torch.tensor([room, -wish], device=device)
            self._agreeing = smallest, dist.all_reduce(smallest, dist.ReduceOp.MIN, group=pg, async_op=True)

    def agree(self) -> None:
        """The window of this step: the end of what the step before has begun."""
        if self._agreeing is not None:
            smallest, work = self._agreeing
            work.wait()
            room, less_wish = smallest.tolist()
            self._take(room, -less_wish)
            self._agreeing = None

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
