"""Replays of real models over a bank in which the right answer is known."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from lvm.bank.bank import Bank
from lvm.models.baselines import ContextMean, CopyLast, MovingAverage
from lvm.models.facts import FREE, TRAINED, Facts, facts_of
from lvm.report.shadow import comparison_table, shadow_table
from lvm.shadow.comparison import Outcome, ShadowResult, compare
from lvm.shadow.promotion_gates import Decision, decide
from lvm.shadow.replay import Candidate, replay, replay_candidate
from lvm.system.settings import read_gate_rules
from lvm.windows.export import plan_windows
from lvm.windows.planning import Queries, Windows, make_queries
from tests.synthetic import make_bank, rotation, rotation_bank

pytestmark = pytest.mark.slow

CTX = 20
RULES = dataclasses.replace(read_gate_rules(), min_queries=100)


class Matrix(nn.Module):
    """Predicts one linear map of the last vector."""

    def __init__(self, matrix_DD: np.ndarray) -> None:
        super().__init__()
        self.matrix_DD = torch.from_numpy(matrix_DD.astype(np.float32))

    def forward(self, context_BTD: Tensor) -> Tensor:
        return nn.functional.normalize(context_BTD @ self.matrix_DD.T, dim=-1)


class LastOfContext(nn.Module):
    """Knows how long its context is, for it predicts the first vector of it."""

    def forward(self, context_BTD: Tensor) -> Tensor:
        return context_BTD[:, :1].expand_as(context_BTD)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """Each row is a rotation of the row before it: `Matrix(rotation(16))` is always right."""
    path = tmp_path_factory.mktemp("shadow") / "bank"
    return rotation_bank(path, num_sequences=16, num_documents=30, document_rows=8)


@pytest.fixture(scope="module")
def windows(bank: Bank) -> Windows:
    return plan_windows(bank, CTX)


@pytest.fixture(scope="module")
def queries(windows: Windows) -> Queries:
    return windows.queries["test"]


@pytest.fixture(scope="module")
def facts(bank: Bank, windows: Windows) -> Facts:
    return facts_of("memory_gru", "none", bank, windows)


@pytest.fixture(scope="module")
def free(facts: Facts) -> list[Candidate]:
    known = dataclasses.replace(facts, kind=FREE)
    return [
        Candidate("copy-last", CopyLast(16), known),
        Candidate("ema", MovingAverage(16), known),
        Candidate("context-mean", ContextMean(16), known),
    ]


@pytest.fixture
def noise() -> nn.Module:
    return Matrix(rotation(16, seed=7) @ rotation(16, seed=8))


def judged(result: ShadowResult) -> Decision:
    return decide(result, result.baseline_name, RULES)


def test_a_genuine_improvement_is_promoted(
    bank: Bank, windows: Windows, queries: Queries, free: list[Candidate], facts: Facts
) -> None:
    model = Candidate("model", Matrix(rotation(16)), facts, version="4")
    result = replay([*free, model], bank, windows, queries)
    best = result.outcomes[0]
    assert best.name == "model" and best.figures["hit_at_1"] == 1.0
    assert result.best_free in {"copy-last", "ema"}
    assert judged(result).promote == (result.best_free, "model")
    again = replay([*free, model], bank, windows, queries, baseline_name=result.best_free)
    assert judged(again).promote == ("model",)


def test_a_model_that_copies_never_becomes_baseline(
    bank: Bank, windows: Windows, queries: Queries, free: list[Candidate], facts: Facts
) -> None:
    model = Candidate("copier", CopyLast(16), facts)
    for candidates, baseline in (([*free, model], None), ([free[0], model], "copy-last")):
        decision = judged(replay(candidates, bank, windows, queries, baseline_name=baseline))
        assert "copier" not in decision.promote
        assert decision.winner == (baseline or decision.promote[0])


def test_a_noise_model_never_becomes_baseline(
    bank: Bank,
    windows: Windows,
    queries: Queries,
    free: list[Candidate],
    facts: Facts,
    noise: nn.Module,
) -> None:
    candidate = Candidate("noise", noise, facts)
    decision = judged(replay([*free, candidate], bank, windows, queries))
    assert "noise" not in decision.promote and decision.winner is not None
    alone = judged(replay([candidate], bank, windows, queries))
    assert alone.promote == () and alone.winner is None


def test_a_model_of_nan_is_counted_but_never_ranked(
    bank: Bank, windows: Windows, queries: Queries, free: list[Candidate], facts: Facts
) -> None:
    broken = Candidate("broken", Matrix(np.full((16, 16), np.nan)), facts)
    result = replay([broken, *free], bank, windows, queries)
    last = result.outcomes[-1]
    assert last.name == "broken" and not last.is_scored
    assert last.num_non_finite == len(queries)
    assert "broken" not in set(result.per_query["candidate"])
    assert "broken" not in judged(result).promote


def test_a_twin_of_the_baseline_is_a_tie_and_leaves_it(
    bank: Bank, windows: Windows, queries: Queries, free: list[Candidate], facts: Facts
) -> None:
    old, twin = (Candidate(name, Matrix(rotation(16)), facts) for name in ("old", "twin"))
    result = replay([*free, twin, old], bank, windows, queries, baseline_name="old")
    pair = result.comparison("twin", "old")
    assert pair is not None and pair.hit_at_5.mean == pair.hit_at_5.low == pair.hit_at_5.high == 0
    decision = judged(result)
    assert decision.promote == () and decision.winner == "old"


def test_a_candidate_logged_with_the_older_correction_is_told(
    bank: Bank, windows: Windows, queries: Queries, facts: Facts
) -> None:
    """It counted predictions of a row's own document."""
    pair_N2 = np.stack([np.ones(bank.num_rows), np.zeros(bank.num_rows)], 1).astype(np.float32)
    before = dataclasses.replace(facts, fit_version=1)
    old = Candidate("old", CopyLast(16), before, row_correction=pair_N2)
    new = Candidate("new", CopyLast(16), facts, row_correction=pair_N2)
    plain = Candidate("plain", CopyLast(16), before)
    result = replay([old, new, plain], bank, windows, queries)
    assert {one.name: one.counts_own for one in result.outcomes} == {
        "old": True,
        "new": False,
        "plain": True,
    }
    note = next(line for line in shadow_table(result).splitlines() if "older" in line)
    assert "old" in note and "new" not in note and "plain" not in note


def test_another_bank_or_width_is_refused_with_the_reason(
    bank: Bank, windows: Windows, queries: Queries, free: list[Candidate], facts: Facts
) -> None:
    model = Matrix(rotation(16))
    elsewhere = Candidate("elsewhere", model, dataclasses.replace(facts, bank_sha256="0" * 64))
    wide = Candidate("wide", model, dataclasses.replace(facts, dim=768, ctx=2000))
    result = replay([*free, elsewhere, wide], bank, windows, queries)
    refused = {one.name: one.refusal for one in result.outcomes if one.refusal}
    assert set(refused) == {"elsewhere", "wide"}
    assert f"another bank (000000000000, this one is {bank.sha256[:12]})" in refused["elsewhere"]
    assert "predicts 768 dims, the bank has 16" in refused["wide"]
    assert result.removed_ctx == CTX
    assert not {"elsewhere", "wide"} & set(judged(result).promote)


def test_a_leaky_candidate_is_marked_ranked_last_and_not_promoted(
    bank: Bank, windows: Windows, queries: Queries, free: list[Candidate], facts: Facts
) -> None:
    leaky = Candidate("leaky", Matrix(rotation(16)), dataclasses.replace(facts, leaky=True))
    result = replay([leaky, *free], bank, windows, queries)
    assert result.outcomes[-1].name == "leaky" and result.outcomes[-1].leak is not None
    assert result.outcomes[-1].figures["hit_at_1"] == 1.0
    assert "leaky" not in {pair.candidate for pair in result.comparisons}
    assert "leaky" not in judged(result).promote


def test_a_leaky_baseline_is_no_reference(
    bank: Bank, windows: Windows, queries: Queries, free: list[Candidate], facts: Facts
) -> None:
    old = Candidate("old", CopyLast(16), dataclasses.replace(facts, leaky=True))
    model = Candidate("model", Matrix(rotation(16)), facts)
    result = replay([old, model, *free], bank, windows, queries, "old")
    assert {pair.reference for pair in result.comparisons} == {result.best_free}
    decision = decide(result, "old", RULES)
    assert decision.promote == () and decision.winner == "old"
    assert "split=random" in " ".join(decision.reasons)


def test_all_are_compared_with_the_baseline_and_who_was_not_tested_has_no_p(
    bank: Bank, windows: Windows, queries: Queries, free: list[Candidate], facts: Facts
) -> None:
    old = Candidate("old", Matrix(rotation(16)), facts)
    noise = Candidate("noise", Matrix(rotation(16, seed=7)), facts, val_hit_at_5=0.9)
    result = replay([old, noise, *free], bank, windows, queries, "old")
    pairs = [pair for pair in result.comparisons if pair.reference == "old"]
    assert {pair.candidate for pair in pairs} == {"noise", *(one.name for one in free)}
    decision = judged(result)
    assert decision.failed == "noise" and decision.tested == {"noise"}
    rows = comparison_table(result, decision).splitlines()
    shown = {row.split()[0]: " - " in row for row in rows if " old " in row}
    assert shown == {"noise": False} | {one.name: True for one in free}


def test_a_val_figure_that_was_not_logged_is_measured(
    bank: Bank, windows: Windows, queries: Queries, facts: Facts
) -> None:
    right, noise = Matrix(rotation(16)), Matrix(rotation(16, seed=7))
    found = [
        Candidate("right", right, facts),
        Candidate("noise", noise, facts),
        Candidate("logged", noise, facts, val_hit_at_5=0.125),
    ]
    outcomes = {one.name: one for one in replay(found, bank, windows, queries).outcomes}
    assert outcomes["right"].val_hit_at_5 == 1.0 and outcomes["noise"].val_hit_at_5 < 0.5
    assert outcomes["logged"].val_hit_at_5 == 0.125


def test_the_served_order_decides(
    bank: Bank, windows: Windows, queries: Queries, facts: Facts
) -> None:
    """Plain the model is better; a correction of the free predictor makes its served order so."""
    right, wrong = rotation(16), rotation(16, seed=7)
    lifted_N2 = np.tile(np.float32([1.0, 0.0]), (bank.num_rows, 1))
    lifted_N2[queries.target_row_Q, 1] = 3.0
    known = dataclasses.replace(facts, kind=FREE)
    rival = Candidate("free", Matrix(0.3 * right + 0.7 * wrong), known)
    helped = dataclasses.replace(rival, row_correction=lifted_N2)
    model = Candidate("model", Matrix(0.35 * right + 0.65 * wrong), facts, val_hit_at_5=0.9)
    result = replay([helped, model], bank, windows, queries, "free")
    assert [one.name for one in result.outcomes] == ["free", "model"]
    first, second = result.outcomes
    assert second.figures["hit_at_5"] > first.figures["hit_at_5"]
    assert first.served == first.corrected and second.served == second.figures
    (pair,) = result.comparisons
    assert pair.plain_hit_at_5.low > 0 > pair.hit_at_5.high
    decision = judged(result)
    assert decision.promote == () and decision.winner == "free"
    plain = replay([rival, model], bank, windows, queries, "free")
    assert judged(plain).promote == ("model",), "without the correction the model wins"
    served = result.per_query[result.per_query["candidate"] == "free"]
    assert served["rank_served"].tolist() == served["rank_corrected"].tolist()


def test_a_candidate_of_another_split_that_saw_the_answers_is_marked(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "short", num_sequences=40, num_documents=2, num_twins=0)
    windows = plan_windows(bank, CTX)
    model = CopyLast(16)
    other = dataclasses.replace(facts_of("copy-last", "none", bank, windows), seed=5)
    same = dataclasses.replace(other, seed=windows.seed)
    candidates = [Candidate("other", model, other), Candidate("same", model, same)]
    result = replay(candidates, bank, windows, windows.queries["test"])
    marked, clean = result.outcome("other"), result.outcome("same")
    assert clean is not None and clean.leak is None
    assert marked is not None and "answers were among its train rows" in str(marked.leak)


def test_queries_whose_answers_were_trained_on_are_marked(
    bank: Bank, windows: Windows, free: list[Candidate]
) -> None:
    target_row_Q = windows.train_rows()[5:15]
    start_Q = bank.sequence_start_N()[target_row_Q]
    logged = make_queries(np.arange(10), target_row_Q, start_Q, CTX)
    outcome = replay(free[:1], bank, windows, logged).outcomes[0]
    assert outcome.leak == "10 of 10 answers were among its train rows"


def test_queries_that_chose_the_candidate_are_marked(
    bank: Bank, windows: Windows, free: list[Candidate]
) -> None:
    outcome = replay(free[:1], bank, windows, windows.queries["val"].head(30)).outcomes[0]
    assert outcome.leak == "30 of 30 answers were val rows, by which it was chosen"


def test_one_planted_train_row_marks_the_candidate_and_moves_no_other_rank(
    bank: Bank, windows: Windows, queries: Queries, free: list[Candidate]
) -> None:
    rows = np.append(queries.target_row_Q, windows.train_rows()[7])
    start_Q = bank.sequence_start_N()[rows]
    planted = make_queries(np.arange(len(rows)), rows, start_Q, CTX)
    clean, marked = (replay(free, bank, windows, asked) for asked in (queries, planted))
    assert {one.leak for one in clean.outcomes} == {None}
    assert {one.leak for one in marked.outcomes} == {
        f"1 of {len(rows)} answers were among its train rows"
    }
    assert judged(clean).promote != () and judged(marked).promote == ()
    for name in ("copy-last", "ema"):
        ranks = [
            result.per_query[result.per_query["candidate"] == name]["rank"].tolist()
            for result in (clean, marked)
        ]
        assert ranks[1][:-1] == ranks[0]


def test_all_candidates_lose_the_same_rows_and_keep_their_own_context(
    bank: Bank, windows: Windows, queries: Queries, facts: Facts
) -> None:
    short, long = (dataclasses.replace(facts, ctx=ctx) for ctx in (5, CTX))
    copy = CopyLast(16)
    pair = [Candidate("short", copy, short), Candidate("long", copy, long)]
    result = replay(pair, bank, windows, queries)
    ranks = {name: part["rank"].tolist() for name, part in result.per_query.groupby("candidate")}
    assert result.removed_ctx == CTX
    assert ranks["short"] == ranks["long"]
    alone = replay(pair[:1], bank, windows, queries).per_query
    assert alone["rank"].tolist() != ranks["short"]
    firsts = [Candidate("a", LastOfContext(), short), Candidate("b", LastOfContext(), long)]
    table = replay(firsts, bank, windows, queries).per_query.groupby("candidate")["rank_raw"]
    assert table.get_group("a").tolist() != table.get_group("b").tolist()


def test_the_long_table_recomputes_every_figure(
    bank: Bank, windows: Windows, queries: Queries, free: list[Candidate], tmp_path: Path
) -> None:
    result = replay(free, bank, windows, queries)
    result.per_query.to_parquet(tmp_path / "per_query.parquet")
    table = pd.read_parquet(tmp_path / "per_query.parquet")
    for outcome in result.outcomes:
        rows = table[table["candidate"] == outcome.name]
        assert rows["query"].tolist() == queries.query_Q.tolist()
        assert outcome.figures["hit_at_5"] == pytest.approx((rows["rank"] <= 5).mean())
        assert outcome.figures["median_rank"] == rows["rank"].median()
        assert (rows["rank"] <= rows["rank_raw"]).all()
    named = [bank.sequences[code] for code in bank.sequence_N[table["target_row"]]]
    assert table["sequence"].tolist() == named


def test_a_row_correction_gives_corrected_figures(
    bank: Bank, windows: Windows, queries: Queries, free: list[Candidate]
) -> None:
    same_N2 = np.tile(np.float32([1.0, 0.0]), (bank.num_rows, 1))
    corrected = dataclasses.replace(free[0], row_correction=same_N2)
    outcome = replay([corrected], bank, windows, queries).outcomes[0]
    assert outcome.corrected == outcome.figures and outcome.corrected_ci95
    assert replay(free[:1], bank, windows, queries).outcomes[0].corrected == {}


def test_stored_replays_compare_as_the_models_did(
    bank: Bank, windows: Windows, queries: Queries, free: list[Candidate]
) -> None:
    direct = replay(free, bank, windows, queries, baseline_name="ema")
    stored = [replay_candidate(candidate, bank, windows, queries) for candidate in free]
    again = compare(stored, bank, windows, queries, "ema")
    assert again.comparisons == direct.comparisons
    figures = [[one.figures for one in result.outcomes] for result in (again, direct)]
    assert figures[0] == figures[1]


def test_replays_of_other_queries_are_not_compared(
    bank: Bank, windows: Windows, queries: Queries, free: list[Candidate]
) -> None:
    one: Outcome = replay_candidate(free[0], bank, windows, queries)
    other = replay_candidate(free[1], bank, windows, queries.head(len(queries) - 1))
    with pytest.raises(ValueError, match="other queries"):
        compare([one, other], bank, windows, queries, "ema")


def test_bad_requests_are_refused(
    bank: Bank, windows: Windows, queries: Queries, free: list[Candidate]
) -> None:
    with pytest.raises(ValueError, match="candidates: none given"):
        replay([], bank, windows, queries)
    with pytest.raises(ValueError, match="copy-last given twice"):
        replay([free[0], free[0]], bank, windows, queries)
    with pytest.raises(ValueError, match="queries: none given"):
        replay(free, bank, windows, queries.head(0))


def test_the_report_is_json(
    bank: Bank, windows: Windows, queries: Queries, free: list[Candidate]
) -> None:
    result = replay(free, bank, windows, queries, baseline_name="ema")
    report = json.loads(json.dumps(result.report()))
    assert report["num_queries"] == len(queries) and report["bank_sha256"] == bank.sha256
    assert [one["name"] for one in report["outcomes"]] == [one.name for one in result.outcomes]
    assert {pair["reference"] for pair in report["comparisons"]} >= {"ema"}
    json.dumps(judged(result).report())
    assert TRAINED not in {one["kind"] for one in report["outcomes"]}
