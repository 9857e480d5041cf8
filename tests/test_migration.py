"""A checkpoint of FUSED tables, larger than the memory allowed, becomes a checkpoint of tiered ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TABLES, ROWS, DIM = 8, 250_000, 64
ALLOWED_BYTES = 200 << 20  # the tables have 488 MiB

COMMON = """
import os, resource, sys
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
sys.path.insert(0, {tests!r})
from dmp_twins import Job, Table, batch, in_order, sharded
from torchrec_mtrains import SsdHome
torch.set_num_threads(1)
os.environ["LOCAL_WORLD_SIZE"] = "1"
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
job = Job([Table({rows}, {dim}, [f"f{{i}}"], pool_rows=1000) for i in range({tables})], batch_size=64)

def state(dmp):
    return {{"model": dmp.state_dict(), "optimizer": dmp.fused_optimizer.state_dict()}}

def sums(dmp):
    tensors = dict(dmp.state_dict())
    for states in dmp.fused_optimizer.state_dict()["state"].values():
        tensors |= states
    for key in sorted(tensors):
        shards = [s.tensor for s in tensors[key].local_shards()]
        pieces = (t[first : first + 8192].cpu() for t in shards for first in range(0, len(t), 8192))
        print(key, sum(int(piece.view(torch.int32).sum(dtype=torch.int64)) for piece in pieces))
"""

SAVE = """
dmp = sharded(job, False)
generator = torch.Generator().manual_seed(1)
for _ in range(3):
    in_order(dmp(batch(job, generator))).sum().backward()
dcp.save(state(dmp), checkpoint_id={folder!r} + "/fused")
sums(dmp)
"""

LOAD = """
dmp = sharded(job, True, SsdHome(paths=({folder!r},), capacity_bytes=4 << 30))
dcp.save({{"warm": torch.zeros(4)}}, checkpoint_id={folder!r} + "/warm")
with open("/proc/self/status") as status:
    held = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held + {allowed}, held + {allowed}))
try:
    torch.empty({tables} * {rows} * {dim})
except RuntimeError:
    pass
else:
    sys.exit("the tables fit into the memory allowed")
loaded = state(dmp)
dcp.load(loaded, checkpoint_id={folder!r} + "/fused")
dmp.load_state_dict(loaded["model"])
dmp.fused_optimizer.load_state_dict(loaded["optimizer"])
sums(dmp)
"""


def run(code: str, folder: Path) -> list[str]:
    code = (COMMON + code).format(
        tests=str(Path(__file__).parent), folder=str(folder), tables=TABLES, rows=ROWS, dim=DIM, allowed=ALLOWED_BYTES
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-2 * TABLES :]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux alone")
def test_a_fused_checkpoint_larger_than_the_memory_allowed_loads_into_tiers(tmp_path: Path) -> None:
    assert TABLES * ROWS * DIM * 4 > ALLOWED_BYTES
    saved = run(SAVE, tmp_path)
    assert len({line.split()[1] for line in saved}) == 2 * TABLES  # all different: real values
    assert run(LOAD, tmp_path) == saved
