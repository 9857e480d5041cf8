"""Volumes: stores of fixed-size records, addressed by (table, row). One protocol, several media.

``SsdVolume`` is a log on NVMe; ``MemoryVolume`` keeps every record in host memory and is the reference for the rest.
Slot pools talk to the native half directly; this module is for whoever wants a volume of their own.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Protocol

import numpy as np
import torch
from typing_extensions import Self

from .. import errors
from . import _core
from .deferred_init import UniformInit, column_ranges

Array = np.ndarray | torch.Tensor


class VolumeTable:
    """One table of a volume."""

    def __init__(self, volume: Volume, table_id: int, name: str, row_count: int, record_bytes: int) -> None:
        self.volume, self.name, self.row_count, self.record_bytes = volume, name, row_count, record_bytes
        self._id = table_id

    def get(self, ids: Array, out: Array) -> None:
        """Reads records. A row that was never put has its initial value.

        Shapes: ``ids`` (n,) int64; ``out`` (n, record_bytes) uint8, contiguous; torch or numpy.
        Raises: IdOutOfRangeError, DamagedRecordError, VolumeIoError, ConfigurationError for other shapes.
        """
        self._check(ids, out)
        self.volume._native.get(self._id, ids, out)

    def put(self, ids: Array, records: Array) -> None:
        """Writes records; of an id given twice the last one counts.

        Shapes: ``ids`` (n,) int64; ``records`` (n, record_bytes) uint8, contiguous; torch or numpy.
        Raises: IdOutOfRangeError, VolumeFullError, VolumeIoError, ConfigurationError for other shapes.
        """
        self._check(ids, records)
        self.volume._native.put(self._id, ids, records)

    def grow(self, row_count: int) -> None:
        """Makes the table longer; new rows have their initial values.

        Raises: ConfigurationError for fewer rows than there are; UnsupportedError for a volume whose tables have one size.
        """
        if not isinstance(self.volume, _LogVolume):
            raise errors.UnsupportedError(f"tables of {type(self.volume).__name__} cannot grow; make a new one")
        self.volume._native.grow(self._id, row_count)
        self.row_count = row_count

    def _check(self, ids: Array, records: Array) -> None:
        for what, array, dtype, shape in (
            ("ids", ids, "int64", (len(ids),)),
            ("records", records, "uint8", (len(ids), self.record_bytes)),
        ):
            contiguous = array.is_contiguous() if isinstance(array, torch.Tensor) else array.flags.c_contiguous
            if str(array.dtype).removeprefix("torch.") != dtype or tuple(array.shape) != shape or not contiguous:
                raise errors.ConfigurationError(
                    f"table {self.name!r}: {what} must be a contiguous {dtype} array of shape {shape}, got "
                    f"{array.dtype} {tuple(array.shape)}{'' if contiguous else ', not contiguous'}"
                )


class Volume(Protocol):
    """What every volume can do."""

    _native: Any

    def table(self, name: str, *, row_count: int, record_bytes: int, init: UniformInit | None = None) -> VolumeTable:
        """Opens or creates a table; ``init`` None: rows never put read as zeros.

        Raises: VolumeMismatchError when the volume holds a table of that name with another shape.
        """

    def flush(self) -> None:
        """Hands everything put so far to the device."""

    def checkpoint(self, epoch: int) -> None:
        """Makes everything put so far durable, under a number above the last one's."""

    def restore(self, epoch: int) -> None:
        """Goes back to a kept epoch; what came after it is forgotten."""

    def stats(self) -> dict[str, Any]:
        """Counters since the volume was opened; units are in the names."""

    @property
    def epochs(self) -> list[int]:
        """The checkpoints that are kept, oldest first."""

    @property
    def id(self) -> str:
        """A name that no other volume has."""

    def close(self) -> None:
        """Lets go of the volume. What was not checkpointed is lost."""


def native_initializer(name: str, record_bytes: int, init: UniformInit | None) -> Any:
    """The initial values of a table as the native core takes them."""
    initializer = _core.Initializer()
    if init is not None:
        initializer.zero = False
        initializer.seed, initializer.low, initializer.high = init.seed, init.low, init.high
        initializer.first_row, initializer.type = init.first_row, getattr(_core.WeightType, init.weight_type)
        ranges = column_ranges(init.columns)
        initializer.columns = [_core.ColumnRange(r.start, len(r)) for r in ranges]
        count = sum(len(r) for r in ranges)
        if count * (4 if init.weight_type == "float32" else 2) > record_bytes:
            raise errors.ConfigurationError(
                f"table {name!r}: {count} initial {init.weight_type} values do not fit records of {record_bytes} bytes"
            )
    return initializer


class _NativeVolume:
    """The protocol on a native volume."""

    _native: Any

    def table(self, name: str, *, row_count: int, record_bytes: int, init: UniformInit | None = None) -> VolumeTable:
        """Opens or creates a table; see ``Volume.table``."""
        native = self._native.table(name, row_count, record_bytes, native_initializer(name, record_bytes, init))
        return VolumeTable(self, native, name, row_count, record_bytes)

    def flush(self) -> None:
        """Hands everything put so far to the device."""
        self._native.flush()

    def checkpoint(self, epoch: int) -> None:
        """Makes everything put so far durable, under a number above the last one's."""
        self._native.checkpoint(epoch)

    def restore(self, epoch: int) -> None:
        """Goes back to a kept epoch; what came after it is forgotten."""
        self._native.restore(epoch)

    @property
    def epochs(self) -> list[int]:
        """The checkpoints that are kept, oldest first."""
        return self._native.epochs()

    @property
    def epoch(self) -> int | None:
        """The last committed checkpoint."""
        return self.epochs[-1] if self.epochs else None

    @property
    def backend(self) -> str:
        """``"memory"``, ``"io_uring"`` or ``"pread"``."""
        return self._native.backend()

    @property
    def id(self) -> str:
        """A name that no other volume has."""
        return self._native.id()

    def stats(self) -> dict[str, Any]:
        """Counters since the volume was opened; units are in the names."""
        return self._native.stats()

    def close(self) -> None:
        """Lets go of the volume. What was not checkpointed is lost."""
        self._native.close()


class MemoryVolume(_NativeVolume):
    """Every record in host memory; nothing outlives the process."""

    def __init__(self) -> None:
        self._native = _core.MemoryVolume()


class _LogVolume(_NativeVolume):
    """The log on either medium."""

    _mapped: bool

    def __init__(
        self,
        paths: tuple[str, ...],
        capacity_bytes: int,
        *,
        keep_checkpoints: int = 2,
        backend: str | None = None,
        depth: int = 256,
        snapshot_after_bytes: int = 8 << 30,
        system: Any = None,
        _read_only: bool = False,
        _epoch: int | None = None,
    ) -> None:
        if isinstance(paths, str) or not paths:
            raise errors.ConfigurationError(
                f'{type(self).__name__}: paths must be a non-empty tuple of folder names, got {paths!r}; write ("/mnt/nvme0",)'
            )
        self._native = _core.LogVolume(
            [str(p) for p in paths],
            capacity_bytes,
            keep_checkpoints,
            backend or "",
            depth,
            self._mapped,
            _read_only,
            _epoch,
            snapshot_after_bytes,
            system,
        )
        self.paths, self.capacity_bytes = tuple(paths), capacity_bytes
        if reason := self._native.fallback_reason():
            _say_once(f"SSD volumes read through pread threads, slower than io_uring: {reason}")
        if self.backend == "io_uring" and (reason := self._native.unregistered_reason()):
            _say_once(f"SSD volumes read without registered buffers, at about a fifth more CPU a read: {reason}")
        if not self._native.direct() and system is None:
            _say_once(f"the file system of {self.paths} has no O_DIRECT: reads go through the page cache")

    @classmethod
    def open_read_only(cls, paths: tuple[str, ...], *, epoch: int | None = None, backend: str | None = None, depth: int = 256) -> Self:
        """Opens the state of a committed epoch (None: the newest) for reading, beside its writer and any number of readers.

        What the writer does later is not seen. A writer that goes back to an epoch before this one may damage what is read;
        that is noticed, record by record.
        Raises: VolumeMismatchError when there is no such epoch.
        """
        return cls(paths, 0, backend=backend, depth=depth, _read_only=True, _epoch=epoch)

    def withdraw(self, epoch: int) -> None:
        """Takes back the newest epoch, which the rest of the job did not commit; rows stay as they are."""
        self._native.withdraw(epoch)

    @property
    def wants_checkpoint(self) -> bool:
        """Whether room is short and checkpoints hold some back: the training loop then commits one at its next step boundary."""
        return self._native.wants_checkpoint()


class SsdVolume(_LogVolume):
    """A log-structured store on NVMe: one engine, one writer, striped over ``paths``.

    ``paths`` are existing folders; ``capacity_bytes`` caps everything that the volume keeps in them. An existing volume opens
    at its last committed checkpoint. ``keep_checkpoints`` of them are kept.
    ``backend`` None takes io_uring where the kernel permits it and a pool of ``pread`` threads elsewhere; ``depth`` I/Os are in flight
    at most. The index is written beside the log when replaying would read more than ``snapshot_after_bytes``.

    Raises: VolumeIoError for a path that is missing or not writable, VolumeLockedError while another process has it open,
    VolumeMismatchError for a volume of another format or other paths, VolumeFullError when even a first segment does not fit,
    DamagedRecordError for a damaged manifest or log.
    """

    _mapped = False


class PmemVolume(_LogVolume):
    """The same log in mapped files, on persistent memory (DAX), CXL memory or tmpfs: records are loaded and stored, without I/O.

    Arguments and errors are those of ``SsdVolume``; ``backend`` and ``depth`` do nothing.
    """

    _mapped = True


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
