"""The suite runs on io_uring wherever the kernel permits it: a fallback that nobody noticed would leave it untested."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest
from torchrec_mtrains.kernels import SsdVolume

IO_URING_SETUP = 425  # the system call's number on every architecture
PARAMETERS_BYTES = 120  # struct io_uring_params


def io_uring_is_permitted() -> bool:
    """Whether this process may open a ring: containers and sysctl kernel.io_uring_disabled can forbid it."""
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = (ctypes.c_char * PARAMETERS_BYTES)()
    fd = libc.syscall(ctypes.c_long(IO_URING_SETUP), ctypes.c_uint(1), ctypes.byref(parameters))
    if fd < 0:
        return False
    os.close(fd)
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="io_uring is Linux's")
def test_io_uring_is_used_where_the_kernel_permits_it(tmp_path: Path) -> None:
    volume = SsdVolume(paths=(str(tmp_path),), capacity_bytes=1 << 30)
    backend = volume.backend
    volume.close()
    expected = "io_uring" if io_uring_is_permitted() else "pread"
    assert backend == expected, (
        f"the kernel permits {expected}, but the SSD volume runs on {backend}: install liburing-dev (apt) or liburing-devel (dnf), "
        "then rm .venv/stamps/liburing && make setup"
    )
