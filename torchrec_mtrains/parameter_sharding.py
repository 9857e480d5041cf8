"""What a plan says about one tiered table: TorchRec's ``ParameterSharding`` with a tier chain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ParameterSharding, ShardingType

from .errors import ConfigurationError, UnsupportedError
from .tiers import TierChain

TIERED_KERNEL = EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value
"""TorchRec's name for a compute kernel from outside it; its enum of kernels cannot be extended."""

TIERED_SHARDING_TYPES = tuple(t.value for t in ShardingType if t is not ShardingType.DATA_PARALLEL)

TABLE_TIERS = "mtrains_table_tiers"
"""The fused parameter that carries a table's ``TableTiers`` from the plan to the compute kernel."""


@dataclass(frozen=True, eq=False)
class TableTiers:
    """What one table has of its own: its chain, and the ``init_fn`` of its configuration.

    TorchRec puts tables into one TBE when all their fused parameters are equal. Nothing here must agree inside a TBE, so
    all of these are equal, and tiered tables make as many TBEs as FUSED ones.
    """

    chain: TierChain
    init_fn: Callable[[Tensor], Tensor | None] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TableTiers)

    def __hash__(self) -> int:
        return hash(TABLE_TIERS)


@dataclass
class TieredParameterSharding(ParameterSharding):
    """A ``ParameterSharding`` whose table lives in ``tiers``. A hand-written plan may use it for one table.

    Raises: UnsupportedError for a sharding type that tiered tables do not have; ConfigurationError for another
    compute kernel or no chain.
    """

    compute_kernel: str = TIERED_KERNEL
    tiers: TierChain | None = None

    def __post_init__(self) -> None:
        if self.compute_kernel != TIERED_KERNEL:
            raise ConfigurationError(
                f"a tiered table has compute_kernel={TIERED_KERNEL!r}, got {self.compute_kernel!r}; leave it out, or use a plain "
                "ParameterSharding for a table in memory"
            )
        if not isinstance(self.tiers, TierChain):
            raise ConfigurationError(f"TieredParameterSharding: tiers must be a TierChain, got {self.tiers!r}")
        if self.sharding_type not in TIERED_SHARDING_TYPES:
            raise UnsupportedError(
                f"sharding type {self.sharding_type!r} is not supported for tiered tables; use one of {', '.join(TIERED_SHARDING_TYPES)}"
            )

    def get_additional_fused_params(self) -> dict[str, Any]:
        """TorchRec's hook: what travels with the table to its compute kernel."""
        assert self.tiers is not None
        return {TABLE_TIERS: TableTiers(self.tiers)}
