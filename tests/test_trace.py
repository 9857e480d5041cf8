"""A trace is a file that trace viewers open, with every hop between tiers; ranges nest, and reads overlap compute."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import torchrec_mtrains as mtrains
from dmp_twins import Job, Table
from pipelines import CPU, Batch, Twins, until_the_end
from torchrec_mtrains.errors import ConfigurationError

pytestmark = pytest.mark.usefixtures("one_rank")

JOB = Job([Table(6000, 16, ["a"], 400), Table(6000, 16, ["b"], 400)], batch_size=64, max_length=2)
STEPS = 30
RANGES = ("zero_grad", "forward", "backward", "optimizer", "prefetch", "start_sparse_data_dist", "wait_input_dist")


def train(folder: Path, file: Path) -> list[dict[str, Any]]:
    """Trains twice, so that rows are on the device; the events of the second time."""
    twins, weights = Twins(JOB, steps=STEPS), torch.rand(400, 400)
    dmp = twins.model(True, [mtrains.SsdHome(paths=(str(folder),), capacity_bytes=64 << 20)])
    until_the_end(mtrains.TieredTrainPipeline(dmp, twins.optimizer(dmp), CPU), iter(twins.batches))
    mtrains.tiered_groups(dmp)[0].flush()

    def forward(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(4):  # something to overlap with: milliseconds
            torch.mm(weights, weights)
        return dmp(batch)

    pipeline = mtrains.TieredTrainPipeline(dmp, twins.optimizer(dmp), CPU, lookahead=4, custom_model_fwd=forward)
    with mtrains.trace(file):
        until_the_end(pipeline, iter(twins.batches))
        mtrains.tiered_groups(dmp)[0].flush()
    return json.loads(file.read_text())["traceEvents"]


@pytest.fixture
def events(tmp_path: Path) -> list[dict[str, Any]]:
    (tmp_path / "ssd").mkdir()
    return train(tmp_path / "ssd", tmp_path / "trace.json")


def spans_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [e for e in events if e["ph"] == "X"]


def test_a_trace_has_every_hop_and_every_step(events: list[dict[str, Any]]) -> None:
    expected = dict.fromkeys(RANGES, STEPS) | {"zero_grad": 1, "prefetch": STEPS - 1}
    steps = {name: len({e["name"] for e in spans_of(events) if e["name"].split()[0] == name}) for name in (*RANGES, "announce")}
    assert STEPS - 6 < steps.pop("announce") < STEPS, "the first batches go straight into slots, and while the window fills"
    assert steps == expected
    of = defaultdict(list)
    for e in spans_of(events):
        of[e["name"]].append(e)
    assert len(of["wait for rows"]) == len(of["release rows"]) == len(of["look up"]) == STEPS
    for hop, counted in (("evict", "rows"), ("fill slots", "rows"), ("read", "bytes"), ("write", "bytes")):
        assert of[hop], hop
        assert all(e["args"][counted] > 0 for e in of[hop])
    assert all(e["args"]["bytes"] % 512 == 0 for e in of["read"])


def test_ranges_of_a_lane_nest(events: list[dict[str, Any]]) -> None:
    lanes = defaultdict(list)
    for e in spans_of(events):
        assert min(e["dur"], e["ts"]) >= 0
        lanes[e["pid"], e["tid"]].append((e["ts"], -e["dur"], e["name"]))
    assert len(lanes) > 2
    for of_lane in lanes.values():
        open_until: list[float] = []
        for start, minus_duration, name in sorted(of_lane):
            while open_until and open_until[-1] <= start + 1e-3:  # a nanosecond
                open_until.pop()
            assert not open_until or start - minus_duration <= open_until[-1] + 1e-3, name
            open_until.append(start - minus_duration)


def test_lanes_are_named(events: list[dict[str, Any]]) -> None:
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names.keys() == {e["tid"] for e in spans_of(events)}
    assert "training thread" in names.values()
    assert {names[e["tid"]].split(",")[0].split()[0] for e in spans_of(events) if e["name"] == "read"} == {"I/O"}


def test_reads_overlap_the_compute_of_earlier_batches(events: list[dict[str, Any]]) -> None:
    compute = [(e["ts"], e["ts"] + e["dur"]) for e in spans_of(events) if e["name"].split()[0] in ("forward", "backward")]
    reads = [(e["ts"], e["ts"] + e["dur"]) for e in spans_of(events) if e["name"] == "read"]
    waits = [(e["ts"], e["ts"] + e["dur"]) for e in spans_of(events) if e["name"] == "wait for rows"]

    def overlaps(a: tuple[float, float], others: list[tuple[float, float]]) -> bool:
        return any(a[0] < end and begin < a[1] for begin, end in others)

    assert any(overlaps(read, compute) and not overlaps(read, waits) for read in reads)


def test_without_a_trace_nothing_is_kept_and_only_one_is_recorded_at_a_time(tmp_path: Path) -> None:
    empty, second = mtrains.trace(tmp_path / "empty.json"), mtrains.trace(tmp_path / "second.json")
    with empty, pytest.raises(ConfigurationError, match="recording a trace already"):
        second.__enter__()
    assert spans_of(json.loads((tmp_path / "empty.json").read_text())["traceEvents"]) == []


def test_events_beyond_the_limit_are_counted(tmp_path: Path) -> None:
    twins = Twins(JOB, steps=4)
    dmp = twins.model(True)
    with mtrains.trace(tmp_path / "short.json", most_events=3):
        until_the_end(mtrains.TieredTrainPipeline(dmp, twins.optimizer(dmp), CPU), iter(twins.batches))
    trace = json.loads((tmp_path / "short.json").read_text())
    assert trace["otherData"]["events_left_out"] > 0
    assert len([e for e in spans_of(trace["traceEvents"]) if e["name"] in ("look up", "evict", "fill slots")]) == 3


def test_a_failing_block_still_writes_its_trace(tmp_path: Path) -> None:
    twins = Twins(JOB, steps=2)
    dmp = twins.model(True)

    def fail() -> None:
        with mtrains.trace(tmp_path / "failed.json"):
            twins.train_plainly(dmp)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert spans_of(json.loads((tmp_path / "failed.json").read_text())["traceEvents"])


def test_torch_profiler_sees_the_ranges(tmp_path: Path) -> None:
    twins = Twins(JOB, steps=6)
    dmp = twins.model(True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        until_the_end(mtrains.TieredTrainPipeline(dmp, twins.optimizer(dmp), CPU, lookahead=2), iter(twins.batches))
    seen = {e.key for e in profiler.key_averages()}
    assert {"## forward 5 ##", "## prefetch 3 ##", "## announce 5 ##", "## wait for rows ##", "## release rows ##"} <= seen
