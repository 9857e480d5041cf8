"""The last bytes: sizes that ``fill`` makes larger stay within every tier, to the byte."""

from __future__ import annotations

import numpy as np
from torchrec.distributed.planner.types import Storage
from torchrec_mtrains.planner import PmemDevice, TieredEnumerator, TieredTopology
from torchrec_mtrains.planner.charges import PAGE_BYTES
from torchrec_mtrains.planner.filling import fill
from torchrec_mtrains.planner.perf_model import RESOURCES
from torchrec_mtrains.planner.sharding_options import TieredShardingOption

from planner_cases import PLENTY, Case, TableCase
from torchrec_mtrains import SsdHome

RECORD_BYTES = 4 * (32 + 1)
WHOLE_PAGES = PAGE_BYTES // 4  # records of 33 × 4 bytes in whole pages


def test_caches_that_grow_into_the_last_bytes_of_pmem_take_no_page_more() -> None:
    """Each cache begins at whole pages, so that what it grows by begins another; with as many tables, no device has a page a table to
    spare, at whichever byte its room ends."""
    case = Case([TableCase(40_000, 32)] * 8)
    topology = TieredTopology(1, ddr_budget_bytes=PLENTY, ssd=SsdHome(("/nowhere",), PLENTY), pmem=PmemDevice("/pmem", PLENTY))
    options = TieredEnumerator(topology, case.batch_size, case.constraints()).enumerate(case.model(), case.sharders())
    plan = [o.resized(100, WHOLE_PAGES) for o in options if isinstance(o, TieredShardingOption)]
    for option in plan:
        option.shards[0].rank = 0
        assert option.pmem_bytes_of(0, WHOLE_PAGES) == WHOLE_PAGES * RECORD_BYTES
    ddr = Storage(hbm=0, ddr=sum(o.total_storage.ddr for o in plan) + (8 << 20))
    begun = sum(o.pmem_bytes_of(0, o.cache_rows) for o in plan)
    for more in range(600_000, 600_000 + 2 * PAGE_BYTES, 331):
        filled = fill(plan, [ddr], begun + more, np.ones(len(RESOURCES)))
        taken = [o.pmem_bytes_of(0, o.cache_rows) for o in filled]
        assert sum(taken) <= begun + more
        assert sum(taken) > begun + more - 3 * PAGE_BYTES, "what is left is used"
        assert sum(o.total_storage.ddr for o in filled) <= ddr.ddr
        assert all(o.cache_rows > WHOLE_PAGES for o in filled)
