"""Measuring a machine: what ``mtrains calibrate`` writes into a ``HardwareProfile``. Each module measures one kind of thing."""

from .effort import FULL, QUICK, Effort
from .run import calibrate

__all__ = ["FULL", "QUICK", "Effort", "calibrate"]
