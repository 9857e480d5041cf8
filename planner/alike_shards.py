"""Shards of one option that are alike, so that what is said of one is not worked out again for every rank.

A row-wise or data-parallel option has a shard on every rank, most of one size. TorchRec's estimators go by a shard's size and never by its
place (``tests/test_planner_components.py`` holds that against every shard asked alone), and what a step does to one by its size and its
``ShardUse``, of which shards alike have the same object.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, TypeVar

from torchrec.distributed.planner.types import Shard, ShardingOption

_T = TypeVar("_T")


@contextmanager
def one_of_each_size(options: Sequence[ShardingOption]) -> Iterator[None]:
    """Within, every option has but one shard of each size; afterwards all have what was noted of it: ``storage``, ``perf``, and the
    option's ``uncharged_bytes``."""
    all_shards = [option.shards for option in options]
    for option in options:
        option.shards = list({tuple(shard.size): shard for shard in option.shards}.values())
        option.uncharged_bytes = None
    try:
        yield
    finally:
        for option, shards in zip(options, all_shards, strict=True):
            of_size = {tuple(shard.size): i for i, shard in enumerate(option.shards)}
            at = [of_size[tuple(shard.size)] for shard in shards]
            for shard, i in zip(shards, at, strict=True):
                shard.storage, shard.perf = copy(option.shards[i].storage), copy(option.shards[i].perf)
            option.shards = shards
            if option.uncharged_bytes:
                option.uncharged_bytes = [option.uncharged_bytes[i] for i in at]


def copied(option: Any) -> Any:
    """A copy whose shards are its own. What they hold is shared: it is replaced, never changed."""
    cls: Any = type(option)
    result = cls.__new__(cls)
    result.__dict__.update(option.__dict__)
    result.shards = [Shard(s.size, s.offset, s.storage, s.perf, s.rank) for s in option.shards]
    return result


def alike(option: ShardingOption) -> list[list[int]]:
    """The option's shards by number, those alike together."""
    of_kind: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, (shard, use) in enumerate(zip(option.shards, option.uses, strict=True)):
        of_kind[(*shard.size, id(use))].append(i)
    return list(of_kind.values())


def of_shards(option: ShardingOption, of_shard: Callable[[int], _T]) -> list[_T]:
    """What ``of_shard`` says of each, asked once for those alike."""
    result: list[Any] = [None] * option.num_shards
    for kind in alike(option):
        said = of_shard(kind[0])
        for i in kind:
            result[i] = said
    return result
