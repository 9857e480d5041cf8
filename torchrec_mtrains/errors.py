"""Every error this package raises on purpose. Each names what failed, the rule, what was got and what to do.

Operating errors (a full disk, a damaged record) and user errors (an id out of range) are typed here; programmer errors
inside the package are assertions.
"""

from __future__ import annotations


class MTrainsError(Exception):
    """Base of every error of this package."""


class ConfigurationError(MTrainsError, ValueError):
    """A plan, chain, option or model that cannot work as written."""


class UnsupportedError(MTrainsError, ValueError):
    """A TorchRec or FBGEMM feature that tiered tables do not have; refused by name, never run wrongly."""


class IdOutOfRangeError(MTrainsError, IndexError):
    """An embedding id is negative or not below its table's row count. Nothing was changed."""


class PoolTooSmallError(MTrainsError, RuntimeError):
    """The rows of one batch, with rows still pinned by pending backwards, exceed the slot pool. Nothing was changed."""


class TicketError(MTrainsError, RuntimeError):
    """A backward ran after its rows had been released (``retain_graph`` used twice, for example)."""


class RankFailedError(MTrainsError, RuntimeError):
    """Another rank failed, and this one cannot go on without it. The message names that rank and its error."""


class DataError(MTrainsError, ValueError):
    """Training data is missing or malformed; the message names the file, the line, the rule and what was found."""


class VolumeError(MTrainsError, RuntimeError):
    """Base of what a volume can report."""


class VolumeFullError(VolumeError):
    """``capacity_bytes`` is reached, or the file system has no space left."""


class VolumeLockedError(VolumeError):
    """Another process has the volume open for writing."""


class VolumeMismatchError(VolumeError):
    """What is on disk has another shape, another format version, or belongs to another volume."""


class DamagedRecordError(VolumeError):
    """A record, segment or manifest failed its checksum."""


class VolumeIoError(VolumeError, OSError):
    """The operating system refused or failed a read, a write, an fsync or a directory operation."""


class DeviceError(MTrainsError, RuntimeError):
    """The CUDA runtime refused a call: what is on the device is lost, and the process should begin anew from a checkpoint."""
