"""docs/torchrec.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NAMED = sorted(set(re.findall(r"`(test_\w+\.py[^` ]*)`", (TESTS.parent / "docs" / "torchrec.md").read_text())))
INHERITED = {"test_optimizer_load_state_dict"}  # TorchRec's


@pytest.mark.parametrize("named", NAMED)
def test_a_test_that_the_support_matrix_names_is_there(named: str) -> None:
    file, *names = named.split("::")
    source = (TESTS / file).read_text()
    for name in (n for n in names if n != "…" and n not in INHERITED):
        assert re.search(rf"^\s*(def|class) {name}\b", source, re.MULTILINE), name
