"""``resize``: another pool size for a table, while a job runs."""

from __future__ import annotations

from torch import nn

from .errors import ConfigurationError
from .groups import tiered_collections


def resize(module: nn.Module, table: str, *, pool_rows: int) -> None:
    """Gives the pools of a tiered table ``pool_rows`` rows on every rank that calls it; at a step boundary.

    The rows in the pools stay there, those that were used last where not all fit. What was prefetched is prefetched anew by its
    forward. The counters of the tables in the same TBE begin anew.

    Raises: ConfigurationError when ``module`` has no such tiered table, or for a size that cannot be; TicketError while forward
    passes await their backward.
    """
    collections = list(tiered_collections(module))
    known = sorted({name for c in collections for name in c.tiered_tables()})
    if table not in known:
        raise ConfigurationError(f"there is no tiered table {table!r} to resize; there are {', '.join(known) or 'none'}")
    for group in (kernel.emb_module for c in collections for kernel in c.tiered_kernels()):
        for i, mine in enumerate(group.tables):
            if mine.name == table:
                group.resize(i, pool_rows)
