"""A seeded permutation of ``range(n)`` computed on the fly: ids that are hot together land far apart in the table.

A generalised Feistel network over a grid of ``a × b >= n`` cells: a row is (high, low) with ``low < b``, and each round
adds a hash of one half to the other, modulo that half's range. Every round is a bijection of the grid. The few cells at
and above ``n`` (fewer than ``2 × sqrt(n)``) walk on through the permutation until they come back below it, which keeps
the whole a bijection of ``range(n)``.
"""

from __future__ import annotations

import math

import numpy as np

_U32 = np.uint64(32)
_MIX_SHIFT = np.uint64(29)
# Odd 64-bit constants of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def hash32(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """32 well-mixed bits, in uint64, of each element of ``x`` (uint64)."""
    h = x + key
    h *= _MIX_1
    h ^= h >> _MIX_SHIFT
    h *= _MIX_2
    h >>= _U32
    return h


def stream_key(*words: int) -> np.uint64:
    """One 64-bit key from small integers (seed, table number, purpose)."""
    return np.uint64(np.random.SeedSequence(list(words)).generate_state(1, np.uint64)[0])


class Scatter:
    """A permutation of ``range(n)``, keyed by ``words``; calling it maps an array of ids to rows.

    Shapes: positions (m,) int64 in ``[0, n)`` → (m,) int64 in ``[0, n)``.
    """

    ROUNDS = 4

    def __init__(self, n: int, *words: int) -> None:
        if n <= 0:
            raise ValueError(f"Scatter: n must be positive, got {n}")
        self.n = n
        low = max(1, math.isqrt(n - 1) + 1 if n > 1 else 1)
        self._low = np.uint64(low)
        self._high = np.uint64(-(-n // low))
        self._keys = [stream_key(*words, r) for r in range(self.ROUNDS)]

    def _permute(self, x: np.ndarray) -> np.ndarray:
        high = x // self._low
        low = x - high * self._low
        for r, key in enumerate(self._keys):
            moved, fixed, size = (low, high, self._low) if r % 2 == 0 else (high, low, self._high)
            h = hash32(fixed, key)
            h *= size
            h >>= _U32
            moved += h
            np.minimum(moved, moved - size, out=moved)  # moved - size wraps to a huge value where moved < size
        high *= self._low
        high += low
        return high

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        rows = self._permute(positions.astype(np.uint64))
        n = np.uint64(self.n)
        outside = np.flatnonzero(rows >= n)
        while outside.size:
            rows[outside] = self._permute(rows[outside])
            outside = outside[rows[outside] >= n]
        return rows.view(np.int64)
