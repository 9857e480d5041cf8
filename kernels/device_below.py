"""``Below``: rows between the host places of a group and the volumes below them.

Rows are read in *pieces*: a piece's host places are made free, by evicting what is there, and its reads begin, while the host evicts
for the next. Where evicting fails, the volume being full, the pieces before have come, and stay in their host places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import errors
from . import _core
from .device_directory import HOST, DeviceDirectory, Misses
from .device_planes import native_part
from .device_streams import Streams

MOVE_ROWS = 65536
"""Rows that are copied to or from host memory at a time; a guess."""

PIECE_ROWS = 8192
"""Rows of a table that are evicted, and then read, at a time: the disk reads a piece while the host evicts the next. A guess."""


@dataclass
class DeviceTable:
    """One table of the group, as its pool sees it."""

    name: str
    volume: Any  # native, below the host places
    id: int
    rows: int
    pool_rows: int
    host_places: int
    upper: list[Tensor]  # the record's parts in slots, (pool_rows, …) each, in the record's order
    lower: list[Tensor]  # and in host places, on the CPU
    has_all: bool  # as many host places as rows, which are all there from the beginning


@dataclass
class Read:
    """Some rows of a table on their way from below into host places."""

    volume: Any
    token: int
    misses: slice  # of those from below

    def wait(self) -> None:
        """Raises: what it failed with."""
        self.volume.wait(self.token)


class Below:
    """The volumes of ``tables``, whose rows ``directory`` knows."""

    def __init__(self, tables: Sequence[DeviceTable], directory: DeviceDirectory, streams: Streams) -> None:
        self._tables, self._directory, self._streams = tables, directory, streams
        self.evictions, self.write_backs = [0] * len(tables), [0] * len(tables)
        """By table: rows that left host places since creation, and those of them that were changed."""

    def fill_host_places(self, table: int) -> None:
        """With all rows of a table, which has a host place for each."""
        of = self._tables[table]
        parts = [native_part(p) for p in of.lower]
        for first in range(0, of.rows, MOVE_ROWS):
            rows = np.arange(first, min(first + MOVE_ROWS, of.rows))
            of.volume.wait(_core.submit_gets(of.volume, [_core.GetRequest(of.id, rows, rows.astype(np.int32), parts, False)]))
        self._directory.fill(table)

    def read(self, misses: Misses, which: Tensor, hosts: Tensor, counts: list[int], seq: int, dirty: bool) -> list[Read]:
        """Evicts what is in ``hosts`` into the volumes, and starts reading ``which`` of the missed rows into them. ``counts``: by table.

        Raises: what evicting or reading failed with; what came before that is in host places, and misses say so.
        """
        directory, table = self._directory, misses.table.index_select(0, which)
        rows = misses.row.index_select(0, which) - directory._first_row.index_select(0, table)
        columns = [rows, hosts, directory.row_of_place.index_select(0, hosts).long(), directory.stamp.index_select(0, hosts)]
        rows_, hosts_, leaving, stamps = torch.stack(columns).cpu().numpy()
        self._streams.finish_moves()  # out of these places, and into them
        reads: list[Read] = []
        try:
            for t, mine in _pieces(counts):
                of, places = self._tables[t], (hosts_[mine] - directory.first_place[HOST][t]).astype(np.int32)
                parts = [native_part(p) for p in of.lower]
                self._evict(t, leaving[mine], places, stamps[mine], parts)
                request = _core.GetRequest(of.id, np.ascontiguousarray(rows_[mine]), places, parts, dirty)
                reads.append(Read(of.volume, _core.submit_gets(of.volume, [request]), mine))
        except BaseException:
            for read in reads:
                mine = read.misses
                directory.give_up(hosts[mine], table[mine])
                with suppress(errors.MTrainsError):  # rows that could not be read are below
                    read.wait()
                    directory.arrive(misses, which[mine], hosts[mine], seq, dirty)
            raise
        directory.give_up(hosts, table)
        return reads

    def _evict(self, table: int, rows: Any, places: Any, stamps: Any, parts: list[Any]) -> None:
        """Of the places those that hold a row. Shapes: (n,), numpy."""
        of = self._tables[table]
        for is_dirty in (False, True):
            goes = (rows >= 0) & ((stamps & 1) == is_dirty)
            if goes.any():
                _core.evict_rows(of.volume, of.id, rows[goes], places[goes], parts, is_dirty)
                self.evictions[table] += int(goes.sum())
                self.write_backs[table] += int(goes.sum()) * is_dirty


def _pieces(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Of so many rows a table, in the order of tables: (table, which of all)."""
    start = 0
    for table, count in enumerate(counts):
        for first in range(start, start + count, PIECE_ROWS):
            yield table, slice(first, min(first + PIECE_ROWS, start + count))
        start += count
