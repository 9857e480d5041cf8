"""Caches between slot pools and a volume. See cached_volume.h for a row's life in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..tiers import Cache, PmemCache
from . import _core
from .deferred_init import UniformInit
from .volumes import Volume, VolumeTable, _NativeVolume, native_initializer

BATCH_LIMIT = (1 << 31) - 2
"""Insertions are numbered in 31 bits; beyond, they are renumbered."""


class CachedVolume(_NativeVolume):
    """A volume whose tables may have caches in front of ``below``, their home. Reads come from the first that has the row.

    ``put`` goes to the home; what is evicted from above enters the first cache. Closing it empties the caches and leaves
    ``below`` open.
    """

    def __init__(self, below: Volume, batch_limit: int = BATCH_LIMIT, system: Any = None) -> None:
        self.below, self._system = below, system
        self._native = _core.CachedVolume(below._native, batch_limit)

    def cached_table(
        self, name: str, *, row_count: int, record_bytes: int, init: UniformInit | None = None, caches: Sequence[Cache] = ()
    ) -> VolumeTable:
        """A table of the volume below, with caches of its own, the fastest first.

        Raises: VolumeIoError, VolumeFullError for a ``PmemCache`` whose folder is missing, not writable or too small;
        ConfigurationError for a table that is open already.
        """
        native = [_core.CacheSpec(c.rows, c.path if isinstance(c, PmemCache) else "", self._system) for c in caches]
        initializer = native_initializer(name, record_bytes, init)
        table = self._native.cached_table(name, row_count, record_bytes, initializer, native)
        return VolumeTable(self, table, name, row_count, record_bytes)

    def cache_stats(self, table: VolumeTable) -> list[dict[str, Any]]:
        """One dict a cache, the fastest first: rows and bytes since creation."""
        return self._native.cache_stats(table._id)

    def forget(self) -> None:
        """Empties every cache, unwritten."""
        self._native.forget()
