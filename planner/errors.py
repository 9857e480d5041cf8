"""Why there is no plan."""

from __future__ import annotations

from typing import Any

from torchrec.distributed.planner.types import PlannerError, PlannerErrorType

from ..errors import MTrainsError


class InsufficientStorageError(MTrainsError, PlannerError):
    """The tables do not fit: ``tier`` ("ddr" or "ssd") is ``short_bytes`` too small. Also one of TorchRec's ``PlannerError``."""

    def __init__(self, message: str, tier: str, short_bytes: int) -> None:
        PlannerError.__init__(self, message, PlannerErrorType.INSUFFICIENT_STORAGE)
        self.tier, self.short_bytes = tier, short_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.tier, self.short_bytes)
