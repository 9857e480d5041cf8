"""Shards alike are worked out once, and nothing that is said of a shard depends on that."""

from __future__ import annotations

from hypothesis import given, settings
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ShardingOption
from torchrec_mtrains.planner import TieredEnumerator, TieredTopology
from torchrec_mtrains.planner.alike_shards import alike, copied, of_shards, one_of_each_size
from torchrec_mtrains.planner.sharding_options import TieredShardingOption

from planner_cases import PLENTY, Case, TableCase, cases
from torchrec_mtrains import SsdHome


def enumerated(case: Case) -> list[ShardingOption]:
    topology = TieredTopology(case.world_size, ddr_budget_bytes=PLENTY, ssd=SsdHome(("/nowhere",), PLENTY))
    return TieredEnumerator(topology, case.batch_size, case.constraints()).enumerate(case.model(), case.sharders())


@settings(max_examples=40, deadline=None)
@given(cases(max_world_size=5))
def test_every_shard_in_memory_has_the_storage_and_perf_that_torchrec_says_of_it(case: Case) -> None:
    topology = TieredTopology(case.world_size, ddr_budget_bytes=PLENTY, ssd=SsdHome(("/nowhere",), PLENTY))
    stock = EmbeddingEnumerator(topology, case.batch_size, constraints=case.constraints()).enumerate(case.model(), case.sharders())
    of_stock = {(o.fqn, o.sharding_type, o.compute_kernel): o for o in stock}
    ours = [o for o in enumerated(case) if not isinstance(o, TieredShardingOption)]
    assert len(ours) == len(of_stock)
    for option in ours:
        theirs = of_stock[option.fqn, option.sharding_type, option.compute_kernel]
        assert [(s.size, s.offset, s.storage, s.perf) for s in option.shards] == [
            (s.size, s.offset, s.storage, s.perf) for s in theirs.shards
        ]


def test_what_is_noted_of_one_size_is_every_shards_and_no_two_share_it() -> None:
    case = Case([TableCase(10, 8)], world_size=4)  # shards of 3, 3, 3 and 1 rows
    option = next(
        o for o in enumerated(case) if (o.num_shards == 4 and not isinstance(o, TieredShardingOption)) or o.sharding_type == "row_wise"
    )
    rows = [shard.size[0] for shard in option.shards]
    with one_of_each_size([option]):
        assert sorted(shard.size[0] for shard in option.shards) == sorted(set(rows))
        option.uncharged_bytes = [100 * shard.size[0] for shard in option.shards]
    assert [shard.size[0] for shard in option.shards] == rows
    assert option.uncharged_bytes == [100 * n for n in rows]
    assert len({id(shard.storage) for shard in option.shards}) == 4


def test_shards_alike_are_asked_once_and_all_get_the_answer() -> None:
    case = Case([TableCase(10, 8)], world_size=4)
    option = next(o for o in enumerated(case) if isinstance(o, TieredShardingOption) and o.sharding_type == "row_wise")
    assert sorted(map(len, alike(option))) == [1, 3]
    asked: list[int] = []
    said = of_shards(option, lambda i: asked.append(i) or option.shards[i].size[0])
    assert said == [shard.size[0] for shard in option.shards]
    assert len(asked) == 2


def test_a_copy_has_shards_of_its_own() -> None:
    option = enumerated(Case([TableCase(10, 8)], world_size=2))[0]
    other = copied(option)
    other.shards[0].rank = 1
    assert option.shards[0].rank is None
    assert type(other) is type(option)


def test_storage_that_leaves_out_optimizer_state_notes_it_for_each_shard() -> None:
    for option in enumerated(Case([TableCase(1000, 8), TableCase(10, 8)], world_size=3)):
        assert len(option.uncharged_bytes or [0] * option.num_shards) == option.num_shards
