"""Large plans: how far from their own bound, how long they take, and in how much memory. Each in a process of its own.

Tables of 10⁴ to 10⁸ rows on hosts of 8 ranks, with memory for a quarter of their bytes and PMem for another; how they are used and the
machine are the planner's assumptions, so that nothing but planning is measured. TorchRec's own enumeration, which a plan of ours
contains, is timed first, alone: of the stock enumerator and sharder on the same model.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec_mtrains.planner import CheckpointSchedule, PmemDevice, TieredShardingPlanner, TieredTopology

import torchrec_mtrains as mtrains
from _children import in_child
from _common import Figure
from torchrec_mtrains.job_model import ModelOptions, fused_params
from torchrec_mtrains.meters import peak_rss_bytes
from torchrec_mtrains.tiers import SsdHome

SIZES = ((100, 8), (1000, 64))
"""Tables and ranks."""

_SECONDS = {100: 5.0, 1000: 60.0}  # goals of planning beyond TorchRec's enumeration
_BATCH = 512
_RANKS_PER_HOST = 8
_SHARE = 0.25  # of all tables' bytes that there is DDR for, and PMem


class _Job:
    def __init__(self, tables: int, ranks: int) -> None:
        rng = np.random.default_rng(tables)
        self.ranks, self.rows, self.dims = ranks, (10 ** rng.uniform(4, 8, tables)).astype(int), rng.choice([32, 64, 128], tables)
        self.pooling = np.ceil(10 ** rng.uniform(0, 1.5, tables))

    @property
    def bytes_per_rank(self) -> int:
        return int((self.rows * self.dims * 4).sum() // self.ranks)

    @property
    def model(self) -> nn.Module:
        configs = [
            EmbeddingBagConfig(name=f"t{i}", feature_names=[f"f{i}"], num_embeddings=int(rows), embedding_dim=int(dim))
            for i, (rows, dim) in enumerate(zip(self.rows, self.dims, strict=True))
        ]
        return nn.ModuleDict({"ebc": EmbeddingBagCollection(tables=configs, device=torch.device("meta"))})

    @property
    def constraints(self) -> dict[str, ParameterConstraints]:
        return {f"t{i}": ParameterConstraints(pooling_factors=[float(p)]) for i, p in enumerate(self.pooling)}

    @property
    def on_a_host(self) -> int:
        return min(self.ranks, _RANKS_PER_HOST)


def _stock(tables: int, ranks: int) -> dict[str, Any]:
    """TorchRec's enumeration alone."""
    job = _Job(tables, ranks)
    topology = Topology(world_size=ranks, local_world_size=job.on_a_host, compute_device="cpu", ddr_cap=job.bytes_per_rank)
    start = perf_counter()
    options = EmbeddingEnumerator(topology, _BATCH, constraints=job.constraints).enumerate(job.model, [EmbeddingBagCollectionSharder()])
    return {"seconds": perf_counter() - start, "options": len(options), "peak_bytes": peak_rss_bytes()}


def _ours(tables: int, ranks: int) -> dict[str, Any]:
    """A whole plan."""
    job, before = _Job(tables, ranks), peak_rss_bytes()
    topology = TieredTopology(
        ranks,
        local_world_size=job.on_a_host,
        ddr_budget_bytes=int(_SHARE * job.bytes_per_rank),
        ssd=SsdHome(("ssd",), 8 * job.bytes_per_rank),
        pmem=PmemDevice("pmem", int(_SHARE * job.bytes_per_rank)),
    )
    planner = TieredShardingPlanner(
        topology, batch_size=_BATCH, constraints=job.constraints, checkpoints=CheckpointSchedule(keep=0), stats=[]
    )
    start = perf_counter()
    planner.plan(job.model, list(mtrains.sharders(fused_params(ModelOptions()))))
    seconds, found = perf_counter() - start, planner.search_result
    assert found is not None, "a quarter of the memory cannot hold all tables"
    return {
        "seconds": seconds,
        "search_seconds": found.seconds,
        "step_ms": planner.prediction.step_ms,
        "bound_ms": found.bound_ms,
        "peak_bytes": peak_rss_bytes(),
        "bytes_before": before,
    }


def measure(sizes: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    lines = []
    for tables, ranks in sizes:
        stock, ours = in_child(_stock, tables, ranks), in_child(_ours, tables, ranks)
        lines.append({"tables": tables, "ranks": ranks, "stock": stock, "ours": ours})
        print(
            f"{tables:,} tables × {ranks} ranks: step {ours['step_ms']:.2f} ms, bound {ours['bound_ms']:.2f}; TorchRec's enumeration "
            f"{stock['seconds']:.1f} s and {stock['peak_bytes'] / 2**20:,.0f} MiB, our whole plan {ours['seconds']:.1f} s (search "
            f"{ours['search_seconds']:.1f}) and {ours['peak_bytes'] / 2**20:,.0f} MiB ({ours['bytes_before'] / 2**20:,.0f} before)",
            flush=True,
        )
    return lines


def figures(lines: list[dict[str, Any]]) -> list[Figure]:
    made = []
    for line in lines:
        name, ours, stock = f"scale: {line['tables']:,} tables × {line['ranks']} ranks", line["ours"], line["stock"]
        limit = f"≤ {_SECONDS[line['tables']]:.0f}" if line["tables"] in _SECONDS else ""
        made += [
            Figure(f"{name}, step ÷ bound", ours["step_ms"] / ours["bound_ms"], "≤ 1.15", digits=3),
            Figure(f"{name}, s beyond TorchRec's enumeration", ours["seconds"] - stock["seconds"], limit, digits=1),
            Figure(f"{name}, s of TorchRec's enumeration", stock["seconds"], digits=1),
            Figure(f"{name}, peak memory, MiB", ours["peak_bytes"] / 2**20, digits=0),
        ]
    return made
