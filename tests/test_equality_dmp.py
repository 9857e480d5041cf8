"""Under ``DistributedModelParallel``, tiered tables train bit for bit like stock FUSED ones: on one rank, on two, on two nodes of two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from dmp_twins import Job, jobs, train_and_compare
from ranks import Ranks

RELAXED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


@settings(max_examples=60, deadline=None, suppress_health_check=RELAXED)
@given(jobs(world_size=1))
def test_tiered_tables_train_like_fused_ones(one_rank: None, job: Job) -> None:
    train_and_compare(job)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


# Not shrunk: every failing example costs the start of new ranks.
@settings(max_examples=25, deadline=None, suppress_health_check=RELAXED, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(jobs(world_size=2))
def test_tiered_tables_train_like_fused_ones_on_two_ranks(two_ranks: Ranks, job: Job) -> None:
    two_ranks.run(train_and_compare, job)


@pytest.fixture(scope="module")
def two_nodes(two_ranks: Ranks) -> Iterator[Ranks]:
    two_ranks.close()
    ranks = Ranks(4, local_world_size=2)
    yield ranks
    ranks.close()


@settings(max_examples=15, deadline=None, suppress_health_check=RELAXED, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(jobs(world_size=4))
def test_tiered_tables_train_like_fused_ones_on_two_nodes(two_nodes: Ranks, job: Job) -> None:
    two_nodes.run(train_and_compare, job)
