"""What volumes take on disk, beside a cleaner that removes files meanwhile; and a disk that is full."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path


def allocated_bytes(folders: Iterable[str]) -> int:
    """Of all files of the folders, by the file system's count."""
    total = 0
    for file in (f for folder in folders for f in Path(folder).iterdir()):
        with contextlib.suppress(FileNotFoundError):  # the cleaner removed it
            total += file.stat().st_blocks * 512
    return total


@contextlib.contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """The kernel refuses to write more, as a full disk does."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
