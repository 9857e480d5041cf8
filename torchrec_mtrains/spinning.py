"""How long torch's threads spin where they wait for each other.

Torch's wheels for Linux compute with libgomp, whose threads spin for about a millisecond before they sleep, and so take the processors
that the native threads below slot pools read and evict with. Where there are more threads than processors libgomp spins 1,000 times
instead, but it does not know of threads that it has not made (GCC manual, GOMP_SPINCOUNT). What that is worth: ``docs/train.md``.
"""

from __future__ import annotations

import os

SPINS = 1000
"""Libgomp's own number where threads outnumber processors."""


def spin_briefly() -> None:
    """Unless the environment says otherwise. To be called before torch is imported: libgomp reads it once, when it is loaded."""
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
