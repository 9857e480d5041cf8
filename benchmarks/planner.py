"""The planner against training in one run: a table, JSON and a picture.

Sections: predictions (step times and miss ratios of many configurations, by the real kernel; ``benchmarks/_planner_predictions.py``).
docs/calibrate.md says what the figures mean.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from torchrec_mtrains.planner import HardwareProfile

import torchrec_mtrains as mtrains
from _common import finish, options, print_figures, print_machine
from _planner_picture import draw
from _planner_predictions import CONFIGURATIONS, FULL, QUICK, Configuration, figures, measure
from torchrec_mtrains.calibration import QUICK as QUICK_CALIBRATION
from torchrec_mtrains.show import quiet

QUICK_CONFIGURATIONS = (Configuration(2, 1.05, 64, 0.1), Configuration(2, 0.9, 64, 1.0), Configuration(2, 1.05, 64, 0.1, 0.3))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--path", type=Path, default=Path.cwd(), help="a folder on the disk to measure")
    parser.add_argument("--pmem-path", type=Path, default=Path("/dev/shm"), help="a folder on PMem or tmpfs for caches")
    parser.add_argument("--hardware", type=Path, help="a profile of this machine by mtrains calibrate; made now if left out")
    parser.add_argument("--picture", type=Path, help="also draw the figures into this PNG")
    args = parser.parse_args()
    quiet()
    facts, start = print_machine(), perf_counter()
    with tempfile.TemporaryDirectory(dir=args.path) as root, tempfile.TemporaryDirectory(dir=args.pmem_path) as pmem:
        if args.hardware:
            hardware = HardwareProfile.load(args.hardware)
        elif args.quick:
            hardware = mtrains.calibrate((root,), pmem, effort=QUICK_CALIBRATION)
        else:
            hardware = mtrains.calibrate((root,), pmem)
        print(f"calibrated after {perf_counter() - start:,.0f} s", flush=True)
        jobs, size = (QUICK_CONFIGURATIONS, QUICK) if args.quick else (CONFIGURATIONS, FULL)
        found = measure(Path(root), Path(pmem), hardware, jobs, size)
    lines = [replace(f, goal="") if args.quick else f for f in figures(found)]
    print(f"== figures, after {perf_counter() - start:,.0f} s")
    print_figures(lines)
    if args.picture:
        draw(args.picture, found)
        print(f"drawn: {args.picture}")
    values = {f.name: {"value": f.value, "goal": f.goal, "met": f.met} for f in lines}
    finish(args, facts, {"sections": {"predictions": found}, "figures": values})


if __name__ == "__main__":
    main()
