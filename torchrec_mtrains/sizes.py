"""Byte counts as people write them."""

from __future__ import annotations

import re

from .errors import ConfigurationError

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}iB": 1 << (10 * i) for i, p in enumerate("KMGT", start=1)}
_UNITS |= {f"{p}B": 1000**i for i, p in enumerate("KMGT", start=1)}
_FOLDED = {unit.lower(): factor for unit, factor in _UNITS.items()}


def parse_bytes(text: str) -> int:
    """``"64MiB"`` → 67,108,864; ``KiB`` to ``TiB`` are powers of 1024, ``KB`` to ``TB`` of 1000.

    Raises: ConfigurationError for anything else, or less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    factor = _FOLDED.get(match[2].lower()) if match else None
    count = int(float(match[1]) * factor) if match and factor else 0
    if count < 1:
        raise ConfigurationError(f"a number of bytes looks like 64MiB, 1.5GB or 4096, got {text!r}")
    return count


def show_bytes(count: float) -> str:
    """3 significant digits in binary units: ``"64.0 MiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}" if abs(count) < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
