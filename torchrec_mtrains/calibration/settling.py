"""Whether a device has come to a rate of its own: one that is busy with what was written before, or gives credit after idling, has not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

SETTLED = 1.1
"""Times by which probes of a device that has settled differ at most."""

AT_ONCE, MOST_PROBES = 3, 40
"""So many probes in a row have to agree; after ``MOST_PROBES`` the device is taken as it is."""


def has_settled(seen: Sequence[float]) -> bool:
    """Whether the last probes agree."""
    return max(seen[-AT_ONCE:]) <= SETTLED * min(seen[-AT_ONCE:])


def until_settled(probe: Callable[[int], float], most: int = MOST_PROBES) -> list[float]:
    """What each probe said, by its number."""
    seen = [probe(number) for number in range(AT_ONCE)]
    while not has_settled(seen) and len(seen) < most:
        seen.append(probe(len(seen)))
    return seen
