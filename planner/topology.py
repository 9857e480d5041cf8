"""What the machine has, as the planner sees it: TorchRec's ``Topology`` with a DDR budget, an SSD and PMem for each rank."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from typing import Any

from torchrec.distributed.planner.types import Topology

from ..errors import ConfigurationError, UnsupportedError
from ..tiers import SsdHome
from .charges import PAGE_BYTES, bytes_for_tables
from .storage import TieredStorage


@dataclass(frozen=True)
class PmemDevice:
    """A byte-addressable device (PMem, CXL, tmpfs): a folder on it, and the bytes that the caches of a rank may take there."""

    path: str
    capacity_bytes: int

    def __post_init__(self) -> None:
        if not self.path or self.capacity_bytes <= 0:
            raise ConfigurationError(f"PmemDevice: path must name a folder and capacity_bytes be positive, got {self}")


class TieredTopology(Topology):
    """``world_size`` ranks, each with ``ddr_budget_bytes`` of memory for its embedding tables and an ``ssd`` for what exceeds it;
    ``pmem`` is for caches in front of the SSD. With ``compute_device="cuda"`` each has a GPU, with ``hbm_budget_bytes`` for tables, pools
    and caches, and the DDR is host memory below them.

    ``capacity_bytes`` are per rank, as everywhere; of the SSD's, tables get what a volume of small records without checkpoints does not
    keep to itself (``charges.volume_bytes``). Without ``ssd`` no table goes below DDR. ``topology_kwargs`` are TorchRec's
    (bandwidths in bytes/ms, ``pod_size``, ...).

    Raises: UnsupportedError for another compute device, or PMem below a GPU; ConfigurationError for a budget that is not positive, that is
    missing or not used, or PMem without an SSD.
    """

    def __init__(
        self,
        world_size: int,
        compute_device: str = "cpu",
        *,
        ddr_budget_bytes: int,
        hbm_budget_bytes: int | None = None,
        ssd: SsdHome | None = None,
        pmem: PmemDevice | None = None,
        local_world_size: int | None = None,
        **topology_kwargs: Any,
    ) -> None:
        if compute_device not in ("cpu", "cuda"):
            raise UnsupportedError(f"TieredTopology plans for compute_device 'cpu' or 'cuda', got {compute_device!r}")
        if ddr_budget_bytes <= 0:
            raise ConfigurationError(f"TieredTopology: ddr_budget_bytes must be positive, got {ddr_budget_bytes}")
        if (compute_device == "cuda") != (hbm_budget_bytes is not None) or (hbm_budget_bytes is not None and hbm_budget_bytes <= 0):
            raise ConfigurationError(
                "TieredTopology: hbm_budget_bytes must be positive with compute_device='cuda', and left out with 'cpu', got "
                f"{hbm_budget_bytes} with {compute_device!r}"
            )
        if pmem is not None and compute_device == "cuda":
            raise UnsupportedError("TieredTopology: a plan for GPUs has no PMem; leave pmem out, or write chains with PmemCache by hand")
        if pmem is not None and ssd is None:
            raise ConfigurationError("TieredTopology: pmem holds caches in front of an SSD, and there is no ssd; give one too")
        if "created_by_factory" in inspect.signature(Topology.__init__).parameters:
            topology_kwargs.setdefault("created_by_factory", True)  # TorchRec warns about every topology made by hand
        super().__init__(
            world_size=world_size,
            compute_device=compute_device,
            hbm_cap=hbm_budget_bytes,
            ddr_cap=ddr_budget_bytes,
            ssd_cap=bytes_for_tables(ssd.capacity_bytes, {PAGE_BYTES}, keep=0) if ssd else 0,
            local_world_size=local_world_size,
            **topology_kwargs,
        )
        self.ssd, self.pmem = ssd, pmem
        for device in self.devices:
            of_rank = device.storage
            # TorchRec 1.6 takes an ssd_cap of 0 for none said, and puts 2 TiB there: more than the SSD has.
            ssd_bytes = of_rank.ssd if ssd and of_rank.ssd <= ssd.capacity_bytes else 0
            device.storage = TieredStorage(of_rank.hbm, of_rank.ddr, ssd_bytes, pmem.capacity_bytes if pmem else 0)

    def _hash(self) -> int:
        return int(hashlib.sha256(repr((super()._hash(), self.ssd, self.pmem)).encode()).hexdigest(), 16)

    @property
    def ranks_per_host(self) -> int:
        """Ranks that share the devices of a host."""
        return min(self.local_world_size, self.world_size)

    def host_storage(self, host: int) -> TieredStorage:
        """What the ranks of a host may take of its memory and devices together."""
        ranks = self.devices[host * self.ranks_per_host : (host + 1) * self.ranks_per_host]
        return sum((device.storage for device in ranks), TieredStorage())
