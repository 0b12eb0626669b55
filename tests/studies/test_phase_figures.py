"""Intervals of the old figures, worked out by hand."""

import math

import pytest

from lvm.studies.phases import (
    OLD_DECISION,
    hits_of,
    old_difference,
    published_report,
    read_phases,
    wilson,
)


def wilson_by_hand(hits: int, queries: int) -> list[float]:
    """Wilson, JASA 1927: the shares p with |p - hits/queries| <= z sqrt(p (1 - p) / queries)."""
    z, share = 1.959963984540054, hits / queries
    middle = (share + z**2 / (2 * queries)) / (1 + z**2 / queries)
    spread = z / (1 + z**2 / queries)
    spread *= math.sqrt(share * (1 - share) / queries + z**2 / (4 * queries**2))
    return [middle - spread, middle + spread]


@pytest.mark.parametrize(("hits", "queries"), [(36, 58), (87, 115), (0, 10), (10, 10)])
def test_wilson_equals_its_formula(hits: int, queries: int) -> None:
    assert wilson(hits, queries) == pytest.approx(wilson_by_hand(hits, queries), abs=1e-9)


def test_the_old_figures_get_the_intervals_they_should_have_had() -> None:
    published = read_phases()["3.5"].published
    assert published is not None and hits_of(published, "hit_at_5") == 36
    low, high = published_report(published)["ci95"]["hit_at_5"]
    assert (round(100 * low), round(100 * high)) == (49, 73)


def test_the_old_decision_did_not_hold() -> None:
    phases = read_phases()
    old = old_difference(*(phases[name] for name in OLD_DECISION))
    counts = (old.later_hits, old.later_pool, old.earlier_hits, old.earlier_pool)
    assert counts == (36, 58, 87, 115)
    assert old.difference == pytest.approx(36 / 58 - 87 / 115)
    (low, high), (other_low, other_high) = wilson_by_hand(36, 58), wilson_by_hand(87, 115)
    assert old.low == pytest.approx(
        old.difference - math.sqrt((36 / 58 - low) ** 2 + (other_high - 87 / 115) ** 2)
    )
    assert old.high == pytest.approx(
        old.difference + math.sqrt((high - 36 / 58) ** 2 + (87 / 115 - other_low) ** 2)
    )
    assert old.low < 0 < old.high
    assert old.p_value == pytest.approx(fisher_by_hand(36, 58, 87, 115))
    assert old.p_value == pytest.approx(0.076, abs=5e-4)
    assert old.queries_needed == 179


def fisher_by_hand(hits: int, queries: int, other_hits: int, other_queries: int) -> float:
    """Two-sided: all tables of these margins that are no likelier than the one seen."""
    both, total = hits + other_hits, queries + other_queries
    chance = [
        math.comb(queries, k) * math.comb(other_queries, both - k) / math.comb(total, both)
        for k in range(max(0, both - other_queries), min(queries, both) + 1)
    ]
    seen = math.comb(queries, hits) * math.comb(other_queries, other_hits) / math.comb(total, both)
    return sum(one for one in chance if one <= seen * (1 + 1e-7))


def test_a_phase_without_figures_is_not_compared() -> None:
    phases = read_phases()
    with pytest.raises(ValueError, match="nothing was published of 4 or 3"):
        old_difference(phases["4"], phases["3"])
