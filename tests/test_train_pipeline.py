"""``TieredTrainPipeline`` trains the same bits as a plain loop, whatever it prefetches and looks ahead at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import torchrec_mtrains as mtrains
from dmp_twins import Job, jobs
from pipelines import CPU, Twins, assert_all_equal, until_the_end
from ranks import Ranks

RELAXED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


@dataclass
class Course:
    """How a pipeline is driven. ``pauses``: before so many steps the model is evaluated, detached or not."""

    job: Job
    depth: int
    lookahead: int | None
    lookahead_bytes: int
    collections: int
    pauses: dict[int, str] = field(default_factory=dict)


@st.composite
def courses(draw: st.DrawFn, world_size: int) -> Course:
    """Any job, any window."""
    return Course(
        draw(jobs(world_size)),
        draw(st.integers(0, 4)),
        draw(st.sampled_from([0])),
        draw(st.sampled_from([0, 500, 2000, 1 << 28])),
        draw(st.sampled_from([1, 2])),
        draw(st.dictionaries(st.integers(0, 8), st.sampled_from(["detach", "evaluate", "reattach"]), max_size=3)),
    )


def pipeline_over(twins: Twins, dmp: Any, course: Course) -> mtrains.TieredTrainPipeline:
    return mtrains.TieredTrainPipeline(
        dmp,
        twins.optimizer(dmp),
        CPU,
        prefetch_depth=course.depth,
        lookahead=course.lookahead,
        lookahead_bytes=course.lookahead_bytes,
    )


@pytest.mark.filterwarnings("ignore:lookahead:RuntimeWarning")
def train_both(course: Course) -> None:
    """One side in a pipeline, the other plainly: predictions are equal at every step, state at the end. Runs on every rank."""
    twins = Twins(course.job, course.collections)
    ours, theirs = twins.model(True), twins.model(False)
    pipeline, data, seen = pipeline_over(twins, ours, course), iter(twins.batches), []
    for step in range(twins.steps):
        match course.pauses.get(step):
            case "detach":
                pipeline.detach()
                with torch.no_grad():
                    ours(twins.batches[-1])
            case "evaluate":
                ours.eval()
                with torch.no_grad():
                    once = mtrains.TieredTrainPipeline(pipeline.detach(), twins.optimizer(ours), CPU, prefetch_depth=1, lookahead=0)
                    assert len(until_the_end(once, iter(twins.batches[:3]))) == 3
                assert once.trained_batches == 0
                once.detach()
                ours.train()
            case "reattach":
                pipeline.attach(pipeline.detach())
        seen.append(pipeline.progress(data))
        for group in mtrains.tiered_groups(ours):
            group._pool.check()
    with pytest.raises(StopIteration):
        pipeline.progress(data)
    assert pipeline.trained_batches == twins.steps
    assert_all_equal(seen, twins.train_plainly(theirs))
    pipeline.detach()
    assert not any(group._pool.outstanding for group in mtrains.tiered_groups(ours))
    twins.assert_same(ours, theirs)


@settings(max_examples=60, deadline=None, suppress_health_check=RELAXED)
@given(courses(world_size=1))
def test_a_pipeline_trains_like_a_plain_loop(one_rank: None, course: Course) -> None:
    train_both(course)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


# Not shrunk: every failing example costs the start of new ranks.
@settings(max_examples=25, deadline=None, suppress_health_check=RELAXED, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(courses(world_size=2))
def test_a_pipeline_trains_like_a_plain_loop_on_two_ranks(two_ranks: Ranks, course: Course) -> None:
    two_ranks.run(train_both, course)
