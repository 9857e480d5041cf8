"""The wheel: built, looked into, installed into an environment of its own, and used there with no compiler and no liburing."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from test_io_backend import io_uring_is_permitted

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
# In the build folder of make setup, so that only what changed is compiled again.
BUILD = ["--no-build-isolation", "--no-deps"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([*PIP, "wheel", *BUILD, "--wheel-dir", str(folder), "."], cwd=ROOT, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and a path to what it depends on; path entries of a .pth file bring no .pth files
    along, so the editable install stays out."""
    folder = tmp_path_factory.mktemp("user") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run([*PIP, f"--python={folder / 'bin' / 'python'}", "install", "--no-deps", "--no-index", str(wheel)], check=True)
    return folder


def test_the_wheel_has_one_import_name_and_nothing_else(wheel: Path) -> None:
    check = str(Path(sys.executable).parent / "check-wheel-contents")
    subprocess.run([check, "--toplevel", "torchrec_mtrains", str(wheel)], check=True)
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"torchrec_mtrains"}
    for part in ("py.typed", "kernels/__init__.py", "planner/__init__.py"):
        assert f"torchrec_mtrains/{part}" in names
    assert not [name for name in names if name.endswith((".cpp", ".h", ".txt")) and "dist-info" not in name]


def test_the_native_core_loads_no_liburing(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (core,) = [name for name in archive.namelist() if name.endswith(".so")]
        binary = archive.read(core)
    assert binary[:4] == b"\x7fELF"
    assert b"libc.so" in binary, "the names of libraries to load are in the binary as they are"
    assert b"liburing.so" not in binary


def test_the_wheel_works_where_there_is_no_compiler(environment: Path, tmp_path: Path) -> None:
    user = [str(environment / "bin" / "python"), "-P" if sys.version_info >= (3, 11) else "-s", str(ROOT / "tests" / "wheel_user.py")]
    run = subprocess.run([*user, str(tmp_path)], cwd=tmp_path, env={"PATH": "/nowhere"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    place, backend, misses = run.stdout.splitlines()[-1].split()
    assert Path(place).is_relative_to(environment)
    assert backend == ("io_uring" if io_uring_is_permitted() else "pread")
    assert int(misses) > 0


def test_the_command_line_comes_with_the_wheel(environment: Path, tmp_path: Path) -> None:
    run = subprocess.run([str(environment / "bin" / "mtrains"), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "plan" in run.stdout
    assert "train" in run.stdout
