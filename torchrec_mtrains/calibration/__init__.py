"""Measuring a machine: what ``mtrains calibrate`` writes into a ``HardwareProfile``. Each module measures one kind of thing."""

from .effort import FULL, QUICK, Effort

# RUN

__all__ = ["FULL", "QUICK", "Effort"]
