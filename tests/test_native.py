"""The native core's own tests: they pass, without Python and torch, and fail when the core is broken on purpose."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from time import perf_counter

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
    "a checkpoint commits while others put": (
        "log_checkpoint.cpp",
        "  drain_alone(lock);",
        "  drain(lock);",
        "while it waited for its writes",
    ),
    "an index snapshot passes over segments without a newest record": (
        "log_checkpoint.cpp",
        "  for (const auto& [number, segment] : segments_) snapshot_->covered[number] = {segment->blocks, segment->records};",
        "  for (const ManifestSegment& s : manifest.segments) snapshot_->covered[s.number] = {s.blocks, s.records};",
        "cleans while index snapshots",
    ),
    "replay believes the last record it meets": (
        "log_recovery.cpp",
        "    if (h.sequence < newest) continue;\n",
        "",
        "written over many times",
    ),
    "records are served unverified": (
        "log_table.cpp",
        "  return h.table == id && h.row == row &&",
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
        "log_rows.cpp",
        "  if (batch->error.empty()) {  // as in",
        "  {  // as in",
        "not given up (mapped)",
    ),
    "a put does not end when the volume closes": (
        "log_writer.cpp",
        "  require_open(closed_, volume_);\n  if (stream.chunk)",
        "  if (stream.chunk)",
        "waits for buffers",
    ),
    "pinned slots are evicted": (
        "slot_directory.cpp",
        "row_of_slot_[s] >= 0 && !(*pinned)[s]",
        "row_of_slot_[s] >= 0",
        "slot directory keeps",
    ),
    "a dirty victim is not written back": (
        "slot_pool_fills.cpp",
        "if (!rows[dirty].empty()) t.volume->evict(",
        "if (!dirty) t.volume->evict(",
        "over memory trains",
    ),
}


class Copy:
    """A copy of the core's sources and its build: each bug compiles one file again."""

    def __init__(self, folder: Path) -> None:
        self.sources, self.build = folder / "csrc", folder / "build"
        shutil.copytree(ROOT / "kernels/csrc", self.sources)
        # A make above this one must not say what is made here, or how.
        self._environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        self._run("cmake", "-S", self.sources, "-B", self.build, "-DMTRAINS_MODULE=OFF", "-DMTRAINS_TESTS=ON")
        self.make()
        self.sound = self.binary.read_bytes()

    @property
    def binary(self) -> Path:
        return self.build / "tests/native_tests"

    def _run(self, *command: str | Path) -> None:
        run = subprocess.run(command, capture_output=True, text=True, env=self._environment)
        assert run.returncode == 0, run.stdout + run.stderr

    def make(self) -> None:
        self._run("cmake", "--build", self.build, "--parallel", str(os.cpu_count()))

    def write(self, name: str, text: str) -> None:
        """What is made from the file goes: times of files, which a clock that jumps makes wrong, decide nothing."""
        (self.sources / name).write_text(text)
        for made in (f"{name}.o", "libmtrains_native.a", "native_tests"):
            for path in self.build.rglob(made):
                path.unlink()

    def test(self, sentence: str, limit_s: float) -> subprocess.CompletedProcess[str]:
        command = [self.binary, "--rounds", "4", sentence]
        return subprocess.run(command, cwd=self.build, capture_output=True, text=True, timeout=limit_s)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return Copy(tmp_path_factory.mktemp("native"))


@pytest.mark.parametrize("bug", PLANTED)
def test_a_bug_planted_in_the_core_still_has_its_place_in_the_sources(bug: str):
    name, old, *_ = PLANTED[bug]
    assert (ROOT / "kernels/csrc" / name).read_text().count(old) == 1


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_a_bug_planted_in_the_core_fails_a_native_test(copy: Copy, bug: str):
    name, old, new, sentence = PLANTED[bug]
    sound = (copy.sources / name).read_text()
    copy.write(name, sound)
    copy.make()
    assert copy.binary.read_bytes() == copy.sound
    start = perf_counter()
    assert copy.test(sentence, limit_s=1200).returncode == 0
    hangs_after_s = 60 + 10 * (perf_counter() - start)  # what else runs on the machine has its part in both
    copy.write(name, sound.replace(old, new))
    try:
        copy.make()
        assert copy.binary.read_bytes() != copy.sound
        run = copy.test(sentence, hangs_after_s)
        print(run.stdout)
        assert run.returncode < 0 or (run.returncode == 1 and re.search(r"[1-9]\d* failed", run.stdout))
    except subprocess.TimeoutExpired:  # a hang is caught too, and so is a crash
        pass
    finally:
        copy.write(name, sound)
