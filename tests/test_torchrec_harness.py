"""TorchRec's own tests of sharding and of state dicts pass with every table in tiers; ``make torchrec-harness`` makes the table of them."""

from __future__ import annotations

import os
import unittest
import unittest.mock
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torchrec.modules.embedding_configs import DataType, PoolingType

import torchrec_harness as harness
import torchrec_mtrains as mtrains
from dmp_twins import SEQUENCE_SHARDINGS, SHARDINGS, VARIABLE_SHARDINGS
from ranks import RankFailureError, Ranks
from torchrec_harness import Case, run_case
from torchrec_mtrains.errors import UnsupportedError

from torchrec.distributed.test_utils import test_model_parallel, test_model_parallel_base  # isort: skip  (the stand-in comes first)

WORLDS = [(2, 2), (4, 4), (4, 2)]
"""Ranks, and those of one node."""

FEW = [
    *(Case(s, has_weighted_tables=True) for s in SHARDINGS),
    *(Case(s, home="SSD") for s in SHARDINGS),
    *(Case(s, sequence=True) for s in SEQUENCE_SHARDINGS),
    *(Case(s, sequence=True, home="SSD") for s in SEQUENCE_SHARDINGS),
]
BAG_VARIANTS: list[dict[str, Any]] = [
    {"pooling": PoolingType.MEAN, "home": "SSD"},
    {"data_type": DataType.FP16, "has_weighted_tables": True},
    {"ids": torch.int32, "use_offsets": True, "home": "SSD"},
    {"qcomms": True, "has_weighted_tables": True},
    {"variable_batch_size": True, "has_weighted_tables": True, "home": "SSD"},
    {"apply_optimizer_in_backward": True, "has_weighted_tables": True},
]
SEQUENCE_VARIANTS: list[dict[str, Any]] = [
    {"data_type": DataType.FP16},
    {"ids": torch.int32, "use_offsets": True, "home": "SSD"},
    {"qcomms": True},
    {"variable_batch_size": True, "home": "SSD"},
    {"apply_optimizer_in_backward": True},
]
ALL = [
    *(Case(s, **v) for v in BAG_VARIANTS for s in SHARDINGS),
    *(Case(s, variable_batch_per_feature=True) for s in VARIABLE_SHARDINGS),
    *(Case(s, sequence=True, **v) for v in SEQUENCE_VARIANTS for s in SEQUENCE_SHARDINGS),
]


def why_not_in_stock(case: Case) -> str | None:
    """What TorchRec's test says of stock FUSED tables on gloo, where it fails."""
    if case.variable_batch_size and case.sequence:
        return "Sizes of tensors must match except in dimension 1"
    if (case.variable_batch_size or case.variable_batch_per_feature) and case.sharding_type in ("row_wise", "table_row_wise", "grid_shard"):
        return "ProcessGroupGloo::allgather: invalid tensor size"
    if case.pooling is PoolingType.MEAN and case.sharding_type == "grid_shard":
        return "Tensor-likes are not close"
    return None


MANY = [c for c in ALL if why_not_in_stock(c) is None]
NOT_IN_STOCK = [c for c in ALL if why_not_in_stock(c) is not None]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda w: f"{w[0] // w[1]}x{w[1]}")
def world(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    ranks = Ranks(*request.param)
    yield ranks
    ranks.close()


def passes_with_rows_leaving_the_pools(case: Case, world: Ranks) -> None:
    assert all(evictions > 0 for evictions in world.run(run_case, case, world.local_world_size))


@pytest.mark.parametrize("case", FEW, ids=str)
def test_sharded_model_equals_the_unsharded_one(case: Case, world: Ranks) -> None:
    passes_with_rows_leaving_the_pools(case, world)


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_sharded_model_equals_the_unsharded_one_in_every_variant(case: Case, world: Ranks) -> None:
    passes_with_rows_leaving_the_pools(case, world)


@pytest.mark.slow
@pytest.mark.parametrize("case", NOT_IN_STOCK, ids=str)
def test_what_is_left_out_fails_with_stock_tables_too(case: Case) -> None:
    ranks = Ranks(4, 2)
    with pytest.raises(RankFailureError, match=why_not_in_stock(case)):
        ranks.run(run_case, case, 2, True)


class _OnTiers:
    """Before one of TorchRec's test cases: its sharders are ours, and so are its tables' sizes."""

    patched: Any  # the module that has the test case
    ours: dict[str, Any] = {}

    def setUp(self, *args: Any, **kwargs: Any) -> None:
        for patch in [
            unittest.mock.patch.dict(os.environ),
            *(unittest.mock.patch.object(self.patched, n, f) for n, f in self.ours.items()),
        ]:
            patch.start()
            self.addCleanup(patch.stop)  # type: ignore[attr-defined]
        harness.SHARDERS.clear()
        super().setUp(*args, **kwargs)  # type: ignore[misc]


class TorchRecStateDict(_OnTiers, test_model_parallel_base.ModelParallelStateDictBase):
    """``ModelParallelStateDictBase``, on one rank."""

    backend = "gloo"
    patched = test_model_parallel_base
    ours = {
        "create_test_sharder": harness.create_test_sharder,
        "get_default_sharders": lambda: [harness.create_test_sharder("embedding_bag_collection", "table_wise", "fused")],
    }

    def _create_tables(self) -> None:
        super()._create_tables()
        harness.enlarge([*self.tables, *self.weighted_tables])

    test_meta_device_dmp_state_dict = None

    def test_meta_device_dmp_state_dict_is_refused(self) -> None:
        with pytest.raises(UnsupportedError, match="tiered tables train on a CPU or a CUDA device, got device meta"):
            super().test_meta_device_dmp_state_dict()

    def tearDown(self) -> None:
        harness.evictions_of(harness.SHARDERS)
        super().tearDown()


@pytest.mark.slow
class TorchRecModelParallel(_OnTiers, harness.model_parallel_base()):  # type: ignore[misc]
    """``_ModelParallelBase``, with processes for each test."""

    backend = "gloo"
    patched = test_model_parallel
    ours = {"create_test_sharder": harness.create_test_sharder}

    def _build_tables_and_groups(self, *args: Any, **kwargs: Any) -> None:
        super()._build_tables_and_groups(*args, **kwargs)
        harness.enlarge([*self.tables, *self.mean_tables, *self.weighted_tables])

    def _run_multi_process_test(self, **kwargs: Any) -> None:
        super()._run_multi_process_test(**{**kwargs, "callable": harness.sharding_single_rank_test})


class TorchRecSparseOnly(_OnTiers, test_model_parallel_base.ModelParallelSparseOnlyBase):
    """``ModelParallelSparseOnlyBase``: stock models after ``register()``."""

    backend = "gloo"
    patched = test_model_parallel_base

    def setUp(self) -> None:
        mtrains.register()
        self.addCleanup(mtrains.unregister)
        super().setUp()
