"""Misses of slot pools and LRUs under a law by which every row is used in every batch with a probability of its own: mean-field
equations, no simulation, so that plans need no native core:

    LRU   a row is there if it was used in the last T batches; T such that the expected rows in the pool are its size (Che's
          approximation)
    ours  by learned rates (kernels/csrc/reuse_rates.h), with a window of announced batches. What class a row is in is a Markov chain of
          its paces, use by use. A class's rate at an age is that of its rows that have waited so long. For each rate there is an age at
          which a class has it; were that the rate below which rows leave, so many rows would be there, and so many missed. Of
          these pairs a pool has the one of its size. If awaited rows alone do not fit, those used last go first, as if the window were
          shorter.

``tests/test_assumed_access.py`` holds both against the simulated policies.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_PACES = 56  # quarter octaves of batches, of rows used at least twice
_CLASS = 4  # paces
_AGES = np.unique(np.maximum(1, np.rint(2.0 ** (np.arange(0, 4 * 44) / 4))))
_THRESHOLDS = 96  # of rates, and half as many of windows
_RAREST, _USES = 1e-6, 160  # of the law's probabilities those for which chains are solved; rarer rows are all in the slowest class
_LOWEST = -700.0  # exponents


def lru_misses(counts: np.ndarray, use: np.ndarray, pools: np.ndarray) -> np.ndarray:
    """Misses a batch.

    Shapes: counts, use (groups,): rows that are alike, and the probability of each in a batch; pools (pools,) → (pools,).
    """
    low, high = np.full(len(pools), -20.0), np.full(len(pools), 60.0)
    stays = np.log1p(-use)[:, None]
    for _ in range(60):
        middle = (low + high) / 2
        resident = (counts[:, None] * -np.expm1(stays * np.exp(middle))).sum(0)
        low, high = np.where(resident < pools, middle, low), np.where(resident < pools, high, middle)
    return (counts[:, None] * use[:, None] * np.exp(stays * np.exp(low))).sum(0)


def our_misses(counts: np.ndarray, use: np.ndarray, pools: np.ndarray, lookahead: int) -> np.ndarray:
    """As ``lru_misses``, with ``lookahead`` announced batches: the one that is looked up is the first of them."""
    none, window = np.log1p(-use), max(lookahead - 1, 0)
    coming = (counts * use)[:, None] * _share_of_classes(use)

    def unused(batches: np.ndarray) -> np.ndarray:
        return np.exp(np.maximum(batches * none, _LOWEST))

    stays = _stays(coming, use, none)[:, :, None]
    away = unused(stays + window)
    misses = (away * coming.T).sum((1, 2))
    there = (((1 - away) / use - window * away) * coming.T).sum((1, 2))
    if window:  # shorter ones, of pools that awaited rows alone fill
        shorter = np.geomspace(1e-3, window, _THRESHOLDS // 2)[:-1, None]
        away = unused(1 + shorter)
        misses = np.concatenate([(away * counts * use).sum(1), misses])
        there = np.concatenate([(((1 - away) / use - shorter * away) * counts * use).sum(1), there])
    return np.interp(pools, np.maximum.accumulate(there), misses)


def _stays(coming: np.ndarray, use: np.ndarray, none: np.ndarray) -> np.ndarray:
    """The age at which rows of a class leave, of a falling series of rates.

    Shapes: coming (groups, classes): uses a batch → (rates, classes).
    """
    ages = np.exp(np.maximum(np.outer(none, [_AGES - 1, 2 * _AGES - 1]), _LOWEST)).reshape(len(use), 2, -1)
    reused = ages[:, 0] - ages[:, 1]  # in the octave from an age on
    waited = coming.T @ (reused / use[:, None])
    rates = np.minimum.accumulate(np.where(waited > 0, coming.T @ reused / np.maximum(waited, 1e-300), np.inf), 1)
    rates = np.log(np.clip(rates, 1e-13, 1))
    thresholds = np.linspace(rates.max() + 1e-3, rates.min(), _THRESHOLDS)
    longest = np.log(_AGES)
    return np.exp(np.stack([np.interp(-thresholds, -of_class, longest, left=0.0) for of_class in rates], 1))


def _share_of_classes(use: np.ndarray) -> np.ndarray:
    """Of each row's uses those after which it is in a class. Shapes: use (groups,) → (groups, classes)."""
    log_use, shares = _chains()
    return np.stack([np.interp(np.log(use), log_use, of_class) for of_class in shares.T], 1)


@lru_cache
def _chains() -> tuple[np.ndarray, np.ndarray]:
    """The stationary classes of rows used with a probability in each batch. Shapes: logarithms of those (uses,), shares (uses, classes)."""
    use, pace = np.geomspace(_RAREST, 1 - 1e-9, _USES), np.arange(_PACES)
    first = np.ceil(2.0 ** (pace // 4) * (1 + pace % 4 / 4))  # batches of a quarter octave
    longer = np.exp(np.outer(np.log1p(-use), first - 1))
    interval = longer - np.concatenate([longer[:, 1:], np.zeros((_USES, 1))], 1)
    after = pace[:, None] + ((3 * (pace - pace[:, None]) + 4) >> 3)
    chain = np.zeros((_USES, _PACES, _PACES))
    for seen in pace:
        chain[:, pace, after[:, seen]] += interval[:, seen, None]
    for _ in range(7):  # 128 uses: whatever the first pace was
        chain = chain @ chain
    return np.log(use), np.add.reduceat(chain[:, 0], np.arange(0, _PACES, _CLASS), axis=1)
