"""Staging a state dict for ``torch.distributed.checkpoint.async_save`` without the memory of the tables in it."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor
from torchrec.distributed.shards_wrapper import LocalShardsWrapper

from .errors import VolumeFullError, VolumeIoError
from .kernels.lazy_rows import LazyRows


class TieredStager(AsyncStager):
    """For ``async_save(…, async_stager=TieredStager(folder))``: what training changes afterwards is not in the checkpoint.

    Rows of tiered tables are copied to a file in ``folder``, which has no name and goes with the staged state dict; other tensors
    are copied in memory. ``folder`` needs room for the rows of this rank. TorchRec's default, which copies to memory, is refused by
    the rows.

    Raises, when staging: VolumeIoError when ``folder`` is missing or not writable; VolumeFullError when it has no room.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy whose tensors no longer change."""
        room = _Room(self._folder, sum(_aligned(rows.nbytes) for rows in _lazy_rows(state_dict)))
        staged: dict[str, Any] = _copy(state_dict, room)
        return staged

    def synchronize_staging(self) -> None:
        """Nothing to wait for: ``stage`` has copied everything."""

    def close(self) -> None:
        """Nothing to close: files go with the staged state dicts."""


class _Room:
    """One mapped file without a name, filled from its beginning."""

    def __init__(self, folder: Path, size: int) -> None:
        self._next = 0
        if size == 0:
            return
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                self._mapping = mmap.mmap(file.fileno(), size)
        except OSError as e:
            kind = VolumeFullError if e.errno == errno.ENOSPC else VolumeIoError
            raise kind(
                f"async_save: {size} bytes of rows cannot be staged in {str(folder)!r}: {e.strerror}; name a folder on a device with room"
            ) from e

    def copy(self, rows: LazyRows) -> Tensor:
        """The rows now, in the file."""
        if rows.numel() == 0:
            return torch.empty(rows.shape, dtype=rows.dtype)
        first, bytes_ = self._next, rows.nbytes
        copy = torch.frombuffer(self._mapping, dtype=rows.dtype, count=rows.numel(), offset=first).view(rows.shape)
        copy.copy_(rows)
        self._next += _aligned(bytes_)
        self._mapping.flush(first, _aligned(bytes_))
        self._mapping.madvise(mmap.MADV_DONTNEED, first, _aligned(bytes_))  # out of memory; the file has it
        return copy


def _aligned(count: int) -> int:
    return -(-count // mmap.PAGESIZE) * mmap.PAGESIZE


def _local_tensors(value: ShardedTensor | DTensor) -> list[Tensor]:
    if isinstance(value, ShardedTensor):
        return [s.tensor for s in value.local_shards()]
    local = value.to_local()
    return local.local_shards() if isinstance(local, LocalShardsWrapper) else [local]


def _lazy_rows(value: Any) -> list[LazyRows]:
    if isinstance(value, LazyRows):
        return [value]
    if isinstance(value, dict):
        return [rows for v in value.values() for rows in _lazy_rows(v)]
    if isinstance(value, list | tuple):
        return [rows for v in value for rows in _lazy_rows(v)]
    if isinstance(value, ShardedTensor | DTensor):
        return [rows for t in _local_tensors(value) for rows in _lazy_rows(t)]
    return []


def _copy(value: Any, room: _Room) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v, room) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(v, room) for v in value)
    if isinstance(value, ShardedTensor):
        shards = [Shard(_copy(s.tensor, room), s.metadata) for s in value.local_shards()]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            local_shards=shards, sharded_tensor_metadata=value.metadata(), process_group=value._process_group
        )
    if isinstance(value, DTensor):
        local: Any = value.to_local()
        if isinstance(local, LocalShardsWrapper):
            shards = [_copy(t, room) for t in local.local_shards()]
            copied: Any = LocalShardsWrapper(shards, [tuple(o) for o in local.local_offsets()] if shards else [])
        else:
            copied = _copy(local, room)
        return DTensor.from_local(copied, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride())
    if isinstance(value, LazyRows):
        return room.copy(value)
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
