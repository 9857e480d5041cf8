"""``mtrains plan``: with what was measured, and a picture; ``mtrains train`` says the same before it trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from torchrec_mtrains.planner import hardware_profiles

from test_cli import refused, run

DATA = ["--data", "synthetic", "--tables", "2", "--rows", "20000", "--pooling", "2", "--batch-size", "8", "--embedding-dim", "32"]
MODEL = ["--dense-layers", "8", "--over-layers", "8"]
BUDGET = ["--ddr-budget", "19MiB"]  # 16 MiB of it are kept for the volume


@pytest.fixture
def ssd(tmp_path: Path) -> Path:
    folder = tmp_path / "ssd"
    folder.mkdir()
    return folder


@pytest.fixture
def hardware(tmp_path: Path) -> Path:
    hardware_profiles()["optane"].save(tmp_path / "hardware.json")
    return tmp_path / "hardware.json"


@pytest.fixture
def access(tmp_path: Path) -> Path:
    done = run("profile", *DATA[1:], "--batches", 30, "-o", tmp_path / "access.json")
    assert done.exit_code == 0, done.output
    return tmp_path / "access.json"


def test_plan_goes_by_what_was_measured_and_draws_a_picture(ssd: Path, hardware: Path, access: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    assumed = run("plan", *DATA, *MODEL, "--ssd", ssd, *BUDGET)
    measured = run("plan", *DATA, *MODEL, "--ssd", ssd, *BUDGET, "--hardware", hardware, "--access", access, "--picture", picture)
    assert (assumed.exit_code, measured.exit_code) == (0, 0), measured.output
    assert "assumed hardware" in assumed.output
    assert "assumed accesses" in assumed.output
    assert "assumed" not in measured.output
    assert "tiered" in measured.output
    for said in ("predicted step", "bottleneck", "no plan is faster than", "one more GiB a rank would save: ddr"):
        assert said in measured.output
    step = [next(line for line in r.output.splitlines() if "predicted step" in line) for r in (assumed, measured)]
    assert step[0] != step[1]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"picture: {picture}" in measured.output
    assert list(ssd.iterdir()) == []


def test_train_prints_the_plan_and_its_summary_before_training(ssd: Path, hardware: Path) -> None:
    trained = run("train", *DATA, *MODEL, "--ssd", ssd, *BUDGET, "--hardware", hardware, "--steps", 2)
    assert trained.exit_code == 0, trained.output
    for said in ("predicted step", "no plan is faster than", "one more GiB a rank would save", "assumed accesses"):
        assert trained.output.index(said) < trained.output.index("trained 2 steps")


def test_profiles_of_another_job_or_of_nothing_are_refused(ssd: Path, access: Path, tmp_path: Path) -> None:
    options = ["plan", *MODEL, "--ssd", ssd, *BUDGET, "--access", access]
    more_tables = [*DATA[:3], "3", *DATA[4:]]
    assert "no table 't2', only t0, t1; profile the data of this job" in refused(*options, *more_tables)
    longer = [*DATA[:5], "30000", *DATA[6:]]
    assert "'t0' has 20000 rows there and 30000 in the model" in refused(*options, *longer)
    nothing = tmp_path / "none.json"
    assert "make one with `mtrains profile" in refused("plan", *DATA, *MODEL, "--ssd", ssd, *BUDGET, "--access", nothing)
    assert "make one with `mtrains calibrate" in refused("plan", *DATA, *MODEL, "--ssd", ssd, *BUDGET, "--hardware", nothing)
    assert "nothing to decide without --ddr-budget" in refused("plan", *DATA, *MODEL, "--ssd", ssd, "--pool-rows", 100, "--access", access)


def test_a_picture_of_nothing_is_refused(ssd: Path, tmp_path: Path) -> None:
    options = ["plan", *DATA, *MODEL, "--picture", tmp_path / "plan.png"]
    assert "every table is in memory" in refused(*options, "--ssd", ssd, "--ddr-budget", "1GiB")
    assert "give --ssd and --ddr-budget" in refused(*options, "--in-memory")
    assert not (tmp_path / "plan.png").exists()
