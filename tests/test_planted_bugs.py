"""Bugs planted on purpose in a copy of the sources are each caught by the suite.

Each bug is a textual change that must still match, so that this list cannot rot. The copy is built into a folder of its
own and a part of the suite runs against that folder; the bug counts as caught when a test fails.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUITE = ("tests/test_equality_kernel.py", "tests/test_tickets.py")
STORES = ("tests/test_stores.py",)

# The editable install's import hook would find the true sources first.
RUN_PYTEST = (
    "import sys; sys.meta_path = [f for f in sys.meta_path if 'Redirecting' not in type(f).__name__];"
    "sys.path.insert(0, sys.argv[1]); import pytest, torchrec_mtrains;"
    "assert torchrec_mtrains.__file__.startswith(sys.argv[1]), torchrec_mtrains.__file__;"
    "sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', '--hypothesis-profile=default', *sys.argv[2:]]))"
)


@dataclass
class Bug:
    """One change of one file: every (old, new) pair must match exactly once."""

    path: str
    changes: tuple[tuple[str, str], ...]
    suite: tuple[str, ...] = SUITE


BUGS = {
    "none": Bug("kernels/csrc/slot_pool.cpp", ()),
    "one write-back is skipped": Bug(
        "kernels/csrc/slot_pool_fills.cpp",
        (
            (
                "    if (d.row_of_slot(slot) < 0) continue;\n    rows[d.dirty(slot)]",
                "    if (d.row_of_slot(slot) < 0) continue;\n"
                "    if (d.dirty(slot) && stats_[table].write_backs++ == 0) continue;\n"
                "    rows[d.dirty(slot)]",
            ),
        ),
    ),
    "a hard-pinned row is evicted": Bug(
        "kernels/csrc/slot_pool.cpp",
        (("return static_cast<uint32_t>(seq - base_);", "(void)seq;"),),
    ),
    "one eviction loses its optimizer state": Bug(
        "kernels/csrc/slot_pool_fills.cpp",
        (
            (
                "  for (const bool dirty : {false, true}) {\n    if (!rows[dirty].empty())",
                "  if (!rows[true].empty() && stats_[table].write_backs == 0 && t.parts.size() > 1) {\n"
                "    const Part& state = t.parts[1];\n"
                "    std::fill_n(state.base + static_cast<uint64_t>(slots[true][0]) * state.stride_bytes, state.bytes, std::byte{0});\n"
                "  }\n"
                "  for (const bool dirty : {false, true}) {\n    if (!rows[dirty].empty())",
            ),
        ),
    ),
    "pins are released before backward": Bug(
        "kernels/tiered_tbe.py",
        (("        if output.grad_fn is None:\n            self._pool.release", "        if True:\n            self._pool.release"),),
    ),
    "a put leaves older copies in the caches": Bug(
        "kernels/csrc/cached_volume.cpp",
        (("    for (const int64_t row : rows) cache.drop_row(row);\n  }\n}", "  }\n}"),),
        STORES,
    ),
    "caches outlive going back": Bug(
        "kernels/csrc/cached_volume.cpp", (("  below_.restore(epoch);\n  forget();", "  below_.restore(epoch);"),), STORES
    ),
}


def with_bug(bug: Bug) -> str:
    """The changed file."""
    text = (ROOT / bug.path).read_text()
    for old, new in bug.changes:
        assert text.count(old) == 1, f"{bug.path} no longer has exactly one {old!r}: update this list"
        text = text.replace(old, new)
    return text


def build(bug: Bug, folder: Path) -> None:
    """The sources with the bug, installed into `folder`/installed."""
    for part in ("torchrec_mtrains", "kernels", "planner", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, folder / part)
    (folder / bug.path).write_text(with_bug(bug))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target", "installed", "."]
    subprocess.run(command, cwd=folder, check=True)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_still_has_its_place_in_the_sources(name: str) -> None:
    assert (with_bug(BUGS[name]) == (ROOT / BUGS[name].path).read_text()) == (name == "none")


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught_by_the_suite(name: str, tmp_path: Path) -> None:
    build(BUGS[name], tmp_path)
    command = [sys.executable, "-c", RUN_PYTEST, str(tmp_path / "installed"), *BUGS[name].suite]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    print(run.stdout[-3000:], run.stderr[-3000:])
    assert run.returncode == (0 if name == "none" else 1)
