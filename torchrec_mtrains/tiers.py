"""The vocabulary of a tier chain: where the rows of one table live, from the slot pool down to their home."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigurationError


def _paths(what: str, paths: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(paths, str) or not paths or not all(isinstance(p, str) and p for p in paths):
        raise ConfigurationError(f'{what}: paths must be a non-empty tuple of folder names, got {paths!r}; write ("/mnt/nvme0",)')
    return tuple(paths)


@dataclass(frozen=True)
class SsdHome:
    """A log-structured volume on NVMe, striped over ``paths``; it holds every row of the tables that name it.

    Tables whose homes name the same paths share one volume per rank, in a folder ``rank_<r>`` below each path.
    ``capacity_bytes`` caps everything that the volume keeps on disk, per rank.
    """

    paths: tuple[str, ...]
    capacity_bytes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", _paths("SsdHome", self.paths))
        if self.capacity_bytes <= 0:
            raise ConfigurationError(f"SsdHome: capacity_bytes must be positive, got {self.capacity_bytes}")


@dataclass(frozen=True)
class PmemHome:
    """The same log on a byte-addressable device (PMem, CXL, tmpfs), mapped: single records are loaded and stored.

    ``paths`` are folders on such mounts. Sharing and ``capacity_bytes`` are as for ``SsdHome``.
    """

    paths: tuple[str, ...]
    capacity_bytes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", _paths("PmemHome", self.paths))
        if self.capacity_bytes <= 0:
            raise ConfigurationError(f"PmemHome: capacity_bytes must be positive, got {self.capacity_bytes}")


@dataclass(frozen=True)
class DdrHome:
    """Host memory: every row of the table, uncompressed, behind the same protocol as the SSD."""


def _rows(what: str, rows: int) -> None:
    if rows <= 0:
        raise ConfigurationError(f"{what}: rows must be positive, got {rows}")


@dataclass(frozen=True)
class DdrCache:
    """Room for ``rows`` whole records of the table in host memory, per rank; a table with fewer rows takes only those.

    Volatile and exclusive: a row enters when it leaves the tier above. Memory is taken as rows come.
    """

    rows: int

    def __post_init__(self) -> None:
        _rows("DdrCache", self.rows)


@dataclass(frozen=True)
class PmemCache:
    """The same in a mapped file in the folder ``path`` of a byte-addressable device (PMem, CXL, tmpfs).

    The file has no name, so that nothing is left of it however the process ends. Its space is taken at once.
    """

    path: str
    rows: int

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ConfigurationError(f'PmemCache: path must be a folder name such as "/mnt/pmem0", got {self.path!r}')
        _rows("PmemCache", self.rows)


Cache = DdrCache | PmemCache
Home = SsdHome | PmemHome | DdrHome


@dataclass(frozen=True)
class TierChain:
    """The tiers of one table: a slot pool of ``pool_rows`` rows that trains, any number of caches, and one home below them."""

    pool_rows: int
    tiers: tuple[Cache | Home, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiers", tuple(self.tiers))
        if self.pool_rows <= 0:
            raise ConfigurationError(f"TierChain: pool_rows must be positive, got {self.pool_rows}")
        if (
            not self.tiers
            or not isinstance(self.tiers[-1], (SsdHome, PmemHome, DdrHome))
            or not all(isinstance(t, (DdrCache, PmemCache)) for t in self.tiers[:-1])
        ):
            raise ConfigurationError(
                "TierChain: tiers must be any number of caches (DdrCache, PmemCache), the fastest first, then exactly one home "
                f"(SsdHome, PmemHome or DdrHome), got {self.tiers!r}"
            )

    @property
    def caches(self) -> tuple[Cache, ...]:
        """The tiers between the pool and the home, the fastest first."""
        return tuple(t for t in self.tiers if isinstance(t, (DdrCache, PmemCache)))

    @property
    def home(self) -> Home:
        """The last tier, which holds every row."""
        home = self.tiers[-1]
        assert isinstance(home, (SsdHome, PmemHome, DdrHome))
        return home
