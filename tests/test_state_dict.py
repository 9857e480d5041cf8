"""State dicts of tiered tables: lazy, in TorchRec's own form, and exchanged with stock FUSED tables through DCP."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import DataType
from torchrec_mtrains.kernels import durability, lazy_rows, sharded_state
from torchrec_mtrains.kernels.lazy_rows import LazyRows

import torchrec_mtrains as mtrains
from dmp_twins import Job, Table, assert_same_state, batch, in_order, local_state, sharded
from ranks import Ranks
from torchrec_mtrains import SsdHome
from torchrec_mtrains.errors import ConfigurationError, UnsupportedError, VolumeMismatchError

KEY = "embedding_bags.t0.weight"


def values_of(dmp: DistributedModelParallel) -> dict[str, torch.Tensor]:
    """``local_state`` of tables whose columns are all here."""
    return {key: only for key, of_columns in local_state(dmp).items() for only in [*of_columns.values()]}


OPTIMIZERS = [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD]


def job(optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD, **options: object) -> Job:
    return Job(
        [
            Table(50, 8, ["a"], pool_rows=6, sharding="row_wise"),
            Table(30, 12, ["b"], pool_rows=6),
            Table(20, 4, ["c"], pool_rows=6, tiered=False),
        ],
        optimizer=optimizer,
        batch_size=1,
        **options,
    )


def one_table(rows: int = 50) -> Job:
    return Job([Table(rows, 8, ["a"], pool_rows=6)], batch_size=1)


def train(dmp: DistributedModelParallel, made: Job, steps: int, seed: int) -> torch.Tensor:
    """Trains with gradient one; the last outputs."""
    generator = torch.Generator().manual_seed(seed + dist.get_rank())
    outputs = torch.empty(0)
    for _ in range(steps):
        outputs = in_order(dmp(batch(made, generator)))
        outputs.sum().backward()
    return outputs.detach()


def state(dmp: DistributedModelParallel) -> dict[str, object]:
    return {"model": dmp.state_dict(), "optimizer": dmp.fused_optimizer.state_dict()}


def save(dmp: DistributedModelParallel, folder: Path | str) -> None:
    dcp.save(state(dmp), checkpoint_id=folder)


def load(dmp: DistributedModelParallel, folder: Path | str) -> None:
    loaded = state(dmp)
    dcp.load(loaded, checkpoint_id=folder)
    dmp.load_state_dict(loaded["model"])
    dmp.fused_optimizer.load_state_dict(loaded["optimizer"])


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local shards of a few rows, so that every table has many."""
    monkeypatch.setattr(sharded_state, "SHARD_BYTES", 200)


@pytest.mark.usefixtures("one_rank")
class TestOnOneRank:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_keys_and_sizes_are_those_of_fused_tables(self, optimizer: EmbOptimType) -> None:
        ours, theirs = state(sharded(job(optimizer), True)), state(sharded(job(optimizer), False))
        assert ours["model"].keys() == theirs["model"].keys()
        for key, tensor in theirs["model"].items():
            assert ours["model"][key].size() == tensor.size()
            assert ours["model"][key].dtype == tensor.dtype
        a, b = ours["optimizer"]["state"], theirs["optimizer"]["state"]
        assert {k: {n: t.size() for n, t in v.items()} for k, v in a.items()} == {
            k: {n: t.size() for n, t in v.items()} for k, v in b.items()
        }

    @pytest.mark.usefixtures("small_shards")
    @pytest.mark.parametrize("data_type", [DataType.FP32, DataType.FP16])
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize("ours_to_theirs", [True, False])
    def test_a_checkpoint_moves_between_tiered_and_fused_tables(
        self, ours_to_theirs: bool, optimizer: EmbOptimType, data_type: DataType, tmp_path: Path
    ) -> None:
        made = job(optimizer, data_type=data_type)
        source, target = sharded(made, ours_to_theirs), sharded(made, not ours_to_theirs)
        train(source, made, 10, seed=1)
        train(target, made, 10, seed=2)
        save(source, tmp_path)
        load(target, tmp_path)
        assert_same_state(source, target)
        assert torch.equal(train(source, made, 10, seed=3), train(target, made, 10, seed=3))
        assert_same_state(source, target)

    def test_a_state_dict_passes_between_tiered_and_fused_tables_in_the_process(self) -> None:
        made = job()
        ours, theirs = sharded(made, True), sharded(made, False)
        train(theirs, made, 5, seed=1)
        ours.load_state_dict(theirs.state_dict())
        ours.fused_optimizer.load_state_dict(theirs.fused_optimizer.state_dict())
        assert_same_state(ours, theirs)
        train(ours, made, 5, seed=2)
        theirs.load_state_dict(ours.state_dict())
        theirs.fused_optimizer.load_state_dict(ours.fused_optimizer.state_dict())
        assert_same_state(ours, theirs)

    def test_whole_tensors_load_and_leave_optimizer_state_alone(self) -> None:
        made = one_table()
        dmp = sharded(made, True)
        train(dmp, made, 5, seed=1)
        momentum = values_of(dmp)[f"{KEY}/t0.momentum1"]
        weight = torch.randn(50, 8)
        assert dmp.load_state_dict({KEY: weight}) == ([], [])
        assert torch.equal(values_of(dmp)[KEY], weight)
        assert torch.equal(values_of(dmp)[f"{KEY}/t0.momentum1"], momentum)
        assert momentum.any()

    def test_values_of_another_size_are_refused(self) -> None:
        dmp = sharded(one_table(), True)
        with pytest.raises(ConfigurationError, match=r"'t0' has size \(50, 8\), the state dict has \(51, 8\)"):
            dmp.load_state_dict({KEY: torch.zeros(51, 8)})

    def test_a_state_dict_shows_rows_as_they_are_when_read(self) -> None:
        made = one_table()
        dmp = sharded(made, True)
        weight = dmp.state_dict()[KEY].local_shards()[0].tensor
        before = weight.cpu()
        train(dmp, made, 5, seed=1)
        assert not torch.equal(weight.cpu(), before)
        assert torch.equal(weight.cpu(), values_of(dmp)[KEY])

    def test_loading_a_state_dict_into_its_own_model_changes_nothing(self) -> None:
        made = job()
        dmp = sharded(made, True)
        train(dmp, made, 5, seed=1)
        before = values_of(dmp)
        dmp.load_state_dict(dmp.state_dict())
        dmp.fused_optimizer.load_state_dict(dmp.fused_optimizer.state_dict())
        after = values_of(dmp)
        assert all(torch.equal(before[k], after[k]) for k in before)

    def test_tables_are_cut_into_shards_of_fifty_megabytes(self) -> None:
        dmp = sharded(Job([Table(1_000_000, 64, ["a"], pool_rows=6)]), True)
        for tensor in (dmp.state_dict()[KEY], dmp.fused_optimizer.state_dict()["state"][KEY]["t0.momentum1"]):
            assert isinstance(tensor, ShardedTensor)
            rows = [s.tensor.shape[0] for s in tensor.local_shards()]
            assert sum(rows) == 1_000_000
            assert all(s.tensor.nbytes <= 50_000_000 for s in tensor.local_shards())
            assert len(rows) == -(-1_000_000 * tensor.local_shards()[0].tensor[:1].nbytes // 50_000_000)

    def test_parameters_are_lazy_and_belong_to_no_other_optimizer(self) -> None:
        parameter = dict(sharded(one_table(), True).named_parameters())[KEY]
        assert isinstance(parameter, torch.nn.Parameter)
        assert (parameter.shape, parameter.dtype, parameter.requires_grad) == ((50, 8), torch.float32, False)
        assert len(parameter._in_backward_optimizers) == 1

    def test_only_what_cannot_materialize_a_table_is_lazy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        dmp = sharded(one_table(), True)
        lazy = dmp.state_dict()[KEY].local_shards()[0].tensor
        values = lazy.cpu()
        assert type(values) is torch.Tensor
        for same in (lazy.detach(), lazy.view(50, 8), lazy.view(-1, 8), lazy[:], lazy.narrow(1, 0, 8)):
            assert isinstance(same, LazyRows)
            assert torch.equal(same.cpu(), values)
        part = lazy.narrow(0, 10, 5)
        assert isinstance(part[1:3], LazyRows)
        assert torch.equal(part[1:3].cpu(), values[11:13])
        assert torch.equal(lazy[-3:].cpu(), values[-3:])
        assert lazy[7:7].cpu().shape == (0, 8)
        assert torch.equal(torch.zeros(50, 8).copy_(lazy), values)
        assert torch.equal(lazy.clone(), values)
        assert torch.equal(lazy.to(torch.float64), values.double())
        part.copy_(torch.ones(5, 8))
        values[10:15] = 1
        assert torch.equal(lazy.cpu(), values)
        assert repr(part) == "LazyRows('t0', rows 10:15, shape=(5, 8), dtype=torch.float32)"
        columns = lazy.narrow(1, 2, 5)[:, 1:]
        assert isinstance(columns, LazyRows)
        assert torch.equal(columns.cpu(), values[:, 3:7])
        columns[4:6].copy_(torch.full((2, 4), 2.0))
        values[4:6, 3:7] = 2
        assert torch.equal(lazy.cpu(), values)
        with pytest.raises(ConfigurationError, match=r"rows of shape \(4, 8\) do not fit rows of shape \(5, 8\)"):
            part.copy_(torch.ones(4, 8))
        assert torch.equal(lazy + 1, values + 1)
        assert torch.equal(lazy.flatten(), values.flatten())
        assert torch.equal(torch.cat([lazy, part]), torch.cat([values, values[10:15]]))
        monkeypatch.setattr(lazy_rows, "READ_BYTES", lazy.nbytes - 1)  # of the table
        for materializing in (
            lambda: lazy + 1,
            lambda: lazy.flatten(),
            lambda: lazy[::2],
            lambda: lazy[:, ::2],
            lambda: lazy.view(-1),
            lambda: lazy.sum(),
            lambda: torch.cat([lazy, lazy]),
            lambda: torch.zeros_like(lazy),
            lambda: lazy.zero_(),
            lambda: copy.deepcopy(lazy),
            lambda: pickle.dumps(lazy),
        ):
            with pytest.raises(UnsupportedError, match="'t0'"):
                materializing()
        for changing in (lambda: part.zero_(), lambda: part.view(-1), lambda: part[0], lambda: torch.add(values, 1, out=lazy)):
            with pytest.raises(UnsupportedError, match="'t0'"):
                changing()

    @pytest.mark.parametrize("rows", [1, 3, 50])
    def test_an_init_fn_that_is_not_understood_is_applied_to_every_row(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchrec_mtrains.kernels import initial_values

        monkeypatch.setattr(initial_values.rows_per_block, "__defaults__", (3 * 8 * 4,))
        seen: list[tuple[int, ...]] = []

        def fill(weight: torch.Tensor) -> None:
            weight.copy_(torch.arange(weight.numel()).view(weight.shape) + 1000 * len(seen))
            seen.append(tuple(weight.shape))

        made = one_table(rows)
        configs = made.configs()
        configs[0].init_fn = fill
        made.configs = lambda: configs  # type: ignore[method-assign]
        weight = values_of(sharded(made, True))[KEY]
        assert sum(n for n, _ in seen) == rows
        assert all(n <= 3 for n, _ in seen)
        expected = torch.cat([torch.arange(n * 8.0).view(n, 8) + 1000 * i for i, (n, _) in enumerate(seen)])
        assert torch.equal(weight, expected)

    def test_an_init_fn_is_not_applied_over_the_volume_of_an_earlier_job(self, tmp_path: Path) -> None:
        made = one_table()
        configs = made.configs()
        configs[0].init_fn = lambda weight: weight.normal_()
        made.configs = lambda: configs  # type: ignore[method-assign]
        home = SsdHome((str(tmp_path),), capacity_bytes=64 << 20)
        first = sharded(made, True, home)
        train(first, made, 5, seed=1)
        kept = values_of(first)
        durability.checkpoint(mtrains.tiered_groups(first), 7)
        train(first, made, 5, seed=2)
        del first
        gc.collect()
        second = sharded(made, True, home)
        assert KEY in second.state_dict()  # lazy: nothing is read
        with pytest.raises(VolumeMismatchError, match="earlier job"):
            train(second, made, 1, seed=1)
        durability.restore(mtrains.tiered_groups(second), 7)
        restored = values_of(second)
        assert kept.keys() == restored.keys()
        assert all(torch.equal(kept[k], restored[k]) for k in kept)

    def test_an_in_memory_twin_starts_with_the_same_values(self) -> None:
        made = one_table()
        ours = values_of(sharded(made, True))[KEY]
        made.tables[0].tiered = False
        configs = made.configs()
        configs[0].init_fn = mtrains.uniform_init_fn("t0", 50, 8)
        made.configs = lambda: configs  # type: ignore[method-assign]
        assert torch.equal(values_of(sharded(made, False))[KEY], ours)
        assert ours.unique().numel() > 300
        assert ours.abs().max() <= 1 / 50**0.5

    def test_a_twin_of_a_shard_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match=r"the whole table is \(50, 8\)"):
            mtrains.uniform_init_fn("t0", 50, 8)(torch.empty(25, 8))


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def exchange_over_ranks(folder: str, ours_to_theirs: bool) -> None:
    """The checkpoint is loaded under another plan: row-wise and table-wise change places, and so do the ranks."""
    sharded_state.SHARD_BYTES = 200
    made, other = job(), job()
    other.tables[0].sharding, other.tables[1].sharding, other.tables[2].rank = "table_wise", "row_wise", 1
    source, target = sharded(made, ours_to_theirs), sharded(other, not ours_to_theirs)
    train(source, made, 8, seed=1)
    save(source, folder)
    load(target, folder)
    a, b = whole(source), whole(target)
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def whole(dmp: DistributedModelParallel) -> dict[str, torch.Tensor]:
    """Every table and state, gathered."""
    tensors = dict(dmp.state_dict())
    for states in dmp.fused_optimizer.state_dict()["state"].values():
        tensors |= states
    mine = {k: [(s.metadata.shard_offsets[0], s.tensor.cpu()) for s in t.local_shards()] for k, t in tensors.items()}
    everyone: list[dict[str, list[tuple[int, torch.Tensor]]]] = [{}, {}]
    dist.all_gather_object(everyone, mine)
    keys = sorted({k for rank in everyone for k in rank})
    blocks = {k: sorted((b for rank in everyone for b in rank.get(k, [])), key=lambda b: b[0]) for k in keys}
    return {k: torch.cat([rows for _, rows in b]) for k, b in blocks.items()}


@pytest.mark.parametrize("ours_to_theirs", [True, False])
def test_a_checkpoint_moves_between_ranks_sharding_types_and_kernels(two_ranks: Ranks, ours_to_theirs: bool, tmp_path: Path) -> None:
    two_ranks.run(exchange_over_ranks, str(tmp_path), ours_to_theirs)


def one_row_for_two_ranks() -> torch.Tensor:
    made = Job([Table(1, 8, ["a"], pool_rows=6, sharding="row_wise")])
    dmp = sharded(made, True)
    train(dmp, made, 3, seed=1)
    return whole(dmp)[KEY]


def test_a_rank_may_hold_no_row_of_a_row_wise_table(two_ranks: Ranks) -> None:
    a, b = two_ranks.run(one_row_for_two_ranks)
    assert a.shape == (1, 8)
    assert torch.equal(a, b)


MEASURE = """
import resource, sys, tempfile
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
sys.path.insert(0, {tests!r})
from dmp_twins import Job, Table, sharded
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
peak_bytes = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with tempfile.TemporaryDirectory(dir={folder!r}) as folder:
    warm = sharded(Job([Table(10, 64, ["a"], 6)]), True)
    dcp.save(warm.state_dict(), checkpoint_id=folder + "/warm")
    big = sharded(Job([Table({rows}, 64, ["a"], 6)]), True)
    before = peak_bytes()
    dcp.save(big.state_dict(), checkpoint_id=folder + "/big")
    print(peak_bytes() - before)
"""


def test_saving_a_table_takes_the_memory_of_a_few_shards(tmp_path: Path) -> None:
    rows = 2_000_000
    code = MEASURE.format(tests=str(Path(__file__).parent), folder=str(tmp_path), rows=rows)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 3 * 50_000_000 < rows * 64 * 4
