"""The native core's own tests: they pass, without Python and torch, and fail when the core is broken on purpose."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BINARY = ROOT / "build/native/tests/native_tests"


def test_the_native_tests_pass_in_a_binary_without_python_and_torch():
    run = subprocess.run(["make", "--no-print-directory", "native-test"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (counts,) = re.findall(r"native tests: (\d+) passed, 0 failed, (\d+) skipped", run.stdout)
    listed = subprocess.run([BINARY, "--list"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert sum(map(int, counts)) == len(listed)
    linked = subprocess.run(["ldd", BINARY], check=True, capture_output=True, text=True).stdout
    assert "libc.so" in linked
    assert not re.search("python|torch", linked)


# Of each: the file, what is changed in it, into what, and a part of the sentence of a test that must fail.
PLANTED = {
    "a checkpoint commits while others put": ("log_checkpoint.cpp", "  drain_alone(lock);", "  drain(lock);", "taken while others put"),
    "records are served unverified": (
        "log_volume.cpp",
        "  return h.table == table.id && h.row == row &&",
        "  return true || h.row == row &&",
        "flips under an open volume",
    ),
    "a manifest's checksum is not looked at": (
        "manifest.cpp",
        "if (crc != crc32c(0, bytes.data(), end))",
        "if (false)",
        "every flipped bit",
    ),
    "a batch that fails gives up its rows": (
        "log_volume.cpp",
        "  if (batch->error.empty()) {  // as in",
        "  {  // as in",
        "not given up (mapped)",
    ),
    "a put does not end when the volume closes": (
        "log_volume.cpp",
        "  require_open(closed_, name());\n  if (stream.chunk)",
        "  if (stream.chunk)",
        "closes under",
    ),
    "pinned slots are evicted": (
        "slot_directory.cpp",
        "row_of_slot_[s] >= 0 && !(*pinned)[s]",
        "row_of_slot_[s] >= 0",
        "slot directory keeps",
    ),
    "a dirty victim is not written back": (
        "slot_pool.cpp",
        "if (!rows[dirty].empty()) tables_[t].volume->evict(",
        "if (!dirty) tables_[t].volume->evict(",
        "over memory trains",
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the core's sources, so that each bug compiles one file again."""
    folder = tmp_path_factory.mktemp("native")
    shutil.copytree(ROOT / "kernels/csrc", folder / "csrc")
    configure = ["cmake", "-S", folder / "csrc", "-B", folder / "build", "-DMTRAINS_MODULE=OFF", "-DMTRAINS_TESTS=ON"]
    subprocess.run(configure, check=True, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_a_bug_planted_in_the_core_fails_a_native_test(copy: Path, bug: str):
    name, old, new, sentence = PLANTED[bug]
    source = copy / "csrc" / name
    sound = source.read_text()
    assert sound.count(old) == 1
    source.write_text(sound.replace(old, new))
    try:
        subprocess.run(["cmake", "--build", copy / "build", "--parallel"], check=True, capture_output=True)
        # A test may hang instead of failing: that is caught too.
        run = subprocess.run([copy / "build/tests/native_tests", "--rounds", "4", sentence], cwd=copy, capture_output=True, timeout=120)
        assert run.returncode != 0
        assert b" 0 passed, 0 failed" not in run.stdout
    except subprocess.TimeoutExpired:
        pass
    finally:
        source.write_text(sound)
