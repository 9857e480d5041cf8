"""Cold random reads: rows a second of each store and of the bare device, in turns.

Batches of unique random rows. The ceiling is the volume's own I/O engine reading random pages at the same depth from a file as
large as the volume, with nothing above it. Turns last at least ``seconds`` each and their order is drawn anew every round;
figures are medians over the rounds, ratios are of the same round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torchrec_mtrains.kernels import _core

from _common import Figure, Turn, median, take_turn
from _subjects import Lmdb, Mapped, RocksDb, Ssd, first_bytes
from torchrec_mtrains.calibration.block_device import PAGE_BYTES, write_noise

PEERS: dict[str, Any] = {"rocksdb": RocksDb, "lmdb": Lmdb, "mmap": Mapped}


def measure(
    root: Path, *, rows: int, record_bytes: int, batch: int, depth: int, seconds: float, rounds: int, peers: tuple[str, ...]
) -> dict[str, Any]:
    """``peers``: those of ``PEERS`` that take part, each on 1 and on 16 threads."""
    rng = np.random.default_rng(0)
    ssd = Ssd(root / "volume", rows, record_bytes, depth)
    made = {"ours": ssd, **{peer: PEERS[peer](root / peer, rows, record_bytes) for peer in peers}}
    subjects = {"ours": (ssd, 1)} | {f"{peer}_{threads}": (made[peer], threads) for peer in peers for threads in (1, 16)}
    raw = root / "raw"
    write_noise(raw, ssd.volume.stats()["disk_bytes"])

    def turn(name: str, round_: int) -> Turn:
        if name == "ceiling":
            probe = _core.random_io([str(raw)], PAGE_BYTES, depth, 1.0, seconds, ssd.volume.backend, round_)
            return Turn(probe.operations, probe.seconds, probe.cpu_seconds, probe.operations * PAGE_BYTES)
        subject, threads = subjects[name]
        subject.on(threads)
        drawn: list[np.ndarray] = []

        def prepare() -> Any:
            subject.forget()
            drawn.append(rng.choice(rows, batch, replace=False))
            return subject.prepare(drawn[-1])

        def read(prepared: Any) -> int:
            got = subject.read(prepared)
            assert np.array_equal(got, first_bytes(drawn[-1])), f"{name} read wrong rows"
            return len(got)

        return take_turn(seconds, prepare, read)

    names = ["ceiling", *subjects]
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    reads_before = ssd.volume.stats()
    for round_ in range(rounds + 1):
        for name in rng.permutation(names):
            result = turn(str(name), round_)
            if round_ > 0:  # the first turn also pays for what the subjects set up
                turns[name].append(result)
        if round_ == 0:
            reads_before = ssd.volume.stats()
    counted = {k: ssd.volume.stats()[k] - reads_before[k] for k in ("get_rows", "read_ios")}
    facts = {"backend": ssd.volume.backend, "direct": ssd.volume._native.direct(), "depth": depth, "rows": rows}
    facts |= {"record_bytes": record_bytes, "batch": batch}
    for subject in made.values():
        subject.close()
    per_io = counted["get_rows"] / max(1, counted["read_ios"])

    def ratios(name: str) -> float:
        return median([a.rows_per_s / b.rows_per_s for a, b in zip(turns["ours"], turns[name], strict=True)])

    return {
        **facts,
        "rows_per_io": per_io,
        "subjects": {
            name: {
                "rows_per_s": median([t.rows_per_s for t in ts]),
                "cpu_us_per_row": median([t.cpu_seconds / t.rows for t in ts]) * 1e6,
                "device_bytes_per_row": median([t.device_bytes / t.rows for t in ts]),
            }
            for name, ts in turns.items()
        },
        "ours_over": {name: ratios(name) for name in names if name != "ours"},
        "ios_over_ceiling": ratios("ceiling") / per_io,
    }


def show(f: dict[str, Any]) -> None:
    print(f"{f['rows']:,} rows of {f['record_bytes']} bytes, batches of {f['batch']:,}, {f['backend']} at depth {f['depth']}")
    print(f"O_DIRECT {f['direct']}, {f['rows_per_io']:.3f} rows a read of ours")
    print(f"{'':<12}{'rows/s':>12}{'µs CPU a row':>15}{'device bytes a row':>21}")
    for name, s in f["subjects"].items():
        print(f"{name:<12}{s['rows_per_s']:>12,.0f}{s['cpu_us_per_row']:>15.2f}{s['device_bytes_per_row']:>21,.0f}")


def figures(f: dict[str, Any]) -> list[Figure]:
    over, goals = f["ours_over"], {"ceiling": "≥ 0.97", "rocksdb_1": "≥ 4", "rocksdb_16": "≥ 1.15"}
    lines = [Figure(f"cold reads: ours ÷ {name}", value, goals.get(name, "")) for name, value in over.items()]
    lines.insert(1, Figure("cold reads: reads of ours ÷ ceiling", f["ios_over_ceiling"], "≥ 0.97"))
    return [*lines, Figure("cold reads: µs of CPU a row (idle machine)", f["subjects"]["ours"]["cpu_us_per_row"], "≤ 2.6")]
