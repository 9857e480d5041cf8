"""How often rows are used: a law of row popularity fitted to the published statistics of Meta's ``dlrm_datasets``.

The published figures (README of github.com/facebookresearch/dlrm_datasets) describe one batch over all tables:

==== ============ =========== ============ ================== ====================== ==========================
set  lookups      rows used   reuse factor rows used once     heavy rows             heavy rows' accesses
==== ============ =========== ============ ================== ====================== ==========================
2021 887.0 M      128.4 M     6.91         47.3 %             2.0 % (> 32 uses)      49.4 %
2022 1,405.2 M    110.3 M     12.74        34.2 %             1.8 % (> 64 uses)      51.9 %
==== ============ =========== ============ ================== ====================== ==========================

The law: in a *window* of lookups, a row is used Poisson(λ) times, and λ is drawn from a mixture of two bounded power
laws (density ∝ λ^-(slope+1)): a body that most rows belong to, and a heavy tail above the published threshold. A single
bounded power law misses the tail's accesses by 10 to 18 %, a lognormal the rows used once by 14 %; the mixture meets all
four figures to 1e-6 relative. Body slope ½ and tail slope 1 were set by hand; the other four numbers solve four equations
(Nelder-Mead on squared log ratios). ``expected_statistics`` computes the figures from the law, so that a test can check.

Scale: the law says how many rows share a window, so a table with fewer active rows has a proportionally shorter window.
Scale 1 is the average table of the set: 2021 has 887.0 M / 856 = 1.04 M lookups a table and batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

BODY_SLOPE = 0.5
TAIL_SLOPE = 1.0


@dataclass(frozen=True)
class Published:
    """What a published set says about one of its batches, as shares of the rows used in it."""

    lookups: float
    unique_rows: float
    table_count: int
    once_rows: float
    heavy_above: int
    heavy_rows: float
    heavy_accesses: float

    @property
    def reuse(self) -> float:
        """Lookups per row used."""
        return self.lookups / self.unique_rows


@dataclass(frozen=True)
class Statistics:
    """The same figures, of a law or of generated ids."""

    once_rows: float
    reuse: float
    heavy_rows: float
    heavy_accesses: float


PUBLISHED = {
    "meta2021": Published(887.0e6, 128.4e6, 856, 0.473, 32, 0.020, 0.494),
    "meta2022": Published(1405.2e6, 110.3e6, 788, 0.342, 64, 0.018, 0.519),
}


@dataclass(frozen=True)
class PopularityLaw:
    """Uses per window: body λ in [body_low, body_high], and for a share ``tail_weight`` of rows λ in [tail_low, tail_high]."""

    body_low: float
    body_high: float
    tail_low: float
    tail_high: float
    tail_weight: float

    def _body_share_above(self, uses: np.ndarray) -> np.ndarray:
        top, bottom = self.body_high**-BODY_SLOPE, self.body_low**-BODY_SLOPE
        return (uses**-BODY_SLOPE - top) / (bottom - top)

    def _tail_share_above(self, uses: np.ndarray) -> np.ndarray:
        top, bottom = 1 / self.tail_high, 1 / self.tail_low
        return (1 / uses - top) / (bottom - top)

    def _body_uses_above(self, uses: np.ndarray) -> np.ndarray:
        return self.body_mean * (math.sqrt(self.body_high) - np.sqrt(uses)) / (math.sqrt(self.body_high) - math.sqrt(self.body_low))

    def _tail_uses_above(self, uses: np.ndarray) -> np.ndarray:
        return self.tail_mean * np.log(self.tail_high / uses) / math.log(self.tail_high / self.tail_low)

    @property
    def body_mean(self) -> float:
        """Mean uses of a body row: slope ½ gives the geometric mean of the bounds."""
        return math.sqrt(self.body_low * self.body_high)

    @property
    def tail_mean(self) -> float:
        """Mean uses of a tail row, slope 1."""
        return math.log(self.tail_high / self.tail_low) / (1 / self.tail_low - 1 / self.tail_high)

    @property
    def mean_uses(self) -> float:
        """Mean uses of a row in a window: the window has this many lookups per active row."""
        return (1 - self.tail_weight) * self.body_mean + self.tail_weight * self.tail_mean

    def rank_quantiles(self, cells: int = 1 << 14) -> np.ndarray:
        """Where in the order of rows, hottest first, the lookups fall.

        Shapes: → (cells + 1,) float64; element i is the share of rows that take the hottest ``i / cells`` of lookups.
        """
        tail = np.geomspace(self.tail_high, self.tail_low, 40_001)
        body = np.geomspace(self.body_high, self.body_low, 40_001)
        share = np.concatenate(
            [
                self.tail_weight * self._tail_share_above(tail),
                self.tail_weight + (1 - self.tail_weight) * self._body_share_above(body),
            ]
        )
        uses = np.concatenate(
            [
                self.tail_weight * self._tail_uses_above(tail),
                self.tail_weight * self.tail_mean + (1 - self.tail_weight) * self._body_uses_above(body),
            ]
        )
        return np.interp(np.linspace(0, 1, cells + 1), uses / self.mean_uses, share)

    def expected_statistics(self, heavy_above: int) -> Statistics:
        """The figures that a window of lookups has in expectation, by numerical integration over λ."""
        touched = once = heavy = light_uses = 0.0
        for low, high, slope, weight in (
            (self.body_low, self.body_high, BODY_SLOPE, 1 - self.tail_weight),
            (self.tail_low, self.tail_high, TAIL_SLOPE, self.tail_weight),
        ):
            edges = np.geomspace(low, high, 4001)
            lam = np.sqrt(edges[1:] * edges[:-1])
            mass = edges[:-1] ** -slope - edges[1:] ** -slope
            mass *= weight / mass.sum()
            chance = np.exp(-lam)
            touched += float(mass @ (1 - chance))
            once += float(mass @ (lam * chance))
            at_most = np.zeros_like(lam)
            for k in range(heavy_above + 1):
                at_most += chance
                light_uses += k * float(mass @ chance)
                chance = chance * lam / (k + 1)
            heavy += float(mass @ (1 - at_most))
        return Statistics(once / touched, self.mean_uses / touched, heavy / touched, 1 - light_uses / self.mean_uses)


# Fitted by the procedure in the module's docstring; the test recomputes the published figures from them.
LAWS = {
    "meta2021": PopularityLaw(0.0655011617, 24.1194731, 32.0, 5031.13362, 0.00762861939),
    "meta2022": PopularityLaw(0.298447017, 56.4342334, 64.0, 17952.8788, 0.0121622),
}


def measure(ids_by_table: list[np.ndarray], heavy_above: int) -> Statistics:
    """The figures of generated ids.

    Shapes: ids_by_table: one (n,) int64 array a table.
    """
    counts = np.concatenate([np.unique(ids, return_counts=True)[1] for ids in ids_by_table])
    lookups = counts.sum()
    heavy = counts > heavy_above
    return Statistics(
        float((counts == 1).mean()),
        float(lookups / counts.size),
        float(heavy.mean()),
        float(counts[heavy].sum() / lookups),
    )
