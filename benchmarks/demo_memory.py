"""The demo's memory, measured from outside, and whether its reads reached the device.

Runs ``mtrains demo`` on the synthetic tables and once more on tables of one row. The difference of the peaks is what 15
budgets' worth of tables cost in memory: it must stay within the budget. And the volume's own counters are compared with what
/proc/diskstats says of the device: with O_DIRECT no page cache stands between.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import finish, options, print_machine

MIB = 1 << 20


def peak_rss_bytes(command: list[str]) -> int:
    """Run a command to its end and return its peak resident memory, as ``/usr/bin/time -v`` measures it.

    Raises: SystemExit with the command's output when it fails.
    """
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{output.read()}")
        return usage.ru_maxrss * 1024


def demo(folder: Path, ssd: str | None, *more: str) -> tuple[int, dict[str, Any]]:
    """Peak memory of one demo, and its figures."""
    command = [sys.executable, "-m", "torchrec_mtrains.cli", "demo", "--skip-movielens", "--out", str(folder), *more]
    peak = peak_rss_bytes(command + (["--ssd", ssd] if ssd else []))
    return peak, json.loads((folder / "synthetic.json").read_text())


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--ssd", help="folder on an SSD; among the temporary files if left out")
    args = parser.parse_args()
    facts = print_machine()
    steps = ["--steps", "2"] if args.quick else []
    with tempfile.TemporaryDirectory() as folder:
        by_itself, _ = demo(Path(folder), args.ssd, "--one-row-tables", *steps)
        peak, figures = demo(Path(folder), args.ssd, *steps)
    budget, volumes, device = figures["ddr_budget_bytes"], figures["volumes"], figures["device"]
    read = sum(v["read_bytes"] for v in volumes)
    print(f"peak resident memory: {peak / MIB:,.0f} MiB; of the same program on one-row tables: {by_itself / MIB:,.0f} MiB")
    tables, cost, written = figures["table_bytes"], peak - by_itself, figures["written_row_bytes"]
    print(f"the tables ({tables / MIB:,.0f} MiB) cost {cost / MIB:,.0f} MiB of a budget of {budget / MIB:,.0f} MiB")
    print(f"distinct rows written: {written / budget:.1f} × the budget, {written / peak:.2f} × the peak")
    if device is None:
        print("the kernel shows no device for this folder: nothing to compare the volume's reads with")
    else:
        seen = device["read_bytes"]
        print(f"read: {read / MIB:,.0f} MiB by the volume's count, {seen / MIB:,.0f} MiB by /proc/diskstats of {device['device']}")
    finish(args, facts, {"peak_rss_bytes": peak, "one_row_peak_rss_bytes": by_itself, **figures})
    if peak > by_itself + budget:
        sys.exit("FAILED: the tables cost more memory than their budget")
    if device is not None and device["read_bytes"] < 0.95 * read:
        sys.exit("FAILED: the device was read less than the volume says; were the reads answered from memory?")


if __name__ == "__main__":
    main()
