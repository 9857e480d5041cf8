"""Why there is no plan: which tier is short, by how many bytes, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torchrec.distributed.planner.types import ShardingOption, Storage

from .errors import InsufficientStorageError
from .estimators import charged
from .footprint import Footprint
from .partitioners import NoRoomError, place_by_room

_ADVICE = {
    "ddr": "Raise ddr_budget_bytes, add ranks, shrink the batch (pools hold the rows of a batch at least; see min_pool_rows) or the "
    "tables, or give TieredTopology an ssd if it has none",
    "ssd": "Raise the ssd's capacity_bytes, commit a checkpoint more often or keep fewer of them (CheckpointSchedule: what they hold is "
    "charged), add ranks, raise ddr_budget_bytes so that fewer tables need the SSD, or shrink the tables",
}
_BESIDE = {"ddr": " beside ids of batches that wait", "ssd": ""}


def shortage(
    footprint: Footprint,
    stock: Sequence[Sequence[ShardingOption]],
    capacity: Sequence[Storage],
    capacity_short: Callable[[int], int],
    in_memory_short: float,
) -> InsufficientStorageError | None:
    """The error to raise when no member of the footprint fitted; None where bytes are not the reason.

    ``stock`` holds each table's options in memory, also those that no rank can hold. ``capacity_short``: by how much the
    capacity of an SSD is short where its tables are by so much (``TieredProposer.capacity_short``).
    ``in_memory_short``: DDR that is short for a plan without tiers (``TieredProposer.in_memory_short``).
    """
    found = _shortage(footprint, stock, capacity)
    if found is None:
        return None
    tier, short, what = found
    if tier == "ddr":
        if 0 < in_memory_short < short:
            short, what = int(in_memory_short), "in memory, where no ids of coming batches wait beside them, the tables need so much more"
        return _error(tier, short, what)
    more = capacity_short(short) - short
    return _error(tier, short + more, f"{what}, and the volume itself {more} more than there are" if more else what)


def _shortage(footprint: Footprint, stock: Sequence[Sequence[ShardingOption]], capacity: Sequence[Storage]) -> tuple[str, int, str] | None:
    """The tier that is short, by how many bytes, and of what."""
    everything = sum(capacity, Storage(0, 0, 0))
    for table, in_memory in zip(footprint.tables, stock, strict=True):
        options = [*map(charged, in_memory), *([table.tiered] if table.tiered else [])]
        found = _shard_too_large(table.name, options, capacity)
        if found:
            return found
    totals = footprint.totals()
    need = totals[-1].ddr
    if need > everything.ddr:
        short = need - everything.ddr
        what = f"the tables need {need} bytes even with the smallest pools, {short} more than the ranks have{_BESIDE['ddr']}"
        return "ddr", short, what
    need = min(total.ssd for total in totals if total.ddr <= everything.ddr)
    if need > everything.ssd:
        what = f"the tables that do not fit in memory need {need} bytes, the ranks have {everything.ssd}"
        return "ssd", need - everything.ssd, what
    try:
        place_by_room(footprint.member(0), capacity)
    except NoRoomError as error:
        return error.tier, error.short_bytes, str(error)
    return None


def _shard_too_large(name: str, options: Sequence[ShardingOption], capacity: Sequence[Storage]) -> tuple[str, int, str] | None:
    """The option that is least short of DDR, then of SSD, when there is none whose shards each fit a rank."""
    have = {tier: max(getattr(storage, tier) for storage in capacity) for tier in _ADVICE}
    need = min(
        ({tier: max(getattr(shard.storage, tier) for shard in option.shards) for tier in _ADVICE} for option in options),
        key=lambda need: [max(0, need[tier] - have[tier]) for tier in _ADVICE],
    )
    for tier in _ADVICE:
        short = need[tier] - have[tier]
        if short > 0:
            return tier, short, f"table {name!r} needs {need[tier]} bytes on one rank, {short} more than any has{_BESIDE[tier]}"
    return None


def _error(tier: str, short: int, what: str) -> InsufficientStorageError:
    return InsufficientStorageError(f"no plan: {tier} is {short} bytes short: {what}. {_ADVICE[tier]}", tier, short)
