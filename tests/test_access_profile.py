"""Access profiles: what their curves promise, other batch sizes and windows, files, and TorchRec's statistics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchrec_mtrains.planner import AccessProfile, MissCurve, TableAccess, assumed_access

from torchrec_mtrains.errors import ConfigurationError


def curve(lookahead: int, misses: tuple[float, ...], sizes: tuple[int, ...] = (0, 100, 400, 1000)) -> MissCurve:
    return MissCurve(sizes, misses, misses, batch_samples=50, lookahead=lookahead)


def table(**changed: Any) -> TableAccess:
    values: dict[str, Any] = {
        "name": "t",
        "rows": 1000,
        "batch_samples": 50,
        "batches": 10,
        "lookups_per_batch": 100.0,
        "unique_rows_per_batch": 60.0,
        "used_rows": 900,
        "unique_rows_by_samples": ((12.5, 18.0), (50.0, 60.0), (200.0, 170.0)),
        "lookup_share_by_row_range": (0.5, 0.5),
        "lookup_share_by_popularity": ((0.1, 0.6), (1.0, 1.0)),
        "reuse_batches": (0.5, 0.5),
        "drift": 0.1,
        "drift_batches": 5,
        "miss_curves": (curve(0, (60.0, 40.0, 10.0, 0.0)), curve(8, (60.0, 20.0, 6.0, 0.0)), curve(64, (60.0, 18.0, 2.0, 0.0))),
        "lru_miss_curve": curve(0, (60.0, 50.0, 20.0, 0.0)),
        "row_bytes": 128,
    }
    return TableAccess(**{**values, **changed})


@st.composite
def curves(draw: st.DrawFn) -> MissCurve:
    points = draw(st.integers(2, 9))
    sizes = sorted(draw(st.sets(st.integers(1, 10**9), min_size=points - 1, max_size=points - 1)))
    misses = sorted(draw(st.lists(st.floats(0, 1e6), min_size=points, max_size=points)), reverse=True)
    return MissCurve((0, *sizes), tuple(misses), tuple(misses), batch_samples=1)


@given(curves(), st.floats(0, 2e9), st.floats(0, 2e9))
def test_a_larger_pool_never_misses_more(of: MissCurve, a: float, b: float) -> None:
    assert of.misses(max(a, b)) <= of.misses(min(a, b))
    assert of.misses(0) == of.misses_per_batch[0]
    assert of.misses(2e9) == of.misses_per_batch[-1]


@given(curves())
def test_a_curve_goes_through_its_points(of: MissCurve) -> None:
    for size, missed in zip(of.pool_rows, of.misses_per_batch, strict=True):
        assert of.misses(size) == missed == of.write_backs(size)


def test_a_curve_that_rises_or_has_no_size_0_is_refused() -> None:
    for sizes, misses in (((0, 5), (1.0, 2.0)), ((1, 5), (2.0, 1.0)), ((0, 5, 5), (2.0, 1.0, 0.0)), ((0, 5), (2.0,))):
        with pytest.raises(ConfigurationError, match="access profile"):
            MissCurve(sizes, misses, misses, batch_samples=1)


def test_a_table_of_curves_that_do_not_belong_together_is_refused() -> None:
    falling = (60.0, 40.0, 10.0, 0.0)
    for wrong in ((), (curve(8, falling), curve(0, falling)), (curve(0, falling), curve(8, falling, (0, 100, 500, 1000)))):
        with pytest.raises(ConfigurationError, match="curves of the same pool sizes by rising lookahead"):
            table(miss_curves=wrong)
    with pytest.raises(ConfigurationError, match="more than its rows or lookups"):
        table(unique_rows_per_batch=101.0)


@given(st.integers(0, 80), st.integers(0, 80), st.integers(1, 5000))
def test_a_longer_window_never_misses_more_where_longer_ones_were_measured_to_miss_less(a: int, b: int, batch: int) -> None:
    shorter, longer = (table().miss_curve_for(batch, window) for window in sorted((a, b)))
    assert all(less <= more for less, more in zip(longer.misses_per_batch, shorter.misses_per_batch, strict=True))


def test_windows_between_the_measured_ones_lie_between_them() -> None:
    t = table()
    for k, measured in zip((0, 1, 2), (0, 8, 64), strict=True):
        assert t.miss_curve_for(50, measured).misses_per_batch == pytest.approx(t.miss_curves[k].misses_per_batch)
    assert 20 < t.miss_curve_for(50, 3).misses(100) < 40
    assert t.miss_curve_for(50, 1000).misses(100) == 18


def test_left_its_own_choice_a_pool_knows_eight_times_as_many_batches_as_it_holds() -> None:
    own = table().miss_curve
    assert own.misses(100) == pytest.approx(table().miss_curve_for(50, 14).misses(100))  # 100 slots, 60 unique rows a batch
    assert own.misses(400) == pytest.approx(table().miss_curve_for(50, 54).misses(400))
    assert own.lookahead is None


@given(st.integers(1, 10_000))
def test_no_batch_misses_more_rows_than_it_has(batch: int) -> None:
    t = table()
    scaled = t.miss_curve_for(batch)
    assert scaled.misses(0) == t.unique_rows(batch) <= min(1000, 2 * batch)
    assert scaled.batch_samples == batch


def test_misses_a_sample_stay_when_batches_grow() -> None:
    t = table()
    half_the_window = t.miss_curve_for(100, 4)  # reaches as many samples as 8 batches of 50
    assert half_the_window.misses(100) == pytest.approx(2 * t.miss_curves[1].misses(100))


def test_unique_rows_go_through_what_was_measured_and_grow() -> None:
    t = table()
    assert t.unique_rows(50) == pytest.approx(60)
    assert t.unique_rows(200) == pytest.approx(170)
    counts = [t.unique_rows(n) for n in (1, 5, 12, 30, 50, 120, 200, 1000, 10_000, 10**6)]
    assert counts == sorted(counts)
    assert counts[-1] == 1000


def test_bytes_per_second_are_lookups_times_row_bytes() -> None:
    assert table().bytes_per_s(1000) == 2 * 1000 * 128
    assert table().bytes_per_s(1000, row_bytes=64) == 2 * 1000 * 64
    with pytest.raises(ConfigurationError, match="does not know its row_bytes"):
        table(row_bytes=None).bytes_per_s(1000)


def test_a_profile_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    before = AccessProfile({"t": table(), "u": assumed_access(500, 100, 50, name="u")}, "a source", "2026-11-25")
    before.save(tmp_path / "access.json")
    assert AccessProfile.load(tmp_path / "access.json") == before
    assert AccessProfile.load(tmp_path / "access.json").table("u").assumed


def test_files_that_are_no_profiles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "access.json"
    AccessProfile({"t": table()}, "a source", "2026-11-25").save(path)
    content = json.loads(path.read_text())
    without = {name: value for name, value in content["tables"][0].items() if name != "drift"}
    for text, rule in (
        ("{", "make one with `mtrains profile`"),
        ("[1]", "format_version must be 1 to 1, got None"),
        (json.dumps({**content, "format_version": 99}), "format_version must be 1 to 1, got 99"),
        (json.dumps({**content, "tables": [without]}), "drift"),
        (json.dumps({"format_version": 1}), "tables"),
        (json.dumps({**content, "format_version": 0}), "got 0"),
        (json.dumps({**content, "tables": [[1]]}), "lacks fields"),
        (json.dumps({**content, "tables": [{**content["tables"][0], "miss_curves": [3]}]}), "lacks fields"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=rule):
            AccessProfile.load(path)
    with pytest.raises(ConfigurationError, match="No such file"):
        AccessProfile.load(tmp_path / "missing.json")
    with pytest.raises(ConfigurationError, match="name another file"):
        AccessProfile({}, "", "").save(tmp_path / "no folder" / "access.json")


def test_cache_statistics_are_the_lru_curve() -> None:
    stats = AccessProfile({"t": table()}, "", "").cache_statistics("t")
    assert stats.expected_lookups == 60
    assert [stats.expected_miss_rate(clf) for clf in (0.0, 0.1, 0.4, 1.0)] == pytest.approx([1, 50 / 60, 20 / 60, 0])
    assert 0 < stats.cacheability < 0.5
    hot = replace(table(), lru_miss_curve=curve(0, (60.0, 1.0, 0.0, 0.0)))
    assert AccessProfile({"t": hot}, "", "").cache_statistics("t").cacheability < stats.cacheability
    with pytest.raises(ConfigurationError, match="no table 'x', only t"):
        AccessProfile({"t": table()}, "", "").cache_statistics("x")
