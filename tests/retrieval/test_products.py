"""Ranks do not depend on the product that counts them, on banks made to tell two products apart.

Shapes: N bank rows, D vector dim, Q queries.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import Bank, write_bank
from lvm.retrieval import counting
from lvm.retrieval.counting import BF16, FP32, SCORE_TIE
from lvm.retrieval.exact import Ranks, exact_ranks, rank_together
from lvm.windows.planning import Queries, make_queries
from tests import reference

ROWS, DIM, QUERIES, CTX = 900, 48, 60, 40


def random_rows(random: np.random.Generator) -> np.ndarray:
    return random.standard_normal((ROWS, DIM))


def clustered(random: np.random.Generator) -> np.ndarray:
    """Six clusters, within which cosines differ by less than bf16 can tell."""
    centre_CD = random.standard_normal((6, DIM))
    return centre_CD[random.integers(6, size=ROWS)] + 0.02 * random.standard_normal((ROWS, DIM))


def duplicated(random: np.random.Generator) -> np.ndarray:
    """Each row three times, once with an error of float16."""
    vector_ND = random.standard_normal((ROWS // 3, DIM))
    return np.concatenate([vector_ND, vector_ND, vector_ND.astype(np.float16)])


def adversarial(random: np.random.Generator) -> np.ndarray:
    """Rows around one direction, at cosines that differ by 0, 0.5 or 2 ties, or by 3 bf16 units."""
    axis_D, *other_KD = np.linalg.qr(random.standard_normal((DIM, DIM)))[0].T
    step = np.array([0, 0.5 * SCORE_TIE, 2 * SCORE_TIE, 3 * 2.0**-8])
    cosine_N = 0.6 + step[np.arange(ROWS) % len(step)] + 1e-4 * (np.arange(ROWS) // 90)
    side_ND = np.array(other_KD)[np.arange(ROWS) % len(other_KD)]
    return cosine_N[:, None] * axis_D + np.sqrt(1 - cosine_N**2)[:, None] * side_ND


BANKS: list[Callable[[np.random.Generator], np.ndarray]] = [
    random_rows,
    clustered,
    duplicated,
    adversarial,
]


@pytest.fixture(scope="module", params=BANKS, ids=lambda make: make.__name__)
def bank(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    vector_ND = request.param(np.random.default_rng(0))
    rows = pd.DataFrame({"sequence": np.arange(ROWS) // 300})
    path = tmp_path_factory.mktemp("products") / "bank"
    return write_bank(path, vector_ND, rows.astype(str), "drawn", "test", "float32")


@pytest.fixture(scope="module")
def groups(bank: Bank) -> np.ndarray:
    """Exact twins as groups: the first row of each."""
    _, first_N, group_N = np.unique(bank.vectors, axis=0, return_index=True, return_inverse=True)
    return first_N[group_N.ravel()]


@pytest.fixture(scope="module")
def queries(bank: Bank) -> Queries:
    start_N = bank.sequence_start_N()
    target_row_Q = np.random.default_rng(1).permutation(np.flatnonzero(start_N < np.arange(ROWS)))
    target_row_Q = target_row_Q[:QUERIES]
    return make_queries(np.arange(QUERIES), target_row_Q, start_N[target_row_Q], CTX)


@pytest.fixture(scope="module")
def predictions(bank: Bank, queries: Queries) -> np.ndarray:
    """Near truths, far ones, random ones, rows of the bank, one zero vector."""
    random = np.random.default_rng(2)
    noise = np.repeat([0.01, 0.3, 2.0, 100.0], QUERIES // 4)[:, None]
    truth_QD = bank.unit(queries.target_row_Q)
    prediction_QD = truth_QD + noise * random.standard_normal((QUERIES, DIM)) / np.sqrt(DIM)
    prediction_QD[:6] = bank.unit(queries.target_row_Q[:6])
    prediction_QD[6:9] = bank.unit(queries.target_row_Q[6:9] - 1)
    prediction_QD[9] = 0
    return prediction_QD.astype(np.float32)


def corrections() -> list[np.ndarray | None]:
    """No correction, a bias as a hubness correction has it, one with another scale."""
    random = np.random.default_rng(3)
    bias_N = -0.5 * random.uniform(0.2, 0.6, ROWS)
    penalty_N2 = np.stack([np.ones(ROWS), bias_N], axis=1).astype(np.float32)
    scaled_N2 = np.stack([random.uniform(0.5, 1.5, ROWS), bias_N], axis=1).astype(np.float32)
    return [None, penalty_N2, scaled_N2]


def equal(one: Ranks, other: Ranks) -> bool:
    names = ("rank_Q", "rank_raw_Q", "top_row_Q")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.fixture(params=[0.0, 0.1, 1.0], ids=lambda doubt: f"doubt-{doubt}")
def doubt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Give bf16 to the queries without any candidate in doubt, to some, to all."""
    monkeypatch.setattr(counting, "MAX_DOUBT", request.param)
    return request.param


@pytest.mark.parametrize("place", range(3), ids=["plain", "penalty", "scaled"])
def test_bf16_and_float32_rank_alike(place, doubt, bank, groups, queries, predictions):
    chosen = (corrections()[place],)
    (wide,) = exact_ranks(predictions, queries, bank, groups, chosen, product=FP32)
    (narrow,) = exact_ranks(predictions, queries, bank, groups, chosen, product=BF16)
    assert equal(wide, narrow)
    filtered_Q, raw_Q = reference.ranks(predictions, queries, bank, groups, chosen[0])
    # The reference normalises in float64: a candidate at the very border of a tie may differ.
    assert np.abs(wide.rank_Q - filtered_Q).max() <= (0.5 if place else 1)
    assert np.abs(wide.rank_raw_Q - raw_Q).max() <= (0.5 if place else 1)


@pytest.mark.parametrize("product", [FP32, BF16])
@pytest.mark.parametrize("dense", [1, 10**9])
def test_pairs_in_doubt_are_scored_alike_one_by_one_and_as_a_product(
    product, dense, bank, groups, queries, predictions, monkeypatch
):
    monkeypatch.setattr(counting, "MAX_DOUBT", 1.0)
    expected = exact_ranks(predictions, queries, bank, groups, product=product)
    monkeypatch.setattr(counting, "DENSE", dense)
    found = exact_ranks(predictions, queries, bank, groups, product=product)
    assert equal(expected[0], found[0])


@pytest.mark.parametrize("product", [FP32, BF16])
def test_predictors_ranked_together_rank_as_each_alone(product, bank, groups, queries, predictions):
    plain, penalty, _ = corrections()
    answers = [(predictions, (plain, penalty)), (predictions[::-1].copy(), (penalty,))]
    together = rank_together(answers, queries, bank, groups, product=product)
    assert [len(ranks) for ranks in together] == [2, 1]
    for (prediction_QD, pairs), ranked in zip(answers, together, strict=True):
        alone = exact_ranks(prediction_QD, queries, bank, groups, pairs, product=product)
        assert all(equal(*pair) for pair in zip(alone, ranked, strict=True))


def test_blocks_do_not_change_the_ranks_by_bf16(bank, groups, queries, predictions, monkeypatch):
    monkeypatch.setattr(counting, "MAX_DOUBT", 1.0)
    expected = exact_ranks(predictions, queries, bank, groups, product=BF16)
    monkeypatch.setattr(counting, "QUERY_BLOCK", 7)
    monkeypatch.setattr(counting, "BANK_BLOCK", 131)
    assert equal(expected[0], exact_ranks(predictions, queries, bank, groups, product=BF16)[0])


def test_bf16_is_counted_for_the_queries_that_it_can_tell(bank, groups, queries, predictions):
    """Rounded scores do differ: without float64 for those in doubt, the ranks would too."""
    rounded_ND = bank.unit(slice(None)).astype(np.float32)
    rounded_ND = (rounded_ND.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    exact_QN = predictions @ bank.unit(slice(None)).T
    rounded_QN = predictions @ rounded_ND.T
    own_Q = groups[queries.target_row_Q]
    lines = np.arange(QUERIES)
    better_Q = (exact_QN > exact_QN[lines, own_Q][:, None] + SCORE_TIE).sum(axis=1)
    rounded_better_Q = (rounded_QN > rounded_QN[lines, own_Q][:, None] + SCORE_TIE).sum(axis=1)
    assert (better_Q != rounded_better_Q).any()
