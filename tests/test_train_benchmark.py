"""``benchmarks/train.py``: it runs, its policies are what they are called, and training from tiers gives stock FUSED's bits."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec_mtrains.kernels import MemoryVolume

from test_benchmarks import run

import _train_bound  # isort: skip  (test_benchmarks has put benchmarks/ on the path)
import _train_misses  # isort: skip
import _train_sides  # isort: skip
import _train_steps  # isort: skip
import _train_traces  # isort: skip

from torchrec_mtrains.process_group import process_group
from torchrec_mtrains.twins import TwinsDifferError


def test_the_train_benchmark_reports_every_section_and_draws_it(tmp_path: Path) -> None:
    report = run("train.py", tmp_path, "--no-movielens", "--picture", str(tmp_path / "train.png"))
    sections = report["figures"]["sections"]
    assert set(sections) == {"misses", "bound", "directory", "steps", "criteo"}
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")
    assert all(math.isfinite(f["value"]) for f in report["figures"]["figures"].values())
    for trace in sections["misses"]["traces"].values():
        for pool in trace["pools"].values():
            assert 0 < pool["optimum"] <= min(pool["lru"], pool["ours"], pool["ahead"])
    for name in ("steps", "criteo"):  # that losses are equal is checked by the run itself
        assert sections[name]["steps_compared"] == sum(2 * (3 + 1) for _ in sections[name]["parts"])
        assert all(part["misses_per_step"] > 0 < part["blocks_per_step"] for part in sections[name]["parts"])


@given(st.lists(st.lists(st.integers(0, 9), max_size=4, unique=True), max_size=40), st.sampled_from([0.0, 0.01, 0.3]))
def test_the_popularities_of_the_bound_follow_bayes_rule(batches: list[list[int]], drift: float) -> None:
    of_rows = _train_bound.Popularities(10, 3, 1.05, drift)
    prior, used = of_rows.prior.double(), of_rows.used.double()
    by_hand = [prior.clone() for _ in range(10)]
    for batch in batches:
        of_rows.see(torch.tensor(batch, dtype=torch.int64))
        for row in range(10):
            moved = (1 - drift) * by_hand[row] + drift * prior
            seen = moved * (used if row in batch else 1 - used)
            by_hand[row] = seen / seen.sum()
    expected = torch.stack([p @ used for p in by_hand])
    assert torch.allclose(of_rows.in_next.double(), expected, rtol=1e-3, atol=1e-6)


def batches_of(rows: int) -> st.SearchStrategy[list[np.ndarray]]:
    """Up to 8 batches of up to 3 distinct rows."""
    batch = st.lists(st.integers(0, rows - 1), min_size=1, max_size=3, unique=True).map(lambda b: np.array(b, np.int64))
    return st.lists(batch, min_size=1, max_size=8)


def fewest_misses(batches: list[np.ndarray], pool_rows: int) -> int:
    """By trying every set of rows that could be kept after each batch."""
    states = {frozenset[int](): 0}
    for batch in batches:
        used = frozenset(batch.tolist())
        after: dict[frozenset[int], int] = {}
        for resident, misses in states.items():
            missing = len(used - resident)
            others = sorted(resident - used)
            kept = min(len(others), pool_rows - len(used))
            for keep in itertools.combinations(others, kept):
                state = used | frozenset(keep)
                after[state] = min(after.get(state, 1 << 30), misses + missing)
        states = after
    return min(states.values())


@given(batches=batches_of(7), pool_rows=st.integers(3, 6))
def test_no_choice_of_victims_misses_less_than_the_optimum(batches: list[np.ndarray], pool_rows: int) -> None:
    assert _train_misses.optimum(batches, 7, pool_rows).sum() == fewest_misses(batches, pool_rows)


@given(batches=batches_of(9), pool_rows=st.integers(3, 7))
def test_lru_evicts_who_was_used_longest_ago(batches: list[np.ndarray], pool_rows: int) -> None:
    order: list[int] = []  # resident, the least recently used first
    misses = []
    for batch in batches:
        used = batch.tolist()
        misses.append(sum(row not in order for row in used))
        order = [row for row in order if row not in used] + used
        order = order[-pool_rows:]
    assert _train_misses.lru(batches, 9, pool_rows).tolist() == misses


def test_an_optimum_of_pools_that_cannot_hold_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold batch 0, which uses 4"):
        _train_misses.optimum([np.arange(4)], 4, 3)


def test_optimum_and_lru_are_libcachesim_s() -> None:
    """Where it is installed (pip install libcachesim==0.3.5): of batches of one row, which are its requests."""
    libcachesim = pytest.importorskip("libcachesim", reason="libcachesim is not installed")
    ids = _train_traces.zipf_trace("zipf 1.05", 2000, 1, _train_traces.Stretch(0, 20_000, 0), 0).ids[:, 0]
    uses = list(ids[:, None])
    following = [int(f[0]) for f in _train_misses.next_uses(uses)]
    for pool_rows in (20, 200):
        belady, lru, misses = libcachesim.Belady(cache_size=pool_rows), libcachesim.LRU(cache_size=pool_rows), [0, 0]
        for i, row in enumerate(ids):
            request = libcachesim.Request()
            request.obj_id, request.obj_size, request.clock_time = int(row), 1, i
            request.next_access_vtime = following[i] if following[i] < len(ids) else 1 << 62
            misses[0] += not belady.get(request)
            misses[1] += not lru.get(request)
        assert misses == [f(uses, 2000, pool_rows).sum() for f in (_train_misses.optimum, _train_misses.lru)]


def test_announced_batches_save_misses_of_a_slot_pool() -> None:
    trace = _train_traces.zipf_trace("zipf 0.9", 20_000, 256, _train_traces.Stretch(0, 120, 0), 0)
    alone, ahead = (_train_misses.ours(trace, 2000, lookahead, MemoryVolume(), 4).sum() for lookahead in (0, 64))
    best = _train_misses.optimum(_train_misses.uses_of(trace), trace.rows, 2000).sum()
    assert best <= ahead < 0.95 * alone


def test_traces_are_functions_of_their_table_and_drift_moves_what_is_hot() -> None:
    stretch = _train_traces.Stretch(0, 1500, 0)
    kept = {}
    for name in _train_traces.ZIPFS:
        first, again, other = (_train_traces.zipf_trace(name, 5000, 200, stretch, table).ids for table in (0, 0, 1))
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)
        assert first.min() >= 0
        assert first.max() < 5000
        hottest = [set(np.argsort(np.bincount(part.ravel(), minlength=5000))[-50:]) for part in (first[:50], first[-50:])]
        kept[name] = len(hottest[0] & hottest[1])
    assert max(kept["zipf 1.05, drifting"], kept["zipf 0.9, drifting"]) < 25 < min(kept["zipf 1.05"], kept["zipf 0.9"])
    assert kept["zipf 1.05, drifting"] < kept["zipf 1.05, drifting slowly"] < kept["zipf 1.05"]


def test_the_mixture_changes_its_skew_in_the_middle_of_what_is_measured() -> None:
    ids = _train_traces.mixture_trace(5000, 2000, _train_traces.Stretch(10, 20, 5), 0).ids
    unique = [len(np.unique(batch)) for batch in ids]
    assert max(unique[:20]) < min(unique[20:])


def test_copies_of_movielens_keep_the_order_of_events_and_have_rows_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "ml.inter"
    events = [(user, 10 * user + k, 3, 1000 - 10 * user + k) for user in range(1, 6) for k in range(4)]  # the last user came first
    file.write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "".join("\t".join(map(str, e)) + "\n" for e in events)
    )
    trace = _train_traces.movielens_trace(file, "users", 2, 20, _train_traces.Stretch(0, 2, 0))
    copies = trace.ids.ravel()[::2], trace.ids.ravel()[1::2]
    for rows in copies:
        assert len(np.unique(rows)) == 5
        assert np.count_nonzero(np.diff(rows)) in (4, 5)  # bursts; one may be cut where the copy goes round its end
    assert not set(copies[0]) & set(copies[1])


def test_a_side_with_other_losses_is_found() -> None:
    def steps(*losses: float) -> _train_sides.Steps:
        return _train_sides.Steps(torch.tensor(losses), [], {}, {})

    _train_steps._same({"memory": steps(1.0, 2.0), "pools": steps(1.0, 2.0)}, "here")
    with pytest.raises(TwinsDifferError, match=r"here: side 'pools' .* at step 1"):
        _train_steps._same({"memory": steps(1.0, 2.0), "pools": steps(1.0, math.nextafter(2.0, 3.0) + 1e-6)}, "here")


def pool_thread_seconds() -> float:
    (thread,) = [t for t in Path("/proc/self/task").iterdir() if (t / "comm").read_text() == "mtrains-pool\n"]
    return int((thread / "schedstat").read_text().split()[0]) * 1e-9


def test_the_thread_that_pools_share_is_counted_as_native_though_it_began_before(tmp_path: Path) -> None:
    shape = _train_sides.Shape((4_000,), 16, 256, 4)
    batches = _train_sides.Batches(shape)
    batches.append([_train_traces.zipf_trace("zipf 0.9", 4_000, shape.lookups, _train_traces.Stretch(0, 80, 0), 0)])
    with process_group():
        side = _train_sides.tiered("pools", shape, {"top": 8}, shape.pool_rows(0.1), tmp_path / "pools", 2, None)
        side.run(batches, "top", 20, 0)
        began, native = pool_thread_seconds(), _train_sides.processor_seconds()["native"]
        side.run(batches, "top", 50, 0)
        spent = _train_sides.processor_seconds()["native"] - native, pool_thread_seconds() - began
        side.close()
    assert spent[0] >= 0.9 * spent[1] > 0


@pytest.mark.parametrize("steps", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_pools_of_a_fiftieth_over_an_ssd_give_stock_fused_s_bits(steps: int) -> None:
    shape = _train_sides.Shape((40_000,) * 4, 16, 64, 4)
    batches, widths = _train_sides.Batches(shape), {"top": 32}
    stretch = _train_traces.Stretch(0, steps // 2, 0)
    for name in ("zipf 1.05, drifting", "zipf 0.9"):
        batches.append([_train_traces.zipf_trace(name, rows, shape.lookups, stretch, t) for t, rows in enumerate(shape.rows)])
    with process_group(), tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        ssd = Path(folder)  # on the disk of the checkout: /tmp may be in memory, where there is no O_DIRECT
        ahead = _train_sides.tiered("ahead", shape, widths, shape.pool_rows(0.02), ssd / "ahead", 2, None)
        memory = _train_sides.in_memory(shape, widths, ahead)
        plain = _train_sides.tiered("plain", shape, widths, shape.pool_rows(0.02), ssd / "plain", 0, 0)
        sides = [ahead, memory, plain]
        for side in (ahead, plain):
            _train_sides.put_every_row(side)
        losses = [side.run(batches, "top", steps, 0).losses for side in sides]
        assert torch.equal(losses[0], losses[1])
        assert torch.equal(losses[2], losses[1])
        assert losses[1].unique().numel() > steps // 2
        assert ahead.counters()["misses"] > 10 * steps
        assert ahead.counters()["write_backs"] > 0
        for i, table in enumerate(shape.tables):
            weights = memory.table(i)
            for side in (ahead, plain):
                assert torch.equal(side.groups[0].read_rows(i, 0, table.rows)[0], weights)
        for side in sides:
            side.close()
