"""What the old figures can carry: intervals, the old decision tested."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from scipy import stats

from lvm.evaluation.intervals import LEVEL
from lvm.studies.phases.table import Phase, Published

POWER = 0.8
# The decision that ended the old phases: a longer context answered less, hence "data scarcity".
OLD_DECISION = ("3.5", "3")


@dataclass(frozen=True)
class OldDifference:
    """Hit@5 of two published phases: shares with Wilson intervals, their difference.

    The interval of the difference is Newcombe's hybrid score (Statistics in Medicine 1998, method
    10), p Fisher's exact test. `queries_needed` a phase would find a difference of this size in
    four of five cases (two-sided 5 %).
    """

    later: str
    earlier: str
    later_hits: int
    later_pool: int
    earlier_hits: int
    earlier_pool: int
    later_ci95: list[float]
    earlier_ci95: list[float]
    difference: float
    low: float
    high: float
    p_value: float
    queries_needed: int

    def report(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return asdict(self)


def wilson(hits: int, queries: int) -> list[float]:
    """Return the 95 % interval of a share (Wilson, JASA 1927)."""
    found = stats.binomtest(hits, queries).proportion_ci(1 - LEVEL, method="wilson")
    return [float(found.low), float(found.high)]


def hits_of(published: Published, key: str) -> int:
    """Return the number of answered queries that a published share stands for."""
    return round(getattr(published, key) * published.pool)


def published_report(published: Published) -> dict[str, Any]:
    """Return the published figures with their Wilson intervals, as JSON-able values."""
    keys = ("hit_at_1", "hit_at_5", "hit_at_10")
    ci95 = {key: wilson(hits_of(published, key), published.pool) for key in keys}
    return {**asdict(published), "ci95": ci95}


def old_difference(later: Phase, earlier: Phase) -> OldDifference:
    """Compare two phases by what was published; raises ValueError where nothing was."""
    if later.published is None or earlier.published is None:
        raise ValueError(f"phases: nothing was published of {later.name} or {earlier.name}")
    num, pool = hits_of(later.published, "hit_at_5"), later.published.pool
    other_num, other_pool = hits_of(earlier.published, "hit_at_5"), earlier.published.pool
    share, other = num / pool, other_num / other_pool
    (low, high), (other_low, other_high) = wilson(num, pool), wilson(other_num, other_pool)
    table = [[num, pool - num], [other_num, other_pool - other_num]]
    z = stats.norm.ppf(1 - LEVEL / 2) + stats.norm.ppf(POWER)
    variance = share * (1 - share) + other * (1 - other)
    change = share - other
    return OldDifference(
        later=later.name,
        earlier=earlier.name,
        later_hits=num,
        later_pool=pool,
        earlier_hits=other_num,
        earlier_pool=other_pool,
        later_ci95=[low, high],
        earlier_ci95=[other_low, other_high],
        difference=change,
        low=change - math.hypot(share - low, other_high - other),
        high=change + math.hypot(high - share, other - other_low),
        p_value=float(stats.fisher_exact(table).pvalue),
        queries_needed=math.ceil(z**2 * variance / change**2) if change else 0,
    )
