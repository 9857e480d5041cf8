"""The soak, short: make soak runs the long one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).with_name("soak.py")


def soak(folder: Path, ranks: int, kills: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SOAK), "--folder", str(folder), "--ranks", str(ranks), "--kills", str(kills)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"})


@pytest.mark.parametrize(("ranks", "kills"), [(1, 24), (2, 6)])
def test_a_job_killed_at_random_instants_ends_with_the_bits_of_one_that_was_not(tmp_path, ranks, kills):
    done = soak(tmp_path, ranks, kills)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout
    assert int(re.findall(r"([\d,]+) losses compared", done.stdout)[-1].replace(",", "")) > 2 * kills  # some attempts die before a step


def test_the_soak_goes_on_where_it_was_and_sees_one_wrong_bit(tmp_path):
    assert soak(tmp_path, 1, 2).returncode == 0
    first = json.loads((tmp_path / "ranks_1" / "state.json").read_text())
    more = soak(tmp_path, 1, 3)
    assert f"seed {first['seed']}, 2 kills so far" in more.stdout
    expected = tmp_path / "ranks_1" / "undisturbed_0.json"
    run = json.loads(expected.read_text())
    run["losses"] = [float.fromhex(loss) for loss in run["losses"]]
    run["losses"] = [(loss + 2**-20).hex() for loss in run["losses"]]
    expected.write_text(json.dumps(run))
    failed = soak(tmp_path, 1, 20)
    assert failed.returncode == 1
    assert "the undisturbed run" in failed.stderr
