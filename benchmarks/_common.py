"""What every benchmark prints and how it times: machine, versions, medians of interleaved runs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Processor, cores, memory and versions, for the head of a report."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = {p: version(p) for p in ("torch", "torchrec", "torchrec-mtrains")}
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory_gib, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        **packages,
    }


def print_machine() -> dict[str, Any]:
    """Prints machine() on one line and returns it."""
    facts = machine()
    print("machine: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    return facts


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = perf_counter()
    run()
    return perf_counter() - start


def median(values: list[float]) -> float:
    return statistics.median(values)


def bounded_zipf(rows: int, exponent: float, count: int, generator: torch.Generator) -> torch.Tensor:
    """Ids drawn with probability ∝ rank^-exponent over all `rows`, ranks scattered by a shuffle. Shape (count,) int64."""
    weights = torch.arange(1, rows + 1, dtype=torch.float64).pow(-exponent)
    cdf = weights.cumsum(0)
    ranks = torch.searchsorted(cdf, torch.rand(count, dtype=torch.float64, generator=generator) * cdf[-1])
    return torch.randperm(rows, generator=generator)[ranks.clamp_(max=rows - 1)]


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser with the two options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that the benchmark runs, not how fast we are")
    return parser


def finish(args: argparse.Namespace, facts: dict[str, Any], figures: dict[str, Any]) -> None:
    """Writes the JSON if asked for."""
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, "figures": figures}, indent=2) + "\n")
        print(f"written: {args.json}")
