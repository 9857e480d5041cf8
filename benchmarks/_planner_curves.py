"""How well a sample of a table's rows stands for all of them: curves of ``mtrains profile`` from both, on the same batches.

A table is measured twice, with the sample that a profile takes (1%, but at least 50,000 rows) and with every row; the second is the
slot pools' own count, miss for miss (``tests/test_table_profiler.py``). Errors are of misses ÷ unique rows, over the pool sizes of the
curve that can hold a batch and evict at all. LRU is also held against libcachesim's, where that is installed
(pip install libcachesim==0.3.5): all rows, at ``POINTS_OF_LIBCACHESIM`` sizes spread over the curve. As in a pool, all of a batch is looked
up before the batch changes what is there.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from torchrec_mtrains.planner import MissCurve

from _common import Figure
from _train_misses import Uses, uses_of
from _train_traces import Stretch, Trace, traces
from torchrec_mtrains.data import TableShape
from torchrec_mtrains.profiling import LOOKAHEADS, ProfileOptions, TableMeter

POINTS_OF_LIBCACHESIM = 3


def _profiled(trace: Trace, sample_share: float) -> tuple[dict[str, MissCurve], float, float]:
    """Curves by policy, unique rows a batch, seconds."""
    batches, lookups = trace.ids.shape
    meter = TableMeter(TableShape(trace.name, trace.name, trace.rows), lookups, batches, ProfileOptions(sample_share=sample_share))
    start = perf_counter()
    for ids in trace.ids:
        meter.push(ids)
    access = meter.access(ended=True)
    curves = {f"lookahead {window}": curve for window, curve in zip(LOOKAHEADS, access.miss_curves, strict=True)}
    return {**curves, "LRU": access.lru_miss_curve}, access.unique_rows_per_batch, perf_counter() - start


def _libcachesim(uses: Uses, pool_rows: int) -> float:
    """Misses a batch in the second half of the batches."""
    import libcachesim

    cache, request = libcachesim.LRU(cache_size=pool_rows), libcachesim.Request()
    request.obj_size = 1
    missed, half = 0, len(uses) // 2
    for b, used in enumerate(uses):
        for look_up in (True, False):
            for row in used.tolist():
                request.obj_id = row
                if look_up:
                    missed += b >= half and cache.find(request, update_cache=False) is None
                else:
                    cache.get(request)
    return missed / (len(uses) - half)


def _compared(trace: Trace, sample_share: float) -> list[dict[str, Any]]:
    (sampled, unique, sampled_seconds), (whole, _, whole_seconds) = (_profiled(trace, share) for share in (sample_share, 1.0))
    lines = []
    for policy, exact in whole.items():
        sizes = [p for p in exact.pool_rows[1:-1] if p in sampled[policy].pool_rows]
        ratios = {p: (sampled[policy].misses(p) / unique, exact.misses(p) / unique) for p in sizes}
        lines.append({"policy": policy, "against": "every row", "ratios": ratios})
    if find_spec("libcachesim"):
        uses, curve = uses_of(trace), sampled["LRU"]
        sizes = curve.pool_rows[1:-1]
        few = [sizes[round(k)] for k in np.linspace(0, len(sizes) - 1, min(len(sizes), POINTS_OF_LIBCACHESIM))]
        ratios = {p: (curve.misses(p) / unique, _libcachesim(uses, p) / unique) for p in few}
        lines.append({"policy": "LRU", "against": "libcachesim", "ratios": ratios})
    for line in lines:
        errors = np.array([abs(a - b) for a, b in line["ratios"].values()])
        line |= {"trace": trace.name, "rows": trace.rows, "sampled_share": sampled["LRU"].sampled_share, "unique_rows_per_batch": unique}
        line |= {"mean_error": float(errors.mean()), "largest_error": float(errors.max()), "points": len(errors)}
        line |= {"sampled_seconds": sampled_seconds, "whole_seconds": whole_seconds}
    return lines


def run(
    *,
    rows: int,
    lookups: int,
    batches: int,
    movielens: Path | None,
    copies: int,
    sample_share: float = 0.01,
    only: list[str] | None = None,
) -> list[dict[str, Any]]:
    """A line a trace, policy and what it is held against. ``only``: some of the traces by name."""
    stretch = Stretch(batches // 2, batches - batches // 2, 0)
    made = traces(rows, lookups, stretch, movielens, copies, 0)
    _print_line("trace", "policy", "against", "sampled", "points", "mean error", "largest", "s", "s, all rows")
    lines = []
    for name in only or list(made):
        for line in _compared(made[name](), sample_share):
            errors = f"{line['mean_error']:.4f}", f"{line['largest_error']:.4f}"
            seconds = f"{line['sampled_seconds']:.1f}", f"{line['whole_seconds']:.1f}"
            _print_line(line["trace"], line["policy"], line["against"], f"{line['sampled_share']:.1%}", line["points"], *errors, *seconds)
            lines.append(line)
    return lines


def _print_line(name: str, *cells: object) -> None:
    print(f"{name:<22}" + "".join(f"{c!s:>13}" for c in cells), flush=True)


def figures(lines: list[dict[str, Any]]) -> list[Figure]:
    """The mean error over all traces, by policy and what it is held against; and that of the worst trace."""
    kinds = sorted({(line["policy"], line["against"]) for line in lines})
    made = []
    for policy, against in kinds:
        errors = [line["mean_error"] for line in lines if (line["policy"], line["against"]) == (policy, against)]
        made.append(Figure(f"sampled curve against {against}: {policy}, mean error of the miss ratio", float(np.mean(errors)), "≤ 0.02", 4))
        made.append(Figure(f"sampled curve against {against}: {policy}, of the worst trace", max(errors), "≤ 0.02", 4))
    return made
