"""Time of a training step: tiered tables against all of them in HBM, against stock UVM caching, and against what the bus allows."""

from __future__ import annotations

import gc
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec_mtrains.kernels.device_tbe import DeviceTBE

from _common import median
from _gpu_groups import DEVICE, Batches, Loop, Shape, fused, tiered
from torchrec_mtrains.tiers import Cache, DdrCache, Home, SsdHome

ROUNDS = 9
SLEEP_CYCLES, STEPS_ASLEEP = 40_000_000, 10
"""How long the device sleeps while the host launches so many steps."""


def touch_all(tbe: DeviceTBE, shape: Shape) -> None:
    """Every row comes into the pool once, so that what is in no slot is below it with its value, not an initial one."""
    step, tables = tbe.pool_rows[0] // 2, len(shape.dims)
    for first in range(0, shape.rows, step):
        rows = torch.arange(first, min(first + step, shape.rows), device=DEVICE)
        ticket = tbe._begin(rows.repeat(tables), torch.arange(tables + 1, device=DEVICE) * rows.numel(), None, True)
        assert ticket is not None
        tbe._pool.wait(ticket.seq)
        tbe._pool.release(ticket.seq)


def counts(tbe: DeviceTBE) -> dict[str, int]:
    """Rows since creation, over all tables, and I/Os."""
    sums = {k: sum(s[k] for s in tbe.stats()) for k in ("unique_rows", "misses", "evictions")}
    read_ios = sum(v["read_ios"] for v in tbe.volume_stats())
    return {**sums, "misses_to_home": sum(tiers[1]["misses"] for tiers in tbe.tier_stats()), "read_ios": read_ios}


def measure(tbe: Any, batches: Batches, warm_up: int, steps: int, prefetch: bool, all_hbm: Loop | None = None) -> dict[str, Any]:
    """Milliseconds a step, and the rows that moved. Ours: with the lookahead that its pools can use; without it, where they can use
    some; and with a thread of its own for prefetching. ``all_hbm`` takes turns with it: hosts are not equally fast all the time."""
    loop = Loop(tbe, batches, prefetch)
    result = timed(loop, warm_up, steps, all_hbm)
    if isinstance(tbe, DeviceTBE):
        if ahead := tbe.useful_lookahead:
            loop.lookahead = ahead
            result = {"lookahead": ahead, "without lookahead": result, **timed(loop, warm_up, steps, all_hbm)}
        else:
            result["ms_of_device"] = milliseconds_of_device(loop)
        loop.thread = ThreadPoolExecutor(1)
        loop.step()
        threaded = timed(loop, 0, steps, all_hbm)
        result |= {f"{k}_threaded": threaded[k] for k in ("ms", "all_hbm_ms") if k in threaded}
    return result


def timed(loop: Loop, warm_up: int, steps: int, all_hbm: Loop | None) -> dict[str, Any]:
    """Milliseconds a step: of rounds, and their median; of tiered tables the rows that moved, too."""
    for _ in range(warm_up):
        loop.step()
    torch.cuda.synchronize()
    ours = isinstance(loop.tbe, DeviceTBE)
    before = counts(loop.tbe) if ours else {}
    times, beside = [], []
    for _ in range(ROUNDS):
        times.append(loop.milliseconds(steps))
        if all_hbm is not None:
            beside.append(all_hbm.milliseconds(steps))
    after = counts(loop.tbe) if ours else {}
    moved = {f"{k}_per_step": (after[k] - before[k]) / (ROUNDS * steps) for k in before}
    hbm = {} if all_hbm is None else {"all_hbm_ms": median(beside), "all_hbm_ms_of_rounds": beside}
    return {"ms": median(times), "ms_of_rounds": times, **hbm, **moved}


def milliseconds_of_device(loop: Loop) -> float:
    """Of a step whose launches cost no time: they are queued while the device sleeps. For steps in which the host waits for nothing."""
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
        times.append(loop.milliseconds(STEPS_ASLEEP, synchronize=False))
    return median(times)


def footprint(shape: Shape, batches: Batches) -> float:
    """The share of all rows that the batches use."""
    by_table = torch.stack([ids.view(len(shape.dims), -1) for ids in batches.ids])
    return sum(by_table[:, t].unique().numel() for t in range(len(shape.dims))) / (shape.rows * len(shape.dims))


def of_stock(
    shape: Shape, optimizer: EmbOptimType, batches: Batches, warm_up: int, steps: int, share: float | None = None
) -> dict[str, Any]:
    """The stock TBE: all in HBM, or that share of its rows cached there."""
    tbe = fused(shape, optimizer, share, values=False)
    result = measure(tbe, batches, warm_up, steps, share is not None)
    if share is None:
        result["ms_of_device"] = milliseconds_of_device(Loop(tbe, batches, False))
    del tbe
    _free()
    return result


def of_tiered(
    shape: Shape, optimizer: EmbOptimType, batches: Batches, warm_up: int, steps: int, share: float, *below: Cache | Home
) -> dict[str, Any]:
    """Ours, with that share of the rows in the pool, in turns with the stock TBE all in HBM."""
    tbe = tiered(shape, optimizer, int(shape.rows * share), *below)
    touch_all(tbe, shape)
    all_hbm = Loop(fused(shape, optimizer, values=False), batches, False)
    result = measure(tbe, batches, warm_up, steps, True, all_hbm)
    result["record_bytes"] = tbe.stats()[0]["record_bytes"]
    tbe.close_caches()
    del tbe, all_hbm
    _free()
    return result


def on_ssd(shape: Shape, optimizer: EmbOptimType, batches: Batches, warm_up: int, steps: int, folder: str) -> dict[str, Any]:
    """Ours with 10% in HBM, 20% in DDR and the rest on the SSD; and the reads a step."""
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        home = SsdHome((inside,), capacity_bytes=30 << 30)
        return of_tiered(shape, optimizer, batches, warm_up, steps, 0.1, DdrCache(int(shape.rows * 0.2)), home)


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
