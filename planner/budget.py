"""How much a search may do: work, which is counted, so that a plan does not depend on what else the machine does; time as a last resort.

A unit is about what a millisecond of the reference box does: to try all places of a table costs a fixed part, and one by their number.
"""

from __future__ import annotations

import time

UNITS_PER_S = 1000.0
_UNITS_PER_TRY, _UNITS_PER_PLACE = 0.1, 0.00015  # 107, 136 and 170 µs were measured for 5, 52 and 425 places
_LAST_RESORT, _LEAST_S = 4.0, 2.0  # times the nominal time, and in any case: a process's first search loads its solver, too


class Budget:
    """Work for about ``seconds``. A ``part`` of it takes what it spends from the whole as well."""

    def __init__(self, seconds: float, whole: Budget | None = None) -> None:
        self._left, self._whole = seconds * UNITS_PER_S, whole
        self.deadline_s: float = whole.deadline_s if whole else time.perf_counter() + max(_LEAST_S, _LAST_RESORT * seconds)

    def part(self, share: float) -> Budget:
        """So much of what is left."""
        return Budget(share * self._left / UNITS_PER_S, self)

    def spend(self, places: int) -> None:
        """All of so many places of a table were tried."""
        units = _UNITS_PER_TRY + _UNITS_PER_PLACE * places
        self._left -= units
        if self._whole:
            self._whole._left -= units

    @property
    def time_left_s(self) -> float:
        """Until the last resort."""
        return max(0.0, self.deadline_s - time.perf_counter())

    @property
    def over(self) -> bool:
        """Whether to stop."""
        return self._left <= 0 or time.perf_counter() > self.deadline_s
