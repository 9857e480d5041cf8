"""What the machine has, as the planner sees it: TorchRec's ``Topology`` with a DDR budget and an SSD for each rank."""

from __future__ import annotations

import inspect
from typing import Any

from torchrec.distributed.planner.types import Topology

from ..errors import ConfigurationError, UnsupportedError
from ..tiers import SsdHome


class TieredTopology(Topology):
    """``world_size`` ranks, each with ``ddr_budget_bytes`` of memory for its embedding tables and an ``ssd`` for what exceeds it.

    ``ssd.capacity_bytes`` is per rank, as everywhere. Without ``ssd`` no table is tiered. ``topology_kwargs`` are TorchRec's
    (bandwidths in bytes/ms, ``pod_size``, ...).

    Raises: UnsupportedError for a compute device other than the CPU; ConfigurationError for a budget that is not positive.
    """

    def __init__(
        self,
        world_size: int,
        compute_device: str = "cpu",
        *,
        ddr_budget_bytes: int,
        ssd: SsdHome | None = None,
        local_world_size: int | None = None,
        **topology_kwargs: Any,
    ) -> None:
        if compute_device != "cpu":
            raise UnsupportedError(f"TieredTopology plans for compute_device 'cpu' only, got {compute_device!r}")
        if ddr_budget_bytes <= 0:
            raise ConfigurationError(f"TieredTopology: ddr_budget_bytes must be positive, got {ddr_budget_bytes}")
        if "created_by_factory" in inspect.signature(Topology.__init__).parameters:
            topology_kwargs.setdefault("created_by_factory", True)  # TorchRec warns about every topology made by hand
        super().__init__(
            world_size=world_size,
            compute_device=compute_device,
            ddr_cap=ddr_budget_bytes,
            ssd_cap=ssd.capacity_bytes if ssd else 0,
            local_world_size=local_world_size,
            **topology_kwargs,
        )
        self.ssd = ssd
