"""``mtrains calibrate``: measures this machine, shows what it found, and writes the profile that plans are made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .command import require_writable, typed_errors

if TYPE_CHECKING:
    from rich.table import Table

    from .planner import BlockDeviceProfile, HardwareProfile, KernelCosts, MemoryProfile


@click.command()
@click.option("--path", "paths", multiple=True, metavar="PATH", help="Folder on an SSD that tables will live on; repeat as for --ssd.")
@click.option("--pmem-path", default=None, metavar="PATH", help="Folder on PMem, CXL memory or tmpfs that caches will live on.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), default="hardware.json", show_default=True, help="The profile.")
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that it runs; the numbers say nothing.")
@typed_errors
def calibrate(paths: tuple[str, ...], pmem_path: str | None, output: str, quick: bool) -> None:
    """Measure this machine for the planner, about half a minute. Writes 1 GiB to each --path meanwhile, and nothing stays."""
    from tqdm import tqdm

    from .calibration import FULL, QUICK
    from .calibration import calibrate as measure
    from .show import console

    require_writable("--output", output)

    with tqdm(desc="calibrating", bar_format="{desc}: {elapsed}{postfix}", dynamic_ncols=True) as bar:

        def say(what: str) -> None:
            bar.update()
            bar.set_postfix_str(what)

        profile = measure(paths, pmem_path, effort=QUICK if quick else FULL, say=say)
    profile.save(Path(output))
    out = console()
    out.print(f"{profile.machine}, {profile.date}")
    for table in tables(profile):
        out.print(table)
    for line in warnings(profile):
        out.print(line)
    out.print(f"written: {output}")


RESTLESS = 1.3
"""Most ÷ least of a device's rounds, beyond which its profile is said to be of a device that had not settled. A guess: plans change little
below."""


def warnings(profile: HardwareProfile) -> list[str]:
    """What makes the profile less sure than it looks."""
    said = []
    for p in profile.ssd.points if profile.ssd else ():
        if p.read_share == 1 and p.operations_per_s_least_most:
            least, most = p.operations_per_s_least_most
            if most > RESTLESS * least:
                said.append(f"{p.block_bytes >> 10} KiB at depth {p.queue_depth}: {least:,.0f} to {most:,.0f}")
    if not said or profile.ssd is None:
        return []
    return [
        f"{profile.ssd.name} has not settled: its random reads a second differed from round to round ({'; '.join(said)}). It is shared, "
        "busy, or gives credit after idling: plans are as uncertain, so calibrate again when it is quiet."
    ]


def tables(profile: HardwareProfile) -> list[Table]:
    """What was measured, for people; what was not is not there."""
    ssd = [_block_device(profile.ssd)] if profile.ssd else []
    return [_memories([m for m in (profile.hbm, profile.ddr, profile.pmem) if m]), *ssd, _kernel(profile.kernel)]


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _memories(memories: list[MemoryProfile]) -> Table:
    table = _table("memory", "", "read GB/s", "write GB/s", "latency ns", "rows/s of 256 bytes")
    for m in memories:
        latency = "" if m.latency_ns is None else f"{m.latency_ns:,.0f}"
        rates = (f"{x / 1e9:,.1f}" for x in (m.read_bytes_per_s, m.write_bytes_per_s))
        table.add_row(m.name, *rates, latency, f"{m.random_rows_per_s(256):,.0f}")
    return table


def _block_device(device: BlockDeviceProfile) -> Table:
    table = _table(device.name, "block", "reads", "depth", "operations/s", "MB/s", "µs p50", "µs p99")
    for p in device.points:
        latencies = ("" if us is None else f"{us:,.0f}" for us in (p.latency_us_p50, p.latency_us_p99))
        rate = (f"{p.operations_per_s:,.0f}", f"{p.operations_per_s * p.block_bytes / 1e6:,.0f}")
        table.add_row(f"{p.block_bytes >> 10} KiB", f"{p.read_share:.0%}", str(p.queue_depth), *rate, *latencies)
    return table


def _kernel(kernel: KernelCosts) -> Table:
    table = _table("kernel", "", "ns")
    lines: dict[str, Any] = {
        "a lookup": kernel.cpu_ns_per_lookup,
        "a row missed": kernel.cpu_ns_per_miss,
        "a read of the SSD": kernel.cpu_ns_per_io,
        "a row written back to the SSD": kernel.cpu_ns_per_write_back,
        "a row from a PMem cache": kernel.cpu_ns_per_cache_hit,
        f"TBE forward, a lookup of 256 bytes, {kernel.tbe_threads} threads": 1e9 * kernel.tbe_forward_s(1, 256),
        f"TBE backward, a lookup of 256 bytes, {kernel.tbe_threads} threads": 1e9 * kernel.tbe_backward_s(1, 256),
        "a step with a tiered group": 1e3 * kernel.step_overhead_us_per_group,
        "a step, each further table": 1e3 * kernel.step_overhead_us_per_table,
        "a step, tables in memory beside tiered ones": 1e3 * kernel.step_overhead_us_per_stock_group,
    }
    for name, ns in lines.items():
        if ns is not None:
            table.add_row(name, f"{ns:,.1f}")
    return table
