"""``TieredStorage``: TorchRec's ``Storage``, which has three fields in every operator, with PMem beside them.

A plain ``Storage`` has no PMem when it is added or compared. TorchRec's partitioner rebuilds capacities as plain ones, so that PMem is
not looked at there: ``tiered.fits_in(plain)`` goes by the other tiers, and ``plain - tiered`` stays plain. ``TieredPartitioner`` looks
afterwards.
"""

from __future__ import annotations

from typing import Any

from torchrec.distributed.planner.types import Storage

TIERS = ("hbm", "ddr", "ssd", "pmem")


class TieredStorage(Storage):
    """Bytes of a rank or a shard in every tier. Devices that the ranks of a host share are counted by each rank's part of them."""

    pmem: int

    def __init__(self, hbm: int = 0, ddr: int = 0, ssd: int = 0, pmem: int = 0) -> None:
        super().__init__(hbm=hbm, ddr=ddr, ssd=ssd)
        self.pmem = pmem

    def __repr__(self) -> str:
        return f"TieredStorage(hbm={self.hbm}, ddr={self.ddr}, ssd={self.ssd}, pmem={self.pmem})"

    def __add__(self, other: Storage) -> TieredStorage:
        return TieredStorage(*(getattr(self, tier) + bytes_in(other, tier) for tier in TIERS))

    __radd__ = __add__

    def __sub__(self, other: Storage) -> TieredStorage:
        return TieredStorage(*(getattr(self, tier) - bytes_in(other, tier) for tier in TIERS))

    def __rsub__(self, other: Storage) -> Storage:
        return Storage(hbm=other.hbm - self.hbm, ddr=other.ddr - self.ddr, ssd=other.ssd - self.ssd)

    def __hash__(self) -> int:
        return hash(_key(self))

    def __eq__(self, other: object) -> bool:
        return _key(self) == _key(other) if isinstance(other, Storage) else NotImplemented

    def __lt__(self, other: Storage) -> bool:
        return _key(self) < _key(other)

    def __le__(self, other: Storage) -> bool:
        return _key(self) <= _key(other)

    def __gt__(self, other: Storage) -> bool:
        return _key(self) > _key(other)

    def __ge__(self, other: Storage) -> bool:
        return _key(self) >= _key(other)

    def fits_in(self, other: Storage) -> bool:
        """Whether no tier has less room; of a plain ``Storage`` nobody knows how much PMem there is."""
        return super().fits_in(other) and (not isinstance(other, TieredStorage) or self.pmem <= other.pmem)


def bytes_in(storage: Storage, tier: str) -> int:
    """Of any storage, plain ones included."""
    return int(getattr(storage, tier, 0))


def _key(storage: Any) -> tuple[int, ...]:
    return tuple(bytes_in(storage, tier) for tier in TIERS)
