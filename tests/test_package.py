"""What is installed: one import name, typed, with one entry point, and a planner that needs no native core."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import torchrec_mtrains

ROOT = Path(__file__).parent.parent
DISTRIBUTION = "torchrec-mtrains"


def test_one_import_name_is_installed() -> None:
    files = metadata.files(DISTRIBUTION) or []
    names = {file.parts[0] for file in files if not file.parts[0].endswith(".dist-info")}
    # An editable install brings an import hook of its own, and scripts lie outside.
    assert {name for name in names if not name.startswith(("_editable", "__pycache__", ".."))} == {"torchrec_mtrains"}


@pytest.mark.parametrize("name", ["kernels", "planner"])
def test_a_folder_of_the_checkout_is_no_package_of_its_own(name: str) -> None:
    run = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "ImportError: attempted relative import beyond top-level package" in run.stderr


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(torchrec_mtrains.__file__).parent / "py.typed").is_file()


def test_versions_agree() -> None:
    assert torchrec_mtrains.__version__ == metadata.version(DISTRIBUTION)


def test_the_command_line_has_one_entry_point() -> None:
    (script,) = metadata.distribution(DISTRIBUTION).entry_points.select(group="console_scripts")
    assert script.name == "mtrains"
    assert callable(script.load())


def test_the_vocabulary_needs_neither_torchrec_nor_the_native_core() -> None:
    program = """
import sys
for name in ("torch", "torchrec", "fbgemm_gpu", "torchrec_mtrains.kernels"):
    sys.modules[name] = None
import torchrec_mtrains
torchrec_mtrains.TierChain(pool_rows=1, tiers=(torchrec_mtrains.SsdHome(("/nowhere",), 1),))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_public_name_can_be_had() -> None:
    for name in torchrec_mtrains.__all__:
        assert getattr(torchrec_mtrains, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = torchrec_mtrains.no_such_name


def test_no_public_name_is_that_of_the_module_it_comes_from() -> None:
    """Importing that module would put it in the name's place."""
    import torchrec_mtrains

    assert not [name for name, module in torchrec_mtrains._MODULE_OF.items() if module == f".{name}"]
