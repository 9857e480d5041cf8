"""What a user of the wheel does, in an environment that has the wheel and its dependencies alone. Argument: an empty folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mtrains as mtrains

ROWS, DIM, STEPS, BATCH = 5000, 8, 20, 16


def records_come_back(volume: mtrains.kernels.SsdVolume | mtrains.kernels.MemoryVolume) -> None:
    table = volume.table("t0", row_count=100, record_bytes=36)
    ids = torch.tensor([3, 99, 0])
    records = torch.randint(0, 256, (3, 36), dtype=torch.uint8)
    table.put(ids, records)
    volume.flush()
    out = torch.empty((4, 36), dtype=torch.uint8)
    table.get(torch.tensor([0, 3, 99, 50]), out)
    assert torch.equal(out, torch.cat([records[[2, 0, 1]], torch.zeros(1, 36, dtype=torch.uint8)]))
    volume.close()


def train(ssd: Path) -> int:
    """Trains a tiered table by row-wise Adagrad; returns the rows that its pool did not have."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tables = [EmbeddingBagConfig(name="t0", feature_names=["f0"], num_embeddings=ROWS, embedding_dim=DIM)]
    model = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    sharders = mtrains.sharders(fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1})
    home = mtrains.SsdHome(paths=(str(ssd),), capacity_bytes=1 << 30)
    topology = mtrains.planner.TieredTopology(1, ddr_budget_bytes=110_000, ssd=home)
    plan = mtrains.planner.TieredShardingPlanner(topology, batch_size=BATCH).plan(model, sharders)
    dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    for _ in range(STEPS):
        ids = torch.randint(0, ROWS, (BATCH,))
        dmp(KeyedJaggedTensor(keys=["f0"], values=ids, lengths=torch.ones(BATCH, dtype=torch.int32))).values().sum().backward()
    (group,) = mtrains.tiered_groups(dmp)
    stats = group.stats()
    dist.destroy_process_group()
    return sum(table["misses"] for table in stats) if isinstance(stats, list) else stats["misses"]


def main() -> None:
    """Prints where the package came from, the I/O back end, and the misses."""
    folder = Path(sys.argv[1])
    for name in ("volume", "tables"):
        (folder / name).mkdir()
    volume = mtrains.kernels.SsdVolume(paths=(str(folder / "volume"),), capacity_bytes=1 << 30)
    backend = volume.backend
    records_come_back(volume)
    records_come_back(mtrains.kernels.MemoryVolume())
    print(mtrains.__file__, backend, train(folder / "tables"))


if __name__ == "__main__":
    main()
