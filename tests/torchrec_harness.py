"""TorchRec's own sharding tests (``torchrec.distributed.test_utils``), as they are, on our sharders.

Its wheel leaves out one module that they import; a stand-in for it is put in place when this file is imported. They plan with the
stock planner, so our sharders offer it what stock ones do, and put the planned tables into tiers when they shard them. What
they made is looked at afterwards: every table really lives in tiers, in pools with fewer rows than it has, which were full
before the first batch came, so that each row that came pushed another one out.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.test_utils.emb_sharder import TestEBCSharder, TestECSharder
from torchrec.distributed.test_utils.test_model import TestMixedEmbeddingSparseArch, TestSparseNN
from torchrec.distributed.types import ParameterSharding, ShardingType
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType

import torchrec_mtrains as mtrains
from torchrec_mtrains import DdrHome, SsdHome, TierChain

LEFT_OUT = "torchrec.distributed.tests.test_sequence_model"


class TestEmbeddingCollectionSharder:
    """Imported by TorchRec's tests for DMPCollection alone."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"{LEFT_OUT} is not in TorchRec's wheel")


_stand_in = types.ModuleType(LEFT_OUT)
_stand_in.TestEmbeddingCollectionSharder = TestEmbeddingCollectionSharder  # type: ignore[attr-defined]
sys.modules.setdefault(LEFT_OUT, _stand_in)

from torchrec.distributed.test_utils import test_sharding  # noqa: E402

ROWS = 40  # times as many rows as TorchRec's tests give their tables: its batches touch all of those
POOL_SHARE = 0.5
CAPACITY_BYTES = 64 << 20


class _IntoTiers:
    """Before one of our sharders: what was planned as FUSED lives in tiers, below pools that are full of other rows.

    The modules that it shards take the ``homes`` in turn.
    """

    def __init__(self, sharding_type: str, homes: Sequence[str], fused_params: dict[str, Any] | None = None, codecs: Any = None) -> None:
        super().__init__({"learning_rate": 0.1, **(fused_params or {})}, codecs or {})  # type: ignore[call-arg]
        self._sharding_type, self._homes = sharding_type, list(homes)
        self.made: list[Any] = []

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [self._sharding_type]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return [EmbeddingComputeKernel.FUSED.value]

    def shard(self, module: Any, params: dict[str, ParameterSharding], *args: Any, **kwargs: Any) -> Any:
        # A folder for each: TorchRec's tests make the same tables twice in one process.
        on_ssd = self._homes[len(self.made) % len(self._homes)] == "SSD"
        home = SsdHome((tempfile.mkdtemp(),), CAPACITY_BYTES) if on_ssd else DdrHome()
        tiered = {name: _tiered(sharding, home) for name, sharding in params.items()}
        sharded = super().shard(module, tiered, *args, **kwargs)  # type: ignore[misc]
        for tbe in mtrains.tiered_groups(sharded):
            for table, rows in enumerate(tbe.pool_rows):
                tbe.warm(table, np.arange(rows, dtype=np.int64))
        self.made.append(sharded)
        return sharded


class BagSharder(_IntoTiers, mtrains.TieredEmbeddingBagCollectionSharder):
    """Of bags."""


class SequenceSharder(_IntoTiers, mtrains.TieredEmbeddingCollectionSharder):
    """Of sequences."""


def _tiered(sharding: ParameterSharding, home: DdrHome | SsdHome) -> mtrains.TieredParameterSharding:
    assert sharding.compute_kernel == EmbeddingComputeKernel.FUSED.value
    assert sharding.sharding_spec is not None
    rows = min(shard.shard_sizes[0] for shard in sharding.sharding_spec.shards)
    return mtrains.TieredParameterSharding(
        sharding_type=sharding.sharding_type,
        ranks=sharding.ranks,
        sharding_spec=sharding.sharding_spec,
        tiers=TierChain(int(rows * POOL_SHARE), (home,)),
    )


def evictions_of(sharders: list[Any]) -> int:
    """Rows that left the pools of what ``sharders`` made on this rank; asserts that all of it lives in tiers and works as it should."""
    evictions = 0
    for module in (m for sharder in sharders for m in sharder.made):
        assert all(name in module.tiered_tables() for name in module.module_sharding_plan)
        kernels = list(module._kernels())
        assert len(list(module.tiered_kernels())) == len(kernels)
        for table in (t for tbe in mtrains.tiered_groups(module) for t in tbe.stats()):
            assert table["pool_rows"] < table["rows"], table
            assert table["misses"] == 0 or table["evictions"] > 0, table
            evictions += table["evictions"]
    return evictions


def model_parallel_base() -> Any:
    """TorchRec's ``_ModelParallelBase``, whose name has no underscore before 1.8."""
    from torchrec.distributed.test_utils import test_model_parallel

    return getattr(test_model_parallel, "_ModelParallelBase", None) or test_model_parallel.ModelParallelBase


def enlarge(tables: list[EmbeddingBagConfig]) -> None:
    """More rows, so that one of TorchRec's batches fits into a pool that is smaller than the table."""
    for table in tables:
        table.num_embeddings *= ROWS


@dataclasses.dataclass(frozen=True)
class Case:
    """What ``sharding_single_rank_test_single_process`` is asked for, by the names that it has for it."""

    sharding_type: str
    sequence: bool = False
    has_weighted_tables: bool = False
    pooling: PoolingType = PoolingType.SUM
    data_type: DataType = DataType.FP32
    ids: torch.dtype = torch.int64
    use_offsets: bool = False
    qcomms: bool = False
    variable_batch_size: bool = False
    variable_batch_per_feature: bool = False
    apply_optimizer_in_backward: bool = False
    home: str = "DDR"

    @property
    def variant(self) -> str:
        """What it asks for beyond a collection and a sharding type."""
        said = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("sharding_type", "sequence", "home")}
        others = [name if value is True else f"{str(value).rpartition('.')[2]}" for name, value in said.items() if value != _DEFAULTS[name]]
        return ", ".join([*others, self.home])

    def __str__(self) -> str:
        return f"{'EC' if self.sequence else 'EBC'} {self.sharding_type}: {self.variant}"

    def tables(self) -> list[Any]:
        """As ``ModelParallelTestShared`` has them, but for the number of rows; sequences share no features and have one width."""
        config, counts, more = (EmbeddingConfig, [4], {}) if self.sequence else (EmbeddingBagConfig, [4, 2], {"pooling": self.pooling})
        tables = [
            config(
                num_embeddings=(i + 1) * 10,
                embedding_dim=16 if self.sequence else (i + 2) * 8,
                name=f"table_{sum(counts[:k]) + i}",
                feature_names=[f"feature_{i}"],
                data_type=self.data_type,
                **more,
            )
            for k, count in enumerate(counts)
            for i in range(count)
        ]
        enlarge(tables)
        return tables

    def weighted_tables(self) -> list[EmbeddingBagConfig] | None:
        """Likewise."""
        if not self.has_weighted_tables:
            return None
        tables = [
            EmbeddingBagConfig(
                num_embeddings=(i + 1) * 10,
                embedding_dim=(i + 2) * 4,
                name=f"weighted_table_{i}",
                feature_names=[f"weighted_feature_{i}"],
                data_type=self.data_type,
            )
            for i in range(2)
        ]
        enlarge(tables)
        return tables

    def constraints(self) -> dict[str, ParameterConstraints] | None:
        """Shards of half a table's columns, where it is sharded by column. (TorchRec's tests for a grid do the same.)"""
        if self.sharding_type not in (
            ShardingType.COLUMN_WISE.value,
            ShardingType.TABLE_COLUMN_WISE.value,
            ShardingType.GRID_SHARD.value,
        ):
            return None
        tables = [*self.tables(), *(self.weighted_tables() or [])]
        return {t.name: ParameterConstraints(sharding_types=[self.sharding_type], min_partition=t.embedding_dim // 2) for t in tables}


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Case)}


def run_case(case: Case, local_size: int, stock: bool = False) -> int:
    """On one rank: TorchRec's test of a sharded model against an unsharded one. Returns the rows that left this rank's pools.

    ``stock``: on TorchRec's own FUSED tables.
    """
    comms = QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.BF16) if case.qcomms else None
    codecs = get_qcomm_codecs_registry(comms, device=torch.device("cpu")) if comms else None
    if stock:
        sharder = (TestECSharder if case.sequence else TestEBCSharder)(case.sharding_type, "fused", {"learning_rate": 0.1}, codecs)
    else:
        sharder = (SequenceSharder if case.sequence else BagSharder)(case.sharding_type, [case.home], codecs=codecs)
    tables = case.tables()
    shared = [f for f, n in Counter(f for t in tables for f in t.feature_names).items() if n > 1]
    optimizers = {"embedding_bags": (torch.optim.SGD, {"lr": 0.01}), "embeddings": (torch.optim.SGD, {"lr": 0.2})}
    assert dist.group.WORLD is not None
    os.environ["LOCAL_RANK"] = str(dist.get_rank() % local_size)
    torch.use_deterministic_algorithms(True)
    try:
        test_sharding.sharding_single_rank_test_single_process(
            pg=dist.group.WORLD,
            device=torch.device("cpu"),
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            local_size=local_size,
            model_class=TestMixedEmbeddingSparseArch if case.sequence else TestSparseNN,
            embedding_groups={"group_0": [f"{f}@{t.name}" if f in shared else f for t in tables for f in t.feature_names]},
            tables=tables,
            weighted_tables=case.weighted_tables(),
            sharders=[sharder],
            optim=EmbOptimType.EXACT_SGD,
            constraints=case.constraints(),
            qcomms_config=comms,
            variable_batch_size=case.variable_batch_size,
            variable_batch_per_feature=case.variable_batch_per_feature,
            apply_optimizer_in_backward_config=optimizers if case.apply_optimizer_in_backward else None,
            use_offsets=case.use_offsets,
            indices_dtype=case.ids,
            offsets_dtype=case.ids,
            lengths_dtype=case.ids,
        )
    finally:
        torch.use_deterministic_algorithms(False)
    return 0 if stock else evictions_of([sharder])


def sharding_single_rank_test(sharders: list[Any], **kwargs: Any) -> None:
    """TorchRec's, in a process of its own, and what it made is looked at. Reading this file puts the stand-in in place there."""
    test_sharding.sharding_single_rank_test(sharders=sharders, **kwargs)
    evictions_of([s for s in sharders if isinstance(s, _IntoTiers)])


def create_test_sharder(
    sharder_type: str, sharding_type: str, kernel_type: str, fused_params: Any = None, qcomms_config: Any = None, device: Any = None
) -> Any:
    """As TorchRec's, but of tiered tables where the kernel is FUSED. Of a pair of models the second has the homes swapped."""
    if kernel_type != EmbeddingComputeKernel.FUSED.value:
        return test_sharding.create_test_sharder(sharder_type, sharding_type, kernel_type, fused_params, qcomms_config, device)
    assert sharder_type == test_sharding.SharderType.EMBEDDING_BAG_COLLECTION.value
    codecs = get_qcomm_codecs_registry(qcomms_config, device=device) if qcomms_config else None
    made = BagSharder(sharding_type, ["DDR", "SSD", "SSD", "DDR"], fused_params, codecs)
    SHARDERS.append(made)
    return made


SHARDERS: list[BagSharder] = []
"""Those of this process's ``create_test_sharder``, for whoever wants to look at what they made."""
