"""Gets ml-100k (100,000 ratings, 2 MB) by pip, from the wheel of RecBole 1.2.1, into a cache folder, and prints where it is.

python examples/get_movielens.py [FOLDER]
"""

import sys

from torchrec_mtrains.data.fetch import fetch_ml_100k
from torchrec_mtrains.errors import DataError

try:
    print(fetch_ml_100k(sys.argv[1] if len(sys.argv) > 1 else ".cache/movielens"))
except DataError as e:
    sys.exit(f"get_movielens: {e}")
