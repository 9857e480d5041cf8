"""What of each rank's memory is kept from the tables."""

from __future__ import annotations

from typing import Any

from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import Topology

from ..errors import ConfigurationError


class DdrStorageReservation(FixedPercentageStorageReservation):
    """Keeps ``ddr_bytes`` of every rank's DDR budget for the dense model, its optimizer, activations and the rest of the process.

    Raises: ConfigurationError when that leaves nothing.
    """

    def __init__(self, ddr_bytes: int = 0) -> None:
        if ddr_bytes < 0:
            raise ConfigurationError(f"DdrStorageReservation: ddr_bytes must not be negative, got {ddr_bytes}")
        super().__init__(percentage=0.0)
        self._ddr_bytes = ddr_bytes

    def reserve(self, topology: Topology, *args: Any, **kwargs: Any) -> Topology:
        """A copy of the topology with less DDR on every rank."""
        reserved = super().reserve(topology, *args, **kwargs)
        for device in reserved.devices:
            if device.storage.ddr <= self._ddr_bytes:
                raise ConfigurationError(
                    f"of a DDR budget of {device.storage.ddr:,} bytes a rank, {self._ddr_bytes:,} are reserved for what is no table "
                    "(batches, a volume's buffers): nothing is left for tables. Raise ddr_budget_bytes (--ddr-budget), take smaller "
                    "batches, or reserve less"
                )
            device.storage.ddr -= self._ddr_bytes
        self._last_reserved_topology = reserved
        return reserved
