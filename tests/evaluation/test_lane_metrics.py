"""Lane figures against direct counts on a bank whose lanes are known."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import Bank, write_bank
from lvm.evaluation.lane_diagnosis import (
    confusion_counts,
    confusion_pairs,
    lane_figures,
    lane_supply,
)
from lvm.retrieval.lanes import UNASSIGNED_LANE, lane_codes, lane_names
from lvm.system.seeding import generator
from lvm.windows.export import plan_windows
from lvm.windows.planning import Windows

LANES = ["Art", "Law", None]
DOCUMENT_ROWS, DOCUMENTS = 6, 12


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """Six sequences of 12 documents: two of Art, two of Law, two without a lane."""
    rows = [
        (f"sequence-{sequence}", f"document-{document}", LANES[sequence // 2])
        for sequence in range(6)
        for document in range(DOCUMENTS)
        for _ in range(DOCUMENT_ROWS)
    ]
    vectors_ND = generator(0, "lanes").standard_normal((len(rows), 8))
    table = pd.DataFrame(rows, columns=["sequence", "document", "lane"])
    return write_bank(tmp_path_factory.mktemp("lanes") / "bank", vectors_ND, table, "none", "test")


@pytest.fixture(scope="module")
def windows(bank: Bank) -> Windows:
    return plan_windows(bank, 10)


def table(bank: Bank, windows: Windows, seed: int) -> pd.DataFrame:
    target_row_Q = windows.queries["test"].target_row_Q
    random = generator(seed, "ranks")
    return pd.DataFrame(
        {
            "target_row": target_row_Q,
            "rank": random.integers(1, 15, len(target_row_Q)).astype(float),
            "top_row": random.integers(0, bank.num_rows, len(target_row_Q)),
        }
    )


def test_lanes_hold_their_own_queries_only(bank: Bank, windows: Windows) -> None:
    per_query = table(bank, windows, 0)
    others = {"ema": table(bank, windows, 1), "ridge": table(bank, windows, 2)}
    lanes = {lane.lane: lane for lane in lane_figures(per_query, others, bank)}
    assert set(lanes) == {"Art", "Law", UNASSIGNED_LANE}
    assert sum(lane.num_queries for lane in lanes.values()) == len(per_query)
    sequence_Q = bank.sequence_N[per_query["target_row"]]
    for name, sequences in (("Art", (0, 1)), ("Law", (2, 3)), (UNASSIGNED_LANE, (4, 5))):
        inside = np.isin(sequence_Q, sequences)
        lane, rank_Q = lanes[name], per_query["rank"][inside]
        assert lane.num_queries == inside.sum()
        assert lane.figures["hit_at_5"] == pytest.approx((rank_Q <= 5).mean())
        low, high = lane.ci95["hit_at_5"]
        assert low <= lane.figures["hit_at_5"] <= high
        best = max(others, key=lambda other: (others[other]["rank"][inside] <= 5).mean())
        gain = (rank_Q <= 5).mean() - (others[best]["rank"][inside] <= 5).mean()
        assert lane.best_baseline == best and lane.lift is not None
        assert lane.lift.mean == pytest.approx(gain)


def test_an_unassigned_row_is_never_lane_zero(bank: Bank) -> None:
    code_N = lane_codes(bank, np.arange(bank.num_rows))
    assert lane_names(bank)[0] == "Art"
    assert (code_N[bank.sequence_N >= 4] == len(bank.lanes)).all()


def test_a_bank_without_lanes_is_refused(bank: Bank, tmp_path: Path) -> None:
    rows = pd.DataFrame({"sequence": ["one"] * 4})
    plain = write_bank(tmp_path / "plain", np.eye(4), rows, "none", "test")
    with pytest.raises(ValueError, match="has no lanes"):
        lane_codes(plain, np.arange(4))


def test_baselines_of_other_queries_are_refused(bank: Bank, windows: Windows) -> None:
    per_query = table(bank, windows, 0)
    other = per_query.iloc[::-1].reset_index(drop=True)
    with pytest.raises(ValueError, match="ema was measured on other queries"):
        lane_figures(per_query, {"ema": other}, bank)


def test_supply_counts_train_rows_only(bank: Bank, windows: Windows) -> None:
    supply = lane_supply(bank, windows)
    train_row = windows.train_rows()
    for name, sequences in (("Art", (0, 1)), ("Law", (2, 3))):
        rows = train_row[np.isin(bank.sequence_N[train_row], sequences)]
        assert supply[name].num_rows == len(rows)
        assert supply[name].num_chains == 2
        assert supply[name].num_documents == len(np.unique(bank.document_N[rows]))
    assert UNASSIGNED_LANE not in supply


def test_a_lane_without_train_rows_has_no_supply(tmp_path: Path) -> None:
    rows = [("a", f"d{i // 4}", "Law" if i >= 44 else "Art") for i in range(48)]
    table = pd.DataFrame(rows, columns=["sequence", "document", "lane"])
    vectors_ND = generator(0, "supply").standard_normal((48, 8))
    bank = write_bank(tmp_path / "bank", vectors_ND, table, "none", "test")
    supply = lane_supply(bank, plan_windows(bank, 5))
    assert supply["Law"].num_rows == supply["Law"].num_chains == 0
    assert supply["Art"].num_chains == 1


def test_confusion_counts_every_query_once(bank: Bank, windows: Windows) -> None:
    per_query = table(bank, windows, 0)
    count_LL = confusion_counts(per_query, bank, windows.representative_N)
    truth_Q = lane_codes(bank, per_query["target_row"].to_numpy())
    found_Q = lane_codes(bank, per_query["top_row"].to_numpy())
    slow_LL = np.zeros((3, 3), dtype=int)
    for truth, found in zip(truth_Q, found_Q, strict=True):
        slow_LL[truth, found] += 1
    assert count_LL.tolist() == slow_LL.tolist()


def test_a_twin_in_another_lane_is_no_confusion(bank: Bank) -> None:
    art_row, law_row = 3, int(np.flatnonzero(bank.sequence_N == 2)[0])
    per_query = pd.DataFrame({"target_row": [law_row], "top_row": [art_row]})
    alone_N = np.arange(bank.num_rows)
    assert confusion_counts(per_query, bank, alone_N)[1, 0] == 1
    twins_N = alone_N.copy()
    twins_N[law_row] = art_row
    assert confusion_counts(per_query, bank, twins_N)[1, 1] == 1


def test_confusions_are_ordered_by_excess_over_chance() -> None:
    # Lane a is everywhere, so b lands there as chance wants; b is rare, yet c lands in it.
    count_LL = np.array([[400, 10, 0], [40, 5, 0], [10, 25, 10]])
    pairs = confusion_pairs(count_LL, ("a", "b", "c"), 10)
    assert (pairs[0].truth, pairs[0].found, pairs[0].count) == ("c", "b", 25)
    assert pairs[0].expected == pytest.approx(45 * 40 / 500)
    assert pairs[0].excess == pytest.approx(25 - 45 * 40 / 500)
    assert pairs[0].share == pytest.approx(25 / 45)
    assert all(pair.excess > 0 and pair.truth != pair.found for pair in pairs)
    assert confusion_pairs(np.diag([3, 4, 5]), ("a", "b", "c"), 10) == []
