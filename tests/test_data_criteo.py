"""Criteo's Kaggle TSV: what is read, how it is split, and what malformed lines say."""

from __future__ import annotations

import math

import pytest
import torch

from torchrec_mtrains.data import CriteoSource
from torchrec_mtrains.errors import ConfigurationError, DataError


def line(label: object = 0, dense: object = 1, category: object = "0a") -> str:
    return "\t".join([str(label), *[str(dense)] * 13, *[str(category)] * 26]) + "\n"


def write(tmp_path, text: str):
    path = tmp_path / "train.txt"
    path.write_text(text)
    return path


def test_a_line_becomes_logged_integers_and_rows_modulo_the_table(tmp_path):
    text = line(1, 3, "ff") + line(0, -2, "68fd1e64") + line(0, "", "") + line()
    batches = list(CriteoSource(write(tmp_path, text), 3, rows=100, held_out_share=0.1).train_batches())
    assert len(batches) == 1
    (batch,) = batches
    assert batch.labels.tolist() == [1.0, 0.0, 0.0]
    assert batch.dense_features[:, 0].tolist() == [pytest.approx(math.log(4)), 0.0, 0.0]
    ids = batch.sparse_features.values().view(26, 3)
    assert ids[0].tolist() == [255 % 100, 0x68FD1E64 % 100, 0]
    assert torch.equal(ids, ids[:1].expand(26, 3))


def test_resume_epochs_and_held_out_lines_fit_together(tmp_path):
    path = write(tmp_path, "".join(line(i % 2, i, f"{i:x}") for i in range(40)))

    def source(**kwargs):
        return CriteoSource(path, 4, rows=1000, epochs=3, held_out_share=0.25, **kwargs)

    straight = [b.sparse_features.values()[:4].tolist() for b in source().train_batches()]
    per_epoch = len(straight) // 3
    assert per_epoch >= 7
    assert straight[:per_epoch] == straight[per_epoch : 2 * per_epoch]
    for start in (0, 1, per_epoch, per_epoch + 2, 3 * per_epoch - 1):
        assert [b.sparse_features.values()[:4].tolist() for b in source().train_batches(start)] == straight[start:]
    held = {i for b in source().held_out_batches() for i in b.sparse_features.values()[:4].tolist()}
    assert held
    assert not held & {i for ids in straight for i in ids}


def test_ranks_share_out_every_global_batch(tmp_path):
    path = write(tmp_path, "".join(line(i % 2, i, f"{i:x}") for i in range(40)))
    whole = [b.labels for b in CriteoSource(path, 4, rows=50).train_batches()]
    parts = [[b.labels for b in CriteoSource(path, 2, rows=50, rank=r, world_size=2).train_batches()] for r in range(2)]
    assert all(torch.equal(w, torch.cat(p)) for w, p in zip(whole, zip(*parts, strict=True), strict=True))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("0\t1\t2\n", "line 2: expected 40 tab-separated fields.*got 3"),
        (line(label=2), "line 2: the label must be 0 or 1, got '2'"),
        (line(dense="x"), "line 2: field 2 must be an integer or empty, got 'x'"),
        (line(category="xyz"), "line 2: field 15 must be a hexadecimal category or empty, got 'xyz'"),
        (line(dense=" 1"), "line 2: field 2 must be an integer"),
        (line(dense="1_0"), "line 2: field 2 must be an integer"),
        (line(category="0x1f"), "line 2: field 15 must be a hexadecimal category"),
        (line(category="-1"), "line 2: field 15 must be a hexadecimal category"),
        (line(dense=1 << 70), "line 2: field 2 must be an integer"),
        ("1" * 5000, "line 2: longer than 4096 bytes"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, bad, message):
    source = CriteoSource(write(tmp_path, line() + bad + line() * 200), 2, rows=10, held_out_share=0.1)
    with pytest.raises(DataError, match=message):
        list(source.train_batches())


def test_a_missing_file_and_bad_sizes_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        CriteoSource(tmp_path / "none", 1)
    path = write(tmp_path, line())
    for field, value in (("rows", 0), ("batch_size", 0), ("held_out_share", 1.0)):
        with pytest.raises(ConfigurationError, match=field):
            CriteoSource(path, **{"batch_size": 1, field: value})


def test_less_than_a_batch_is_refused(tmp_path):
    with pytest.raises(DataError, match="less than one batch of 50"):
        list(CriteoSource(write(tmp_path, line() * 10), 50).train_batches())
