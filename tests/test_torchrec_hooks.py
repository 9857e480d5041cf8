"""A TorchRec without one of the hooks that tiered tables stand on is refused, by name."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

from torchrec_mtrains.errors import UnsupportedError
from torchrec_mtrains.torchrec_hooks import HOOKS, check_hooks

OLD = """
import torchrec.distributed.planner.estimator as came_with_1_6
del came_with_1_6.EmbeddingPerfEstimatorFactory
import torchrec_mtrains
torchrec_mtrains.TierChain, torchrec_mtrains.uniform_init_fn
for needs in ("planner", "sharders", "TieredParameterSharding", "register"):
    try:
        getattr(torchrec_mtrains, needs)
    except torchrec_mtrains.errors.UnsupportedError as error:
        print(needs, error)
"""


def rule(module: str, name: str) -> str:
    return f"has no torchrec.distributed.{module}.{name}, which tiered tables need; use a release from 1.6.1 to 1.9.2"


def test_importing_on_an_old_release_names_the_hook_and_the_releases_that_have_it() -> None:
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", OLD], capture_output=True, text=True, check=True, timeout=300)
    said = ran.stdout.splitlines()
    assert [line.split()[0] for line in said] == ["planner", "sharders", "TieredParameterSharding", "register"]
    assert all(rule("planner.estimator", "EmbeddingPerfEstimatorFactory") in line for line in said)


@pytest.mark.parametrize(("module", "name"), [h for h in HOOKS if "CUSTOMIZED_KERNEL" not in h[1]])
def test_every_hook_that_is_missing_is_noticed(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_hooks()
    owner = import_module(f"torchrec.distributed.{module}")
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    for where in getattr(owner, "__mro__", [owner]):
        if last in vars(where):
            monkeypatch.delattr(where, last)
    with pytest.raises(UnsupportedError, match=rule(module, name)):
        check_hooks()
