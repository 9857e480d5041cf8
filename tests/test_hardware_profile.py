"""Hardware profiles: files, refusals, and what holds between measured points whatever noise they have."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchrec_mtrains.planner import BlockDeviceProfile, DevicePoint, HardwareProfile, LinkProfile, MemoryProfile, hardware_profiles

from torchrec_mtrains.errors import ConfigurationError

EVERY_TIER = dataclasses.replace(
    hardware_profiles()["optane"],
    hbm=MemoryProfile("HBM", 3e12, 2.5e12, ((64, 4e9), (512, 3e9))),
    pcie=LinkProfile("PCIe", 50e9, 49e9, 80e9),
)

rates = st.floats(1.0, 1e9)
points = st.builds(
    DevicePoint,
    block_bytes=st.sampled_from([512, 4096, 16384, 65536]),
    queue_depth=st.sampled_from([1, 2, 8, 64, 256]),
    read_share=st.sampled_from([0.0, 0.5, 0.7, 1.0]),
    operations_per_s=rates,
)
devices = st.lists(points, min_size=1, max_size=24, unique_by=lambda p: (p.block_bytes, p.queue_depth, p.read_share)).map(
    lambda of: BlockDeviceProfile("d", tuple(of))
)
blocks, depths, shares = st.floats(1, 1e6), st.floats(0.5, 1000), st.floats(0, 1)
ABOUT = 1 + 1e-9


@pytest.mark.parametrize("profile", [*hardware_profiles().values(), EVERY_TIER], ids=lambda p: p.machine)
def test_a_profile_comes_back_from_its_file(profile: HardwareProfile, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    profile.save(file)
    assert HardwareProfile.load(file) == profile
    assert list(tmp_path.iterdir()) == [file]


def spoilt(tmp_path: Path, change: dict[str, Any], gone: str | None = None) -> Path:
    file = tmp_path / "profile.json"
    EVERY_TIER.save(file)
    fields = json.loads(file.read_text()) | change
    fields.pop(gone, None)
    file.write_text(json.dumps(fields))
    return file


@pytest.mark.parametrize(
    ("change", "gone", "said"),
    [
        ({"format_version": 2}, None, "format_version must be 1 to 1, got 2"),
        ({"format_version": "1"}, None, "format_version"),
        ({}, "format_version", "got None"),
        ({}, "kernel", "kernel"),
        ({}, "ddr", "ddr"),
        ({"colour": 1}, None, "colour"),
        ({"cores": 0}, None, "cores must be a finite number > 0, got 0"),
        ({"ssd": {"name": "d", "points": []}}, None, "at least one point"),
        ({"ssd": 3}, None, "lacks fields"),
        ({"pcie": {"name": "p", "h2d_bytes_per_s": float("nan"), "d2h_bytes_per_s": 1, "both_bytes_per_s": 1}}, None, "h2d_bytes_per_s"),
    ],
)
def test_what_is_no_profile_of_this_version_is_refused(change: dict[str, Any], gone: str | None, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=said):
        HardwareProfile.load(spoilt(tmp_path, change, gone))


def test_a_file_that_is_missing_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="mtrains calibrate"):
        HardwareProfile.load(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("words")
    with pytest.raises(ConfigurationError, match="mtrains calibrate"):
        HardwareProfile.load(tmp_path / "text.json")
    with pytest.raises(ConfigurationError, match="name another file"):
        EVERY_TIER.save(tmp_path / "no folder" / "profile.json")


@given(devices, blocks, shares, depths, depths)
def test_deeper_queues_never_do_less(device: BlockDeviceProfile, block: float, share: float, one: float, other: float) -> None:
    shallow, deep = sorted((one, other))
    assert 0 < device.operations_per_s(block, shallow, share) <= device.operations_per_s(block, deep, share) * ABOUT


@given(devices, depths, shares, blocks, blocks)
def test_larger_blocks_never_do_more_operations(device: BlockDeviceProfile, depth: float, share: float, one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert device.operations_per_s(large, depth, share) <= device.operations_per_s(small, depth, share) * ABOUT


@given(devices, blocks, depths, shares)
def test_a_mix_is_between_its_reads_and_writes_where_only_they_were_measured(
    device: BlockDeviceProfile, block: float, depth: float, share: float
) -> None:
    pure = [p for p in device.points if p.read_share in (0, 1)]
    if not pure:
        return
    device = BlockDeviceProfile("d", tuple(pure))
    ends = [device.operations_per_s(block, depth, end) for end in (0.0, 1.0)]
    assert min(ends) / ABOUT <= device.operations_per_s(block, depth, share) <= max(ends) * ABOUT


@given(st.lists(points, min_size=1, max_size=1))
def test_a_point_is_what_was_measured(of: list[DevicePoint]) -> None:
    (point,) = of
    device = BlockDeviceProfile("d", (point,))
    assert math.isclose(device.operations_per_s(point.block_bytes, point.queue_depth, point.read_share), point.operations_per_s)
    assert math.isclose(device.bytes_per_s(point.block_bytes, point.queue_depth), point.block_bytes * point.operations_per_s)


@given(st.lists(st.tuples(st.integers(1, 4096), rates), min_size=1, max_size=6, unique_by=lambda p: p[0]), blocks, blocks)
def test_longer_rows_never_come_faster(measured: list[tuple[int, float]], one: float, other: float) -> None:
    memory = MemoryProfile("m", 1e9, 1e9, tuple(measured))
    short, long = sorted((one, other))
    assert memory.random_rows_per_s(long) <= memory.random_rows_per_s(short) * ABOUT


def test_published_devices_reach_their_rates_where_their_latency_allows_it() -> None:
    ssd = hardware_profiles()["nvme-gen4"].ssd
    assert ssd is not None
    assert math.isclose(ssd.operations_per_s(4096, 1), 1e6 / 85)
    assert math.isclose(ssd.operations_per_s(4096, 128), 900e3)
    assert math.isclose(ssd.bytes_per_s(256 << 10, 128, 0.0), 3.5e9)


def test_every_built_in_constant_has_a_source() -> None:
    for profile in hardware_profiles().values():
        assert profile.source
        parts = (profile.ddr, profile.kernel, profile.hbm, profile.pcie, profile.pmem, profile.ssd)
        assert all(part.source for part in parts if part is not None)
