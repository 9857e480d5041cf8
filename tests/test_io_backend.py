"""The suite runs on io_uring wherever the kernel permits it: a fallback that nobody noticed would leave it untested."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
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


def thread_names() -> list[str]:
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


@pytest.mark.skipif(sys.platform != "linux", reason="names are read from /proc")
@pytest.mark.parametrize("backend", ["io_uring", "pread"])
def test_native_threads_have_names(tmp_path: Path, backend: str) -> None:
    if backend == "io_uring" and not io_uring_is_permitted():
        pytest.skip("the kernel forbids io_uring")
    before = thread_names()
    volume = SsdVolume((str(tmp_path),), 64 << 20, backend=backend, depth=4)
    expected = {"mtrains-io": 1, "mtrains-clean": 1, "mtrains-pread": 0 if backend == "io_uring" else 4}
    deadline, named = time.monotonic() + 30, {}
    while named != expected and time.monotonic() < deadline:  # threads name themselves once they run
        during = thread_names()
        named = {name: during.count(name) - before.count(name) for name in expected}
    volume.close()
    assert named == expected


NOBODY = 65534
needs_io_uring = pytest.mark.skipif(not io_uring_is_permitted(), reason="the kernel forbids io_uring")


def registered_bytes_after_use(folder: str) -> int:
    """Writes small and large records, reads them back from the device, and says how much the kernel had registered."""
    volume = SsdVolume((folder,), 64 << 20, depth=16)
    small = volume.table("small", row_count=500, record_bytes=260)
    large = volume.table("large", row_count=40, record_bytes=40_000)  # longer than a registered buffer
    for table in (small, large):
        rows = np.arange(table.row_count)
        put = np.random.default_rng(1).integers(0, 256, (table.row_count, table.record_bytes), dtype=np.uint8)
        table.put(rows, put)
        volume.flush()
        for ids in (rows, rows[::-7].copy(), np.random.default_rng(2).permutation(rows)):
            out = np.empty((len(ids), table.record_bytes), np.uint8)
            table.get(ids, out)
            assert np.array_equal(out, put[ids])
    stats = volume.stats()
    assert stats["read_ios"] >= 3 * 40
    volume.close()
    return stats["registered_buffer_bytes"]


@needs_io_uring
def test_read_buffers_are_registered_and_longer_reads_work_beside_them(tmp_path: Path) -> None:
    assert registered_bytes_after_use(str(tmp_path)) == 16 * 8192


@needs_io_uring
def test_a_process_that_may_not_pin_memory_reads_without_and_says_so(tmp_path: Path) -> None:
    """In a child without privileges, which the limit binds."""
    tmp_path.chmod(0o777)
    np.random.default_rng(1)  # what it imports late, the child may not be able to read
    child = os.fork()
    if child == 0:
        try:
            os.chdir(tmp_path)  # the folders above it may be closed to others
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (128 << 10, 128 << 10))  # a ring, and not its buffers
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                assert registered_bytes_after_use(".") == 0
                assert registered_bytes_after_use(".") == 0
            texts = [str(w.message) for w in said if "registered buffers" in str(w.message)]
            assert len(texts) == 1, texts  # said once
            assert "RLIMIT_MEMLOCK" in texts[0]
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
