"""The format on disk is the one that docs/format.md describes."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch
from torchrec_mtrains.kernels import SsdVolume

DOCUMENT = Path(__file__).parent.parent / "docs" / "format.md"


def test_the_worked_example_is_what_a_volume_writes() -> None:
    example = re.findall(r"^00([0-9a-f]{4})  ((?:[0-9a-f]{2} ){16})", DOCUMENT.read_text(), re.MULTILINE)
    assert [offset for offset, _ in example] == ["1000", "1010", "1020", "1030"]
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        volume = SsdVolume((folder,), 64 << 20)
        table = volume.table("t", row_count=4, record_bytes=8)
        table.put(torch.tensor([2, 0]), torch.tensor([[1] * 8, [2] * 8], dtype=torch.uint8))
        volume.checkpoint(1)
        volume.close()
        segment = (Path(folder) / "segment_00000001.log").read_bytes()
        manifest = (Path(folder) / "manifest_0000000000000001.bin").read_bytes()
        assert sorted(p.name for p in Path(folder).iterdir()) == [
            "manifest_0000000000000001.bin",
            "segment_00000001.log",
            "volume.lock",
        ]
    for offset, numbers in example:
        at = int(offset, 16)
        assert segment[at : at + 16] == bytes.fromhex(numbers)
    assert not any(segment[0x1040 : 4096 + 4096])
    tail = re.findall(r"^ {9}((?:[0-9a-f]{2} )+)", DOCUMENT.read_text(), re.MULTILINE)
    assert manifest[-36:-4] == bytes.fromhex("".join(tail))
