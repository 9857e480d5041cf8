"""Trains ml-100k twice, from an SSD with the smallest pools that its batches allow and whole in memory, and compares bit for bit.

python examples/movielens_twice.py --ssd /mnt/nvme0
"""

import argparse
import sys
from pathlib import Path

from torchrec_mtrains import demo, show
from torchrec_mtrains.data.fetch import fetch_ml_100k
from torchrec_mtrains.errors import MTrainsError
from torchrec_mtrains.process_group import process_group
from torchrec_mtrains.report import write_report

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--ssd", help="folder on an SSD (default: among the temporary files)")
parser.add_argument("--cache", default=".cache/movielens", help="folder for ml-100k (default: %(default)s)")
parser.add_argument("--batch-size", type=int, default=demo.ML_BATCH_SIZE, help="default: %(default)s")
parser.add_argument("--epochs", type=int, default=demo.ML_EPOCHS, help="default: %(default)s")
parser.add_argument("--report", type=Path, help="write the tiered run's report to this HTML file")
args = parser.parse_args()
show.quiet()

try:
    file = fetch_ml_100k(args.cache)
    with process_group() as pg, demo.ssd_folder(args.ssd) as folder:
        twins = demo.movielens(file, folder, pg, batch_size=args.batch_size, epochs=args.epochs)
    if args.report:
        print("report:", write_report(twins.tiered, args.report))
except MTrainsError as e:
    sys.exit(f"movielens_twice: {e}")
