"""Getting ml-100k: RecBole's wheel carries it, and pip brings the wheel. Nothing is installed, nothing else is kept."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..errors import DataError

REQUIREMENT = "recbole==1.2.1"
MEMBER = "recbole/dataset_example/ml-100k/ml-100k.inter"
SHA256 = "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"
TIMEOUT_S = 120  # guess: 2 MB over a slow line


def fetch_ml_100k(cache: str | Path) -> Path:
    """The file ``ml-100k.inter`` in the folder ``cache``, downloaded if it is not there yet.

    Raises: DataError when pip cannot get the wheel, or the file in it is not the one that is known.
    """
    target = Path(cache) / "ml-100k.inter"
    if target.is_file() and _digest(target.read_bytes()) == SHA256:
        return target
    with tempfile.TemporaryDirectory() as folder:
        data = _member(_download(folder))
    if _digest(data) != SHA256:
        raise DataError(f"{MEMBER} in {REQUIREMENT} is not the file that this version knows (sha256 {_digest(data)}, expected {SHA256})")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(".part")
    aside.write_bytes(data)
    aside.rename(target)
    return target


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _download(folder: str) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--dest",
        folder,
        REQUIREMENT,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise DataError(f"pip could not get {REQUIREMENT}, which carries ml-100k: {e}") from e
    wheels = sorted(Path(folder).glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = done.stderr.strip().splitlines()
        raise DataError(f"pip could not get {REQUIREMENT}, which carries ml-100k: {reason[-1] if reason else 'it downloaded no wheel'}")
    return wheels[0]


def _member(wheel: Path) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(MEMBER)
    except (KeyError, zipfile.BadZipFile) as e:
        raise DataError(f"{wheel.name} does not hold {MEMBER}: {e}") from e
