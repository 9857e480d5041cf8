"""The data path: slot pools on the stock TBE, the slot directory, and the volumes below them."""

from .. import errors as _errors  # noqa: F401  (relative: a top-level `import kernels` fails at once)
from .volumes import MemoryVolume, PmemVolume, SsdVolume, VolumeTable

__all__ = ["MemoryVolume", "PmemVolume", "SsdVolume", "VolumeTable"]
