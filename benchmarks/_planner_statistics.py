"""What a profile's ``CacheStatistics`` do for TorchRec's own plans of tables in ``FUSED_UVM_CACHING``, on GPUs that need not be there.

Tables alike in size, uneven in skew and lookups, with HBM for a part of their rows. TorchRec's planner, with its
``EmbeddingOffloadScaleupProposer`` and nothing of ours but the statistics, plans them

    default   without statistics: nothing can be scaled up, every cache keeps TorchRec's default share of its table
    even      without statistics, every cache with the one share that fills the HBM: what a user can set by hand
    profiled  with statistics of a profile of each table

Every plan is rated twice: by TorchRec's performance model, given the same statistics, and by the misses a batch of simulated LRU caches of
just the planned sizes on batches that the profile has not seen. The first counts on a hit for every lookup as slow as a mixture of HBM
and DDR by the load factor, whether the row is in HBM or not, so it prefers large caches of tables with many lookups even where a small
one has nearly every hit; what it says of fetching missed rows is apart.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.constants import UVM_CACHING_RATIO
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.proposers import EmbeddingOffloadScaleupProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, ShardingOption
from torchrec.distributed.types import CacheParams, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec_mtrains.kernels import _core
from torchrec_mtrains.planner import AccessProfile, TableAccess

from _common import Figure, ZipfIds
from torchrec_mtrains.data import TableShape
from torchrec_mtrains.profiling import ProfileOptions, TableMeter

DIM = 64
KINDS = ((0.6, 1), (0.9, 4), (1.05, 1), (1.05, 8), (1.2, 4), (1.2, 16))
"""Zipf exponents and pooling factors of the tables."""
FIRST_SHARE = 0.02
"""Where the proposer begins: it scales up what has a load factor and statistics."""


class _Jobs:
    """The tables' batches: of ``samples``, each kind's ids from a stream of its own."""

    def __init__(self, rows: int, samples: int) -> None:
        self.rows, self.samples = rows, samples
        self.streams = [ZipfIds(rows, exponent, torch.Generator().manual_seed(t)) for t, (exponent, _) in enumerate(KINDS)]

    def batch(self, table: int) -> np.ndarray:
        return self.streams[table].draw(self.samples * KINDS[table][1]).numpy()

    def profile(self, batches: int) -> AccessProfile:
        tables = {}
        for t in range(len(KINDS)):
            meter = TableMeter(TableShape(f"t{t}", f"f{t}", self.rows, KINDS[t][1]), self.samples, batches, ProfileOptions())
            for _ in range(batches):
                meter.push(self.batch(t))
            tables[f"t{t}"] = meter.access(ended=True)
        return AccessProfile(tables, "zipf", "")

    def lru_misses(self, shares: dict[str, float], batches: int) -> float:
        """A batch, of all tables, in the second half of so many more batches."""
        missed = 0.0
        for t in range(len(KINDS)):
            share = shares[f"t{t}"]
            if share == 1:
                continue
            caches = _core.TableProfiler(self.rows, self.rows, 0, [max(1, round(share * self.rows))], [], 0, 1)
            for b in range(batches):
                if b == batches // 2:
                    before = caches.lru_misses()[0]
                caches.push(self.batch(t))
            missed += (caches.lru_misses()[0] - before) / (batches - batches // 2)
        return missed


class _Planner:
    """TorchRec's planner for ``ranks`` GPUs with ``hbm_bytes`` each."""

    def __init__(self, rows: int, samples: int, ranks: int, hbm_bytes: int) -> None:
        self.samples, self.ranks = samples, ranks
        self.topology = Topology(world_size=ranks, compute_device="cuda", hbm_cap=hbm_bytes, ddr_cap=1 << 40)
        configs = [
            EmbeddingBagConfig(name=f"t{t}", feature_names=[f"f{t}"], num_embeddings=rows, embedding_dim=DIM) for t in range(len(KINDS))
        ]
        self.model = torch.nn.Sequential(EmbeddingBagCollection(tables=configs, device=torch.device("meta")))

    def _constraints(self, cache: dict[str, CacheParams]) -> dict[str, ParameterConstraints]:
        return {
            name: ParameterConstraints(
                sharding_types=[ShardingType.ROW_WISE.value],
                compute_kernels=[EmbeddingComputeKernel.FUSED_UVM_CACHING.value],
                pooling_factors=[float(KINDS[int(name[1:])][1])],
                cache_params=params,
            )
            for name, params in cache.items()
        }

    def _enumerator(self, constraints: dict[str, ParameterConstraints]) -> EmbeddingEnumerator:
        return EmbeddingEnumerator(topology=self.topology, batch_size=self.samples // self.ranks, constraints=constraints)

    def plan(self, cache: dict[str, CacheParams]) -> dict[str, float]:
        """Load factors by table; 1: all of it in HBM."""
        constraints = self._constraints(cache)
        planner = EmbeddingShardingPlanner(
            topology=self.topology,
            batch_size=self.samples // self.ranks,
            enumerator=self._enumerator(constraints),
            proposer=EmbeddingOffloadScaleupProposer(),
            storage_reservation=FixedPercentageStorageReservation(0.0),
            constraints=constraints,
        )
        planner.plan(self.model, [EmbeddingBagCollectionSharder()])
        assert planner._best_plan is not None
        return {option.name: _share(option) for option in planner._best_plan}

    def rating_ms(self, shares: dict[str, float], profile: AccessProfile) -> tuple[float, float]:
        """TorchRec's estimate of a step with these load factors, given the statistics; and the part of it that is fetching missed rows."""
        cache = {t: CacheParams(load_factor=share, stats=profile.cache_statistics(t)) for t, share in shares.items()}
        enumerator = EmbeddingEnumerator(
            topology=self.topology, batch_size=self.samples // self.ranks, constraints=self._constraints(cache)
        )
        options = enumerator.enumerate(self.model, [EmbeddingBagCollectionSharder()])
        for k, option in enumerate(options):
            if shares[option.name] == 1:
                whole = copy.deepcopy(option)
                whole.compute_kernel, whole.cache_params = EmbeddingComputeKernel.FUSED.value, None
                enumerator.populate_estimates([whole])
                options[k] = whole
            for rank, shard in enumerate(options[k].shards):
                shard.rank = rank
        fetching = [sum(option.shards[rank].perf.prefetch_compute for option in options) for rank in range(self.ranks)]
        return float(NoopPerfModel(self.topology).rate(options)), float(max(fetching))


def _share(option: ShardingOption) -> float:
    if option.compute_kernel == EmbeddingComputeKernel.FUSED.value:
        return 1.0
    return UVM_CACHING_RATIO if option.cache_load_factor is None else float(option.cache_load_factor)


_RATED = {
    "lru_misses_per_batch": "LRU misses",
    "fetching_ms": "TorchRec's estimate of fetching",
    "rated_ms": "TorchRec's estimate of a step",
}


def run(*, rows: int, samples: int, batches: int, ranks: int = 2, hbm_shares: tuple[float, ...] = (0.3, 0.5, 0.7)) -> list[dict[str, Any]]:
    """A line for each amount of HBM, as a share of all tables' bytes, and plan."""
    jobs = _Jobs(rows, samples)
    profile = jobs.profile(batches)
    lines: list[dict[str, Any]] = []
    for hbm_share in hbm_shares:
        hbm_bytes = int(hbm_share * len(KINDS) * rows * DIM * 4 / ranks)
        planner = _Planner(rows, samples, ranks, hbm_bytes)
        statistics = {t: CacheParams(load_factor=FIRST_SHARE, stats=profile.cache_statistics(t)) for t in profile.tables}
        plans = {
            "default": planner.plan({t: CacheParams() for t in profile.tables}),
            "even": _even(planner, list(profile.tables)),
            "profiled": planner.plan(statistics),
        }
        for name, shares in plans.items():
            line = {"hbm_share": hbm_share, "plan": name, "shares": shares}
            rated, fetching = planner.rating_ms(shares, profile)
            line |= {"lru_misses_per_batch": jobs.lru_misses(shares, batches), "rated_ms": rated, "fetching_ms": fetching}
            line |= {"expected_misses_per_batch": sum(_expected(t, shares[t.name]) for t in profile.tables.values())}
            lines.append(line)
            _print(line)
    return lines


def _expected(table: TableAccess, share: float) -> float:
    return table.lru_miss_curve.misses(share * table.rows) if share < 1 else 0.0


def _even(planner: _Planner, tables: list[str]) -> dict[str, float]:
    """The largest load factor in steps of a thousandth with which TorchRec still finds a plan."""
    low, high = 0, 1000
    while high - low > 1:
        middle = (low + high) // 2
        try:
            planner.plan({t: CacheParams(load_factor=middle / 1000) for t in tables})
            low = middle
        except PlannerError:
            high = middle
    return dict.fromkeys(tables, low / 1000)


def _print(line: dict[str, Any]) -> None:
    shares = " ".join(f"{share:.2f}" for share in line["shares"].values())
    print(
        f"HBM {line['hbm_share']:.0%} of the tables, {line['plan']:>9}: shares {shares}; LRU misses a batch "
        f"{line['lru_misses_per_batch']:,.0f} (expected {line['expected_misses_per_batch']:,.0f}), TorchRec's estimate "
        f"{line['rated_ms']:.3f} ms, {line['fetching_ms']:.3f} of it fetching",
        flush=True,
    )


def figures(lines: list[dict[str, Any]]) -> list[Figure]:
    made = []
    for share in dict.fromkeys(line["hbm_share"] for line in lines):
        by_plan = {line["plan"]: line for line in lines if line["hbm_share"] == share}
        for other in ("default", "even"):
            for value, what in _RATED.items():
                ratio = by_plan["profiled"][value] / by_plan[other][value]
                made.append(Figure(f"stock UVM caching with a profile ÷ {other} shares, HBM {share:.0%}: {what}", ratio))
    return made
