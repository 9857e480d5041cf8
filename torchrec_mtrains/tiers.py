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
class DdrHome:
    """Host memory: every row of the table, uncompressed, behind the same protocol as the SSD."""


Home = SsdHome | DdrHome


@dataclass(frozen=True)
class TierChain:
    """The tiers of one table: a slot pool of ``pool_rows`` rows that trains, and exactly one home below it."""

    pool_rows: int
    tiers: tuple[Home, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiers", tuple(self.tiers))
        if self.pool_rows <= 0:
            raise ConfigurationError(f"TierChain: pool_rows must be positive, got {self.pool_rows}")
        homes = [t for t in self.tiers if isinstance(t, (SsdHome, DdrHome))]
        if len(homes) != 1 or len(self.tiers) != 1:
            raise ConfigurationError(f"TierChain: tiers must hold exactly one home (SsdHome or DdrHome), got {self.tiers!r}")

    @property
    def home(self) -> Home:
        """The last tier, which holds every row."""
        return self.tiers[-1]
