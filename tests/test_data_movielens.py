"""MovieLens in RecBole's format: what is read, how it is split, and what malformed lines say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchrec_mtrains.data import MovieLensSource
from torchrec_mtrains.errors import ConfigurationError, DataError

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def ratings(count: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    lines = [f"u{rng.integers(20)}\ti{rng.integers(30)}\t{rng.integers(1, 6)}\t{880_000_000 + i * 60}\n" for i in range(count)]
    return HEADER + "".join(lines)


def write(tmp_path, text: str):
    path = tmp_path / "some.inter"
    path.write_text(text)
    return path


def test_every_rating_is_trained_once_an_epoch_or_held_out_or_in_the_dropped_tail(tmp_path):
    source = MovieLensSource(write(tmp_path, ratings(105)), 10, epochs=2, held_out_share=0.2)
    assert (source.train_count, source.held_out_count, source.batches_per_epoch, source.train_steps) == (84, 21, 8, 16)
    first = torch.cat([b.dense_features[:, 0] for b in list(source.train_batches(0))[:8]])
    assert first.unique().numel() == 80
    held_out = torch.cat([b.dense_features[:, 0] for b in source.held_out_batches()])
    assert held_out.unique().numel() == 21
    assert float(held_out.min()) > float(first.max())


def test_a_resumed_job_sees_the_batches_that_it_would_have_seen(tmp_path):
    path = write(tmp_path, ratings(105))
    straight = list(MovieLensSource(path, 10, epochs=3).train_batches(0))
    for start in (0, 1, 8, 9, 13, 26):
        resumed = list(MovieLensSource(path, 10, epochs=3).train_batches(start))
        assert len(resumed) == len(straight) - start
        for a, b in zip(resumed, straight[start:], strict=True):
            assert torch.equal(a.sparse_features.values(), b.sparse_features.values())
            assert torch.equal(a.labels, b.labels)


def test_ranks_share_out_every_global_batch(tmp_path):
    path = write(tmp_path, ratings(105))
    whole = list(MovieLensSource(path, 10).train_batches(0))
    parts = [list(MovieLensSource(path, 5, rank=r, world_size=2).train_batches(0)) for r in range(2)]
    for k, batch in enumerate(whole):
        assert torch.equal(batch.labels, torch.cat([parts[0][k].labels, parts[1][k].labels]))
    held = [torch.cat([b.labels for b in MovieLensSource(path, 5, rank=r, world_size=2).held_out_batches()]) for r in range(2)]
    assert sum(h.numel() for h in held) == MovieLensSource(path, 10).held_out_count


def test_tables_are_as_large_as_their_distinct_tokens_and_clicks_are_ratings_from_4(tmp_path):
    text = HEADER + "a\tx\t3\t1\nb\tx\t4\t2\na\ty\t5\t3\nc\tx\t1\t4\n"
    source = MovieLensSource(write(tmp_path, text), 1, held_out_share=0.25)
    assert [(t.name, t.rows) for t in source.tables] == [("user", 3), ("item", 2)]
    labels = sorted(float(b.labels[0]) for b in source.train_batches(0))
    assert labels == [0.0, 1.0, 1.0]
    assert [b.labels.tolist() for b in source.held_out_batches()] == [[0.0]]


def test_further_columns_become_tables_and_dense_features(tmp_path):
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\tgenre:token\tlength:float\n"
    source = MovieLensSource(write(tmp_path, header + "".join(f"a\tx\t3\t{i}\tg{i % 2}\t{i}.5\n" for i in range(10))), 2)
    assert [(t.name, t.rows) for t in source.tables] == [("user", 1), ("item", 1), ("genre", 2)]
    assert source.dense_dim == 7
    assert next(source.train_batches(0)).dense_features.shape == (2, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user_id\titem_id\n", "line 1.*name:token"),
        ("user_id:token\titem_id:token\trating:float\n", "line 1.*timestamp"),
        (HEADER + "a\tb\t3\n", "line 2.*expected 4.*got 3"),
        (HEADER + "a\tb\t3\t1\na\tb\tgood\t2\n", "line 3: rating must be a number, got 'good'"),
        (HEADER + "a\tb\tnan\t1\n", "line 2: rating must be a number, got 'nan'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        MovieLensSource(write(tmp_path, text), 1)


def test_a_missing_file_and_an_ambiguous_folder_are_named(tmp_path):
    with pytest.raises(DataError, match=r"get_movielens\.py"):
        MovieLensSource(tmp_path / "none.inter", 1)
    with pytest.raises(DataError, match="found 0"):
        MovieLensSource(tmp_path, 1)
    write(tmp_path, ratings(50))
    assert MovieLensSource(tmp_path, 1).train_count == 45
    (tmp_path / "other.inter").write_text(ratings(5))
    with pytest.raises(DataError, match="found 2"):
        MovieLensSource(tmp_path, 1)


def test_less_than_a_batch_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="less than one batch of 100"):
        MovieLensSource(write(tmp_path, ratings(50)), 100)
