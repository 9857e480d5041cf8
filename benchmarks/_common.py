"""What every benchmark prints and how it times: machine, versions, medians of interleaved runs."""

from __future__ import annotations

import argparse
import json
import operator
import os
import platform
import resource
import statistics
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from torchrec_mtrains.meters import processor_name


def machine() -> dict[str, Any]:
    """Processor, cores, memory and versions, for the head of a report."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = {p: version(p) for p in ("torch", "torchrec", "torchrec-mtrains")}
    return {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_gib, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        "libgomp_spins": os.environ.get("GOMP_SPINCOUNT", "its own number"),
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


class ZipfIds:
    """Ids drawn with probability ∝ rank^-exponent over all ``rows``, ranks scattered by a shuffle."""

    def __init__(self, rows: int, exponent: float, generator: torch.Generator) -> None:
        self.generator = generator
        self.cdf = torch.arange(1, rows + 1, dtype=torch.float64).pow(-exponent).cumsum(0)
        self.row_of_rank = torch.randperm(rows, generator=generator)

    def by(self, generator: torch.Generator) -> ZipfIds:
        """The same law and popular rows, drawn by another generator, on its device."""
        other = copy(self)
        other.generator, other.cdf, other.row_of_rank = generator, self.cdf.to(generator.device), self.row_of_rank.to(generator.device)
        return other

    def draw(self, count: int) -> torch.Tensor:
        """Shape (count,) int64."""
        return self.row_of_rank[self.ranks(count)]

    def ranks(self, count: int) -> torch.Tensor:
        """Shape (count,) int64."""
        draws = torch.rand(count, dtype=torch.float64, generator=self.generator, device=self.cdf.device) * self.cdf[-1]
        return torch.searchsorted(self.cdf, draws).clamp_(max=len(self.cdf) - 1)


@dataclass(frozen=True)
class Figure:
    """One line of a report: what was measured, and the goal it is held against (``"≥ 0.97"``; empty: reported only)."""

    name: str
    value: float
    goal: str = ""
    digits: int = 2

    @property
    def met(self) -> bool | None:
        if not self.goal:
            return None
        sign, limit = self.goal.split()
        return {"≥": operator.ge, "≤": operator.le, "<": operator.lt}[sign](self.value, float(limit))


def print_figures(figures: list[Figure]) -> None:
    """A table of figures: measured, goal, whether it was met."""
    width = max(len(f.name) for f in figures)
    print(f"{'figure':<{width}}  {'measured':>12}  {'goal':>8}")
    for f in figures:
        verdict = {None: "", True: "met", False: "MISSED"}[f.met]
        print(f"{f.name:<{width}}  {f.value:>12,.{f.digits}f}  {f.goal:>8}  {verdict}".rstrip())


def cpu_seconds() -> float:
    """Processor time of the whole process: its I/O threads are part of the cost."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@dataclass
class Turn:
    """What one subject did in its turn. ``device_bytes`` is what the kernel fetched from storage for this process."""

    rows: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    device_bytes: int = 0

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.seconds


def take_turn(at_least_s: float, prepare: Callable[[], Any], work: Callable[[Any], int]) -> Turn:
    """Repeats ``work``, which returns the rows it did, until it has run for that long; what ``prepare`` does is not counted."""
    turn = Turn()
    while turn.seconds < at_least_s:
        prepared = prepare()
        start, cpu, fetched = perf_counter(), cpu_seconds(), own_io_bytes()[0]
        turn.rows += work(prepared)
        turn.seconds += perf_counter() - start
        turn.cpu_seconds += cpu_seconds() - cpu
        turn.device_bytes += own_io_bytes()[0] - fetched
    return turn


def own_io_bytes() -> tuple[int, int]:
    """Bytes that this process had read from and written to storage, page cache hits left out (/proc/self/io)."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])


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
