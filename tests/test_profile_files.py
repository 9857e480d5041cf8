"""Both kinds of profile in their files: whole or not at all, and refused in the same words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torchrec_mtrains.planner import AccessProfile, HardwareProfile, hardware_profiles
from torchrec_mtrains.planner.profile_files import ProfileFormat

from disk import files_of_at_most
from torchrec_mtrains.errors import ConfigurationError

HARDWARE = next(iter(hardware_profiles().values()))
ACCESS = AccessProfile({}, "a source", "2026-11-26")
PROFILES = pytest.mark.parametrize(
    ("profile", "kind", "command"),
    [(HARDWARE, "hardware profile", "mtrains calibrate"), (ACCESS, "access profile", "mtrains profile")],
    ids=("hardware", "access"),
)


@PROFILES
def test_what_is_no_profile_is_refused_with_its_kind_its_file_and_the_command_that_makes_one(
    profile: HardwareProfile | AccessProfile, kind: str, command: str, tmp_path: Path
) -> None:
    file = tmp_path / "profile.json"
    profile.save(file)
    fields = json.loads(file.read_text())
    with pytest.raises(ConfigurationError, match=f"^{kind} '{file}0': cannot be read: .*No such file.* `{command}`"):
        type(profile).load(f"{file}0")
    for text, rule in (
        ("{", "cannot be read"),
        ("[1]", "format_version must be 1 to 1, got None"),
        (json.dumps(fields | {"format_version": True}), "format_version must be 1 to 1, got True"),
        (json.dumps(fields | {"format_version": 2}), "format_version must be 1 to 1, got 2"),
        (json.dumps({"format_version": 1}), "lacks fields of format 1"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigurationError, match=f"^{kind} '{file}': {rule}.* `{command}`"):
            type(profile).load(file)


@PROFILES
def test_a_write_that_fails_leaves_the_profile_before_and_nothing_beside_it(
    profile: HardwareProfile | AccessProfile, kind: str, command: str, tmp_path: Path
) -> None:
    file = tmp_path / "profile.json"
    profile.save(file)
    written = file.read_bytes()
    with files_of_at_most(10), pytest.raises(ConfigurationError, match=f"{kind} '{file}': cannot be written: File too large; name another"):
        profile.save(file)
    assert file.read_bytes() == written
    assert list(tmp_path.iterdir()) == [file]


def test_a_field_that_cannot_be_is_named_with_its_file(tmp_path: Path) -> None:
    def read(content: dict[str, Any]) -> None:
        raise ConfigurationError(f"colour must be red, got {content['colour']}")

    files = ProfileFormat("palette", 1, "mtrains paint")
    files.save(tmp_path / "p.json", {"colour": "blue"})
    with pytest.raises(ConfigurationError, match=r"^palette '.*p.json': colour must be red, got blue$"):
        files.load(tmp_path / "p.json", read)
