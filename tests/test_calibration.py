"""``mtrains calibrate``: every part is measured where there is something to measure, and nothing is guessed where there is not."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torchrec_mtrains.kernels import _core
from torchrec_mtrains.planner import BlockDeviceProfile, DevicePoint, HardwareProfile, hardware_profiles

import torchrec_mtrains as mtrains
from torchrec_mtrains.calibrate_command import warnings
from torchrec_mtrains.calibration import QUICK, calibrate
from torchrec_mtrains.calibration.block_device import POINTS, write_noise
from torchrec_mtrains.calibration.settling import until_settled
from torchrec_mtrains.cli import main
from torchrec_mtrains.errors import ConfigurationError, MTrainsError

MAY_BE_0 = {"read_share", "cpu_ns_per_miss", "cpu_ns_per_io", "cpu_ns_per_write_back", "cpu_ns_per_cache_hit"}
"""Costs that are differences of two measurements, and lines through few points."""


def numbers(of: Any, name: str = "") -> list[tuple[str, float]]:
    """Every number of a profile under the name of its field."""
    if dataclasses.is_dataclass(of):
        return [found for f in dataclasses.fields(of) for found in numbers(getattr(of, f.name), f.name)]
    if isinstance(of, tuple):
        return [found for each in of for found in numbers(each, name)]
    return [(name, of)] if isinstance(of, int | float) else []


def folders(tmp_path: Path) -> tuple[str, str, str]:
    paths = [tmp_path / name for name in ("ssd0", "ssd1", "pmem")]
    for path in paths:
        path.mkdir()
    return str(paths[0]), str(paths[1]), str(paths[2])


def test_memory_has_rates_on_a_machine_too_busy_to_start_a_thread_in_time() -> None:
    probe = _core.probe_memory("", 1 << 20, 4, (64,), 1e-9, seed=0)
    assert min(probe.read_bytes_per_s, probe.write_bytes_per_s, *probe.rows_per_s, probe.latency_ns) > 0


def test_every_tier_with_a_path_is_measured_and_nothing_stays(tmp_path: Path) -> None:
    first, second, pmem = folders(tmp_path)
    said: list[str] = []
    profile = calibrate((first, second), pmem, effort=QUICK, say=said.append)
    assert profile.ssd is not None
    assert {(p.block_bytes, p.queue_depth, p.read_share) for p in profile.ssd.points} == set(POINTS)
    assert profile.pmem is not None
    found = numbers(profile)
    assert len(found) > 100
    for name, value in found:
        assert math.isfinite(value), name
        assert value > 0 or (value == 0 and (name in MAY_BE_0 or name.startswith(("tbe_", "step_overhead_us_per_")))), name
    assert (profile.hbm is not None) == (profile.pcie is not None) == torch.cuda.is_available()
    assert said
    assert all(not list(Path(path).iterdir()) for path in (first, second, pmem))
    profile.save(tmp_path / "profile.json")
    assert HardwareProfile.load(tmp_path / "profile.json") == profile


def test_a_tier_without_a_path_is_absent() -> None:
    profile = mtrains.calibrate(effort=QUICK)
    assert profile.ssd is None
    assert profile.pmem is None
    kernel = profile.kernel
    assert kernel.cpu_ns_per_io is kernel.cpu_ns_per_write_back is kernel.cpu_ns_per_cache_hit is None


def test_the_command_writes_a_profile_and_shows_it(tmp_path: Path) -> None:
    path, _, pmem = folders(tmp_path)
    file = tmp_path / "hardware.json"
    result = CliRunner().invoke(main, ["calibrate", "--quick", "--path", path, "--pmem-path", pmem, "-o", str(file)])
    assert result.exit_code == 0, result.output
    profile = HardwareProfile.load(file)
    assert profile.ssd is not None
    for shown in (path, pmem, profile.date, f"{profile.ssd.points[0].operations_per_s:,.0f}", "a row written back to the SSD"):
        assert shown in result.output


def test_a_device_is_probed_until_its_last_probes_agree() -> None:
    rates = [100.0, 80.0, 60.0, 50.0, 48.0, 49.0, 10.0]
    assert until_settled(lambda number: rates[number]) == rates[:6]
    assert len(until_settled(lambda number: 2.0**number, most=7)) == 7


def test_a_device_that_had_not_settled_is_named() -> None:
    def profile(*spans: tuple[float, float] | None) -> HardwareProfile:
        points = tuple(DevicePoint(4096 << i, 128, 1.0, 100.0, operations_per_s_least_most=span) for i, span in enumerate(spans))
        return dataclasses.replace(hardware_profiles()["optane"], ssd=BlockDeviceProfile("/mnt/nvme0", points))

    assert warnings(profile(None, (90.0, 110.0))) == []
    (said,) = warnings(profile((90.0, 110.0), (60.0, 120.0)))
    assert "/mnt/nvme0 has not settled" in said
    assert "8 KiB at depth 128: 60 to 120" in said
    with pytest.raises(ConfigurationError, match="least_most"):
        profile((101.0, 110.0))


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    with pytest.raises(ConfigurationError, match="--path"):
        calibrate((missing,), effort=QUICK)
    with pytest.raises(MTrainsError, match="none"):
        calibrate((), missing, effort=QUICK)
    result = CliRunner().invoke(main, ["calibrate", "--quick", "--path", missing])
    assert result.exit_code == 2
    assert "none" in result.output


def test_a_probe_overwrites_only_when_it_writes(tmp_path: Path) -> None:
    file = tmp_path / "noise"
    write_noise(file, 1 << 20)
    before = file.read_bytes()
    probe = _core.random_io([str(file)], 4096, 4, 1.0, 0.01)
    assert file.read_bytes() == before
    assert probe.operations >= 4
    assert 0 < probe.latency_us_p50 <= probe.latency_us_p99
    _core.random_io([str(file)], 4096, 4, 0.0, 0.05)
    assert file.read_bytes() != before
    assert file.stat().st_size == len(before)


def test_a_probe_works_on_all_its_files_and_on_no_hole_of_them(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("small", "large", "hollow")]
    for file, size in zip(files, (1 << 20, 3 << 20, 2 << 20), strict=True):
        write_noise(file, size)
    before = [file.read_bytes() for file in files]
    with files[2].open("r+b") as hollow:
        hollow.truncate(1 << 20)
        hollow.truncate(64 << 20)  # beyond the first MiB a hole
    _core.random_io([str(file) for file in files], 4096, 16, 0.0, 0.2)
    for file, was in zip(files, before, strict=True):
        assert file.read_bytes()[: 1 << 20] != was[: 1 << 20]
    assert not any(files[2].read_bytes()[1 << 20 :])


@pytest.mark.parametrize(("block", "depth", "share"), [(4095, 1, 1.0), (8192 << 10, 1, 1.0), (4096, 0, 1.0), (4096, 1, 1.1), (0, 1, 1.0)])
def test_a_probe_refuses_what_it_cannot_measure(block: int, depth: int, share: float, tmp_path: Path) -> None:
    file = tmp_path / "noise"
    write_noise(file, 1 << 20)
    with pytest.raises(ConfigurationError, match="random_io needs"):
        _core.random_io([str(file)], block, depth, share, 0.01)


@pytest.mark.parametrize(
    ("threads", "bytes_", "rows", "seconds"),
    [(0, 1 << 20, [64], 0.01), (2, 100, [64], 0.01), (1, 1 << 20, [0], 0.01), (1, 1 << 20, [64], 0)],
)
def test_a_memory_probe_refuses_what_it_cannot_measure(threads: int, bytes_: int, rows: list[int], seconds: float) -> None:
    with pytest.raises(ConfigurationError, match="probe_memory needs"):
        _core.probe_memory("", bytes_, threads, rows, seconds)
