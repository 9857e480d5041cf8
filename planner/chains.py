"""From placed options to a plan whose tables have their tiers."""

from __future__ import annotations

from collections.abc import Sequence

from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.types import ShardingPlan

from ..parameter_sharding import TIERED_KERNEL, TieredParameterSharding
from ..tiers import TierChain
from .sharding_options import TieredShardingOption
from .topology import TieredTopology


def with_chains(plan: ShardingPlan, options: Sequence[ShardingOption], topology: TieredTopology) -> ShardingPlan:
    """``plan``, in place, with ``TieredParameterSharding`` for its tiered tables.

    TorchRec's ``to_sharding_plan`` makes every entry a plain ``ParameterSharding``, and has no hook between: of a stock planner, give its
    plan and the options that it chose, which a function in its ``callbacks`` gets.
    """
    for option in options:
        if isinstance(option, TieredShardingOption) and option.compute_kernel == TIERED_KERNEL:
            stock = plan.plan[option.path][option.name]
            plan.plan[option.path][option.name] = TieredParameterSharding(**vars(stock), tiers=chain_of(option, topology))
    return plan


def chain_of(option: TieredShardingOption, topology: TieredTopology) -> TierChain:
    """The option's pool, and what the topology has for below it."""
    return option.chain(topology.ssd, topology.pmem.path if topology.pmem else None)
