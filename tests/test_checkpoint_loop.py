"""Between checkpoints: volumes that want one are served, rows trickle out, and a resumed job begins with the rows that were hot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torchrec_mtrains.kernels import durability
from torchrec_mtrains.kernels.deferred_init import UniformInit
from torchrec_mtrains.kernels.tiered_tbe import TieredTable, TieredTBE

import jobs
from ranks import Ranks
from torchrec_mtrains import SsdHome, TierChain, tiered_groups, trickle, wants_checkpoint
from torchrec_mtrains.data import SyntheticSource
from torchrec_mtrains.process_group import process_group
from torchrec_mtrains.train import Job

CAPACITY_BYTES = 24 << 20


def make(pg, ssd: Path, checkpoint: Path, **options) -> Job:
    job = jobs.options(ssd, checkpoint=str(checkpoint), **options)
    object.__setattr__(job.placement, "ssd_capacity_bytes", CAPACITY_BYTES)
    source = SyntheticSource(jobs.SIZES, jobs.BATCH_SIZE, rank=pg.rank(), world_size=pg.size(), held_out_batch_count=2)
    return Job(source, job, pg)


def fill_until_it_wants(job: Job, here: bool = True) -> None:
    """Other records on the job's own volume use its room up, and a checkpoint holds copies that the next one would give back."""
    (volume,) = durability.volumes(tiered_groups(job.dmp))
    table = volume.table("filler", row_count=1 << 20, record_bytes=4000)
    records = np.ones((64, 4000), np.uint8)
    for first in range(0, 2048, 64):  # a third of the volume
        table.put(np.arange(first, first + 64), records)
    job.save()
    assert not wants_checkpoint(job.dmp)
    for first in range(0, 1 << 20 if here else 0, 64):
        if volume.wants_checkpoint:
            return
        table.put(np.arange(first, first + 64) % 2048, records)
    assert not here, "the volume never wanted a checkpoint"


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    (tmp_path / "ssd").mkdir()
    return tmp_path / "ssd", tmp_path / "checkpoint"


def test_a_volume_that_is_short_of_room_gets_its_checkpoint_at_the_next_step(folders):
    torch.set_num_threads(1)
    with process_group() as pg:
        job = make(pg, *folders)
        losses: list[float] = []
        job.train(4, lambda s: losses.append(s.loss))
        fill_until_it_wants(job)
        assert wants_checkpoint(job.dmp)
        job.train(5, lambda s: losses.append(s.loss))
        assert [(c.step, c.wanted) for c in job.checkpoints] == [(4, False), (5, True)]
        assert all(c.seconds > 0 for c in job.checkpoints)
        job.close()
    assert losses == jobs.run(jobs.options(None, steps=5)).losses


def train_with_one_rank_short_of_room(ssd: Path, checkpoint: Path) -> list[tuple[int, bool]]:
    torch.set_num_threads(1)
    with process_group() as pg:
        job = make(pg, ssd, checkpoint)
        job.train(3, lambda _: None)
        fill_until_it_wants(job, pg.rank() == 1)
        job.train(4, lambda _: None)
        job.close()
        return [(c.step, c.wanted) for c in job.checkpoints]


def test_one_ranks_wish_is_every_ranks_checkpoint(folders):
    ranks = Ranks(2)
    try:
        assert ranks.run(train_with_one_rank_short_of_room, *folders) == [[(3, False), (4, True)]] * 2
    finally:
        ranks.close()


def tables_of(job: Job) -> dict[str, int]:
    counted = [t for g in tiered_groups(job.dmp) for t in g.stats()]
    return {name: sum(t[name] for t in counted) for name in ("flushed_rows", "trickled_rows", "resident_rows")}


def test_rows_that_trickle_out_are_not_flushed_again_and_no_bit_changes(folders, tmp_path):
    torch.set_num_threads(1)
    expected = jobs.run(jobs.options(None, steps=24)).losses
    flushed = {}
    for every in (8, None):
        ssd = tmp_path / f"ssd_{every}"
        ssd.mkdir()
        with process_group() as pg:
            job = make(pg, ssd, tmp_path / f"checkpoint_{every}", checkpoint_every=every)
            losses: list[float] = []
            for until in (8, 16, 24):
                job.train(until, lambda s, losses=losses: losses.append(s.loss))
                job.save()
            flushed[every] = tables_of(job)
            assert len(job.checkpoints) == 3
            job.close()
        assert losses == expected
    assert flushed[None]["trickled_rows"] == 0 < flushed[8]["trickled_rows"]
    assert flushed[8]["flushed_rows"] < flushed[None]["flushed_rows"]


def test_trickle_does_nothing_until_the_checkpoint_is_near(folders):
    with process_group() as pg:
        job = make(pg, *folders)
        job.train(12, lambda _: None)
        assert trickle(job.dmp, steps_left=durability.TRICKLE_STEPS + 1) == 0
        assert trickle(job.dmp, steps_left=durability.TRICKLE_STEPS) > 0
        job.close()


ROWS, DIM = 40, 8


def table_on(ssd: Path, pool_rows: int) -> TieredTBE:
    chain = TierChain(pool_rows, (SsdHome((str(ssd),), 64 << 20),))
    return TieredTBE(
        [TieredTable("t", ROWS, DIM, chain, init=UniformInit(1, -1, 1, columns=DIM))],
        [0],
        PoolingMode.SUM,
        SparseType.FP32,
        EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        rank=0,
        learning_rate=1.0,
        eps=1e-3,
    )


def record_at_home(tbe: TieredTBE, row: int) -> torch.Tensor:
    out = torch.zeros((1, DIM * 4 + 4), dtype=torch.uint8)
    tbe._home_tables[0].get(torch.tensor([row]), out)
    return out.view(torch.float32)[0]


def test_a_row_whose_backward_is_outstanding_does_not_trickle(tmp_path):
    tbe = table_on(tmp_path, 8)
    output = tbe(torch.tensor([3, 5]), torch.arange(3))
    assert tbe.trickle(0, 1.0) == 0
    output.sum().backward()
    assert tbe.trickle(0, 1.0) == 2
    for row in (3, 5):
        weights, state = tbe.read_rows(0, row, 1)
        assert torch.equal(record_at_home(tbe, row), torch.cat([weights[0], state]))
    assert tbe.trickle(0, 1.0) == 0
    tbe.flush()
    assert tbe.stats()[0]["flushed_rows"] == 0
    durability.close([tbe])


def test_the_hand_goes_over_every_slot_and_leaves_young_rows(tmp_path):
    tbe = table_on(tmp_path, 10)
    for row in range(10):
        tbe(torch.tensor([row]), torch.arange(2)).sum().backward()
    assert tbe.trickle(8, 1.0) == 2, "two rows are 8 batches old or older"
    assert sum(tbe.trickle(0, 0.3) for _ in range(4)) == 8, "four looks at 3 slots see all 10"
    durability.close([tbe])


def test_the_rows_that_were_resident_come_back_in_their_order(folders):
    torch.set_num_threads(1)
    with process_group() as pg:
        job = make(pg, *folders)
        job.train(20, lambda _: None)
        job.save()
        before = [rows for g in tiered_groups(job.dmp) for rows in g.resident_rows()]
        job.close()
        job = make(pg, *folders, resume=True)
        after = [rows for g in tiered_groups(job.dmp) for rows in g.resident_rows()]
        read = tables_of(job)["resident_rows"]
        job.close()
    assert read == sum(map(len, before)) == 3 * jobs.POOL_ROWS
    for saved, found in zip(before, after, strict=True):
        grain = len(saved) // 32 + 1
        place = {row: i // grain for i, row in enumerate(saved)}
        assert [place[row] for row in found] == sorted(place.values())


def test_a_pool_that_is_smaller_now_gets_the_newest_rows(folders):
    with process_group() as pg:
        job = make(pg, *folders)
        job.train(20, lambda _: None)
        job.save()
        before = [rows for g in tiered_groups(job.dmp) for rows in g.resident_rows()]
        job.close()
        options = jobs.options(folders[0], checkpoint=str(folders[1]), resume=True)
        object.__setattr__(options.placement, "pool_rows", 33)
        object.__setattr__(options.placement, "ssd_capacity_bytes", CAPACITY_BYTES)
        job = Job(SyntheticSource(jobs.SIZES, jobs.BATCH_SIZE), options, pg)
        after = [rows for g in tiered_groups(job.dmp) for rows in g.resident_rows()]
        job.close()
    for saved, found in zip(before, after, strict=True):
        assert set(found) == set(saved[-33:])


def hit_ratio(ssd: Path, checkpoint: Path, warm: bool) -> tuple[float, list[float]]:
    job = jobs.options(ssd, checkpoint=str(checkpoint), resume=True, warm_restart=warm)
    done = jobs.run(job)
    first = done.steps[:3]
    return 1 - sum(s.tiers["misses"] for s in first) / sum(s.tiers["lookups"] for s in first), done.losses


def test_a_warm_restart_hits_more_than_a_cold_one_and_trains_the_same(tmp_path):
    expected = jobs.run(jobs.options(None)).losses[20:]
    ratios = {}
    for warm in (True, False):
        ssd, checkpoint = tmp_path / f"ssd_{warm}", tmp_path / f"checkpoint_{warm}"
        ssd.mkdir()
        jobs.run(jobs.options(ssd, steps=20, checkpoint=str(checkpoint)))
        ratios[warm], losses = hit_ratio(ssd, checkpoint, warm)
        assert losses == expected
    assert ratios[True] > ratios[False]


@pytest.mark.parametrize("damage", ["flipped", "short", "missing", "of other tables"])
def test_a_damaged_list_of_hot_rows_leaves_the_pools_cold_and_says_so(folders, damage):
    ssd, checkpoint = folders
    expected = jobs.run(jobs.options(None)).losses[10:]
    jobs.run(jobs.options(ssd, steps=10, checkpoint=str(checkpoint)))
    (file,) = checkpoint.glob("step_*/resident_rows.rank_0.bin")
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "short":
        file.write_bytes(data[:-9])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        import struct
        import zlib

        body = bytes(data[:-4]).replace(b"t1", b"x1")
        file.write_bytes(body + struct.pack("<I", zlib.crc32(body)))
    with pytest.warns(RuntimeWarning, match="empty slot pools"):
        done = jobs.run(jobs.options(ssd, checkpoint=str(checkpoint), resume=True))
    assert done.losses == expected
