"""``mtrains profile``: what it counts, how well a sample stands for a table, and the command."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from torchrec.datasets.utils import Batch
from torchrec_mtrains.kernels import _core
from torchrec_mtrains.planner import AccessProfile, TableAccess
from torchrec_mtrains.planner.assumed_access import curve_sizes

from torchrec_mtrains.cli import main
from torchrec_mtrains.data import SyntheticConfig, SyntheticSource, TableShape
from torchrec_mtrains.data.source import make_batch
from torchrec_mtrains.errors import ConfigurationError, IdOutOfRangeError
from torchrec_mtrains.profiling import LOOKAHEADS, ProfileOptions, profile


@dataclass
class Given:
    """A source of batches that are there, one lookup of each of its tables a sample. Shapes: ids (tables, batches, samples)."""

    ids: np.ndarray
    rows: int
    endless: bool = False
    name: str = "given"
    dense_dim: int = 1
    tables: tuple[TableShape, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.tables = tuple(TableShape(f"t{t}", f"f{t}", self.rows) for t in range(len(self.ids)))

    @property
    def batch_size(self) -> int:
        return self.ids.shape[2]

    @property
    def train_steps(self) -> int | None:
        return self.ids.shape[1]

    def train_batches(self, start: int = 0) -> Iterator[Batch]:
        for b in range(start, self.ids.shape[1]):
            values = np.ascontiguousarray(self.ids[:, b]).reshape(-1)
            dense = np.zeros((self.batch_size, 1), np.float32)
            yield make_batch([t.feature for t in self.tables], values, np.ones(values.size, np.int32), dense, dense[:, 0])

    def held_out_batches(self, after: int = 0) -> Iterator[Batch]:
        raise AssertionError("a profile reads what is trained on")


def zipf(tables: int, rows: int, batches: int, samples: int, exponent: float = 1.05, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    law = np.cumsum(np.arange(1, rows + 1.0) ** -exponent)
    ids = np.searchsorted(law, rng.random((tables, batches, samples)) * law[-1])
    return np.stack([rng.permutation(rows)[of_table] for of_table in ids])


def measured(ids: np.ndarray, rows: int, **options: Any) -> list[TableAccess]:
    return list(profile(Given(ids, rows), ProfileOptions(**options)).tables.values())


def test_counts_are_those_of_the_data() -> None:
    ids = zipf(2, 3000, 40, 300)
    for t, access in enumerate(measured(ids, 3000, row_bytes=64)):
        uniques = [np.unique(b).size for b in ids[t]]
        assert (access.name, access.rows, access.batches, access.batch_samples) == (f"t{t}", 3000, 40, 300)
        assert access.lookups_per_batch == 300
        assert access.unique_rows_per_batch == pytest.approx(np.mean(uniques))
        assert access.used_rows == np.unique(ids[t]).size
        assert access.unique_rows(75) == pytest.approx(np.mean([np.unique(b[:75]).size for b in ids[t]]))
        four = [np.unique(ids[t, b : b + 4]).size for b in range(0, 40, 4)]
        assert access.unique_rows(1200) == pytest.approx(np.mean(four))
        counts = np.sort(np.bincount(ids[t].reshape(-1), minlength=3000))[::-1]
        assert dict(access.lookup_share_by_popularity)[0.1] == pytest.approx(counts[:300].sum() / counts.sum())
        ranges = np.bincount(ids[t].reshape(-1) * 64 // 3000, minlength=64)
        assert access.lookup_share_by_row_range == pytest.approx(ranges / ranges.sum())


def test_the_curve_of_a_whole_table_is_what_its_pools_missed_in_the_second_half() -> None:
    ids, rows, batches = zipf(1, 3000, 120, 300), 3000, 120
    (access,) = measured(ids, rows, prefetch_depth=1)
    sizes = curve_sizes(rows, np.unique(ids[0, 0]).size)
    native = _core.TableProfiler(rows, rows, 0, sizes, list(LOOKAHEADS), 1, 15)
    for b in range(batches):
        native.push(ids[0, b])
    native.finish()
    first = _core.TableProfiler(rows, rows, 0, sizes, list(LOOKAHEADS), 1, 15)
    for b in range(batches):
        first.push(ids[0, b])
        before = [(w["batches"], w["misses"]) for w in first.pools()]
        if before[0][0] == 60:
            break
    assert [c.lookahead for c in access.miss_curves] == list(LOOKAHEADS)
    compared = 0
    for end, size, missed in zip(native.pools()[0]["misses"], sizes, before[0][1], strict=True):
        if access.unique_rows_per_batch <= size < access.used_rows:
            compared += 1
            assert access.miss_curves[0].misses(size) == pytest.approx((end - missed) / 60)
            assert access.lru_miss_curve.misses(size) >= access.miss_curves[0].misses(size) >= access.miss_curves[1].misses(size)
    assert compared >= 9


def test_the_curve_of_a_sample_is_within_2_percent_of_the_table() -> None:
    ids, rows = zipf(1, 400_000, 100, 8192), 400_000
    (sampled,) = measured(ids, rows)
    (whole,) = measured(ids, rows, sample_share=1.0)
    assert (sampled.miss_curve.sampled_share, whole.miss_curve.sampled_share) == (0.125, 1.0)
    assert sampled.unique_rows_per_batch == whole.unique_rows_per_batch
    for name in ("miss_curves", "lru_miss_curve"):
        ours, all_of_it = (np.atleast_1d(getattr(t, name)) for t in (sampled, whole))
        for a, b in zip(ours, all_of_it, strict=True):
            errors = np.abs(np.subtract(a.misses_per_batch, b.misses_per_batch)[1:-1]) / whole.unique_rows_per_batch
            assert len(errors) >= 4
            assert 0 < errors.mean() < 0.02
    popular, of_all = dict(sampled.lookup_share_by_popularity), dict(whole.lookup_share_by_popularity)
    assert popular[0.01] == pytest.approx(of_all[0.01], abs=0.02)
    assert sampled.unique_rows(16 * 8192) == pytest.approx(whole.unique_rows(16 * 8192), rel=0.02)


def test_drift_is_the_share_of_rows_that_are_new_in_a_window() -> None:
    same = np.tile(np.arange(50), (1, 64, 1))
    assert measured(same, 1000)[0].drift == 0
    moving = np.arange(50) + np.arange(64)[:, None] // 8 * 25  # windows of 8 batches, half of whose rows are new
    assert measured(moving[None], 1000)[0].drift == pytest.approx(0.5)
    assert measured(np.arange(64 * 10).reshape(1, 64, 10), 1000)[0].drift == 1


def test_rows_used_for_the_first_time_are_missed_by_every_pool() -> None:
    once = np.arange(64 * 10).reshape(1, 64, 10)
    (access,) = measured(once, 1000)
    assert access.miss_curve.misses(639) == 10
    assert access.miss_curve.misses(1000) == 0
    assert access.reuse_batches[-1] == 1


def test_a_table_without_lookups_has_a_profile(tmp_path: Path) -> None:
    class Empty(Given):
        def train_batches(self, start: int = 0) -> Iterator[Batch]:
            for _ in range(3):
                yield make_batch(
                    ["f0"], np.zeros(0, np.int64), np.zeros(4, np.int32), np.zeros((4, 1), np.float32), np.zeros(4, np.float32)
                )

    found = profile(Empty(np.zeros((1, 3, 4), np.int64), 10), ProfileOptions())
    assert found.tables["t0"].miss_curve.misses(0) == 0
    assert found.cache_statistics("t0").expected_miss_rate(0.5) == 0
    found.save(tmp_path / "a.json")
    assert AccessProfile.load(tmp_path / "a.json") == found


def test_a_limit_reads_no_more_and_is_the_beginning_of_the_data() -> None:
    ids = zipf(1, 3000, 40, 300)
    assert measured(ids, 3000, batches=20)[0].used_rows == np.unique(ids[0, :20]).size
    assert measured(ids, 3000, batches=20)[0].batches == 20


def test_what_cannot_be_profiled_is_refused() -> None:
    endless = SyntheticSource(SyntheticConfig(table_count=1, rows=100), 8)
    with pytest.raises(ConfigurationError, match="never end"):
        profile(endless, ProfileOptions())
    with pytest.raises(ConfigurationError, match="needs 2 at least"):
        measured(np.zeros((1, 1, 4), np.int64), 10)
    with pytest.raises(IdOutOfRangeError, match="id 10"):
        measured(np.full((1, 3, 4), 10), 10)
    for wrong in ({"batches": 1}, {"sample_share": 0.0}, {"sample_share": 1.5}, {"prefetch_depth": -1}):
        with pytest.raises(ConfigurationError, match="profile: "):
            ProfileOptions(**wrong)


def test_the_command_writes_a_profile_and_a_page_with_five_pictures(tmp_path: Path) -> None:
    json, page = tmp_path / "access.json", tmp_path / "new" / "page.html"
    sizes = ["--tables", "2", "--rows", "3000", "--batch-size", "64", "--batches", "30"]
    result = CliRunner().invoke(main, ["profile", "synthetic", *sizes, "-o", str(json), "--report", str(page)])
    assert result.exit_code == 0, result.output
    assert "30 batches of 64 samples, at 100,000 samples/s" in result.output
    found = AccessProfile.load(json)
    assert list(found.tables) == ["t0", "t1"]
    assert found.tables["t0"].row_bytes == 128
    content = page.read_text()
    assert content.count("data:image/png;base64,iVBOR") == 5
    assert [name for name in ("t0", "t1") if re.search(f">{name}</td>", content)] == ["t0", "t1"]


def test_the_command_refuses_data_it_does_not_know() -> None:
    result = CliRunner().invoke(main, ["profile", "nonsense"])
    assert result.exit_code == 2
    assert "must be synthetic, movielens:PATH or criteo:PATH" in result.output
