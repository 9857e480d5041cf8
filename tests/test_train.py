"""The main job: tiered and in-memory runs are the same bits, on every data source; AUC is exact; the demo runs small."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import jobs
from torchrec_mtrains import twins
from torchrec_mtrains.cli import main
from torchrec_mtrains.data import CriteoSource, MovieLensSource
from torchrec_mtrains.job_model import ModelOptions
from torchrec_mtrains.placement import PlacementOptions
from torchrec_mtrains.process_group import process_group
from torchrec_mtrains.train import TrainOptions, area_under_curve


def options(ssd, optimizer: str) -> TrainOptions:
    model = ModelOptions(embedding_dim=8, dense_layers=(8,), over_layers=(8,), optimizer=optimizer)
    return TrainOptions(model=model, placement=PlacementOptions(ssd=(str(ssd),), pool_rows=1))


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_movielens_from_the_smallest_pools_trains_as_in_memory(tmp_path, optimizer):
    rng = np.random.default_rng(1)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float\n"]
    lines += [f"{rng.integers(60)}\t{rng.integers(90)}\t{rng.integers(1, 6)}\t{t}\n" for t in range(900)]
    (tmp_path / "x.inter").write_text("".join(lines))
    torch.set_num_threads(1)
    with process_group() as pg:
        pair = twins.train_twice(MovieLensSource(tmp_path, 8, epochs=2), options(tmp_path, optimizer), pg)
    assert pair.pool_rows <= 8
    assert len(pair.tiered.losses) == len(pair.in_memory.losses) == 2 * (810 // 8)
    assert sum(t["evictions"] for t in pair.tiered.tables) > 500


def test_criteo_from_the_smallest_pools_trains_as_in_memory(tmp_path):
    rng = np.random.default_rng(2)
    lines = [
        "\t".join([str(rng.integers(2)), *map(str, rng.integers(0, 50, 13)), *(f"{v:08x}" for v in rng.integers(0, 1 << 32, 26))]) + "\n"
        for _ in range(300)
    ]
    path = tmp_path / "train.txt"
    path.write_text("".join(lines))
    torch.set_num_threads(1)
    with process_group() as pg:
        pair = twins.train_twice(CriteoSource(path, 16, rows=100), options(tmp_path, "rowwise_adagrad"), pg)
    assert pair.tiered.losses == pair.in_memory.losses
    assert pair.tiered.held_out_samples == 16


def test_twins_that_differ_are_reported(tmp_path, monkeypatch):
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float\n"]
    lines += [f"{t % 9}\t{t % 7}\t{t % 5 + 1}\t{t}\n" for t in range(100)]
    (tmp_path / "x.inter").write_text("".join(lines))
    real = twins.train

    def disturbed(source, job, *rest):
        done = real(source, job, *rest)
        if job.placement.in_memory:
            done.steps[3].loss = math.nextafter(done.steps[3].loss, 1)
        return done

    monkeypatch.setattr(twins, "train", disturbed)
    with process_group() as pg, pytest.raises(twins.TwinsDifferError, match="step 4"):
        twins.train_twice(MovieLensSource(tmp_path, 8), options(tmp_path, "sgd"), pg)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40))
def test_auc_is_the_share_of_pairs_in_order(samples):
    score = np.array([s for s, _ in samples], np.float32)
    truth = np.array([t for _, t in samples], np.float32)
    pairs = [(p > n) + (p == n) / 2 for p in score[truth == 1] for n in score[truth == 0]]
    found = area_under_curve(score, truth)
    assert (math.isnan(found) and not pairs) or found == pytest.approx(np.mean(pairs))


def test_the_loss_falls_and_the_model_ranks_better_than_chance(tmp_path):
    done = jobs.run(jobs.options(tmp_path, steps=400))
    assert np.mean(done.losses[-50:]) < np.mean(done.losses[:20])
    assert done.auc > 0.6


def test_the_demo_runs_small(tmp_path):
    result = CliRunner().invoke(main, ["demo", "--ssd", str(tmp_path), "--out", str(tmp_path / "out"), "--steps", "2", "--skip-movielens"])
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "out" / "synthetic.json").read_text())
    assert figures["table_bytes"] >= 8 * figures["ddr_budget_bytes"]
    assert (tmp_path / "out" / "synthetic.html").stat().st_size > 10_000
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "the demo leaves nothing on the SSD"
