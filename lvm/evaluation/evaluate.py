"""Evaluate predictors on one set of frozen queries: figures, re-ranking, examples.

Shapes: Q queries, N bank rows, D vector dim, T time, E examples, L lanes.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import nn

from lvm.bank.bank import Bank, FloatArray
from lvm.evaluation.free_predictors import FREE, fit_free_predictors
from lvm.evaluation.lane_diagnosis import lane_figures
from lvm.evaluation.latency import measure_latency
from lvm.evaluation.metrics import (
    FIGURES,
    POOLS,
    contrastive_accuracy,
    copy_ratio,
    document_interval,
    figures,
    hit_at,
    paired_difference,
    pool_hit_at,
)
from lvm.models.predict import predict_queries
from lvm.retrieval.exact import Ranks, exact_ranks, rank_together, top_rows
from lvm.retrieval.hubness import Hubness, fit_hubness
from lvm.retrieval.lanes import (
    UNASSIGNED_LANE,
    calibration,
    lane_codes,
    lane_names,
    target_codes,
)
from lvm.retrieval.rerank import (
    CORRECTED,
    KINDS,
    LANE,
    PLAIN,
    SIZE,
    TERMS,
    Shortlist,
    Weights,
    check_rerank,
    fit_reranker,
    old_rule_scores,
    reranked_ranks,
    shortlist,
    summed,
    true_lane_ranks,
)
from lvm.system.atomic import jsonable
from lvm.system.progress import part
from lvm.system.seeding import generator
from lvm.windows.planning import SPLITS, IntArray, Queries, Windows

MAX_QUERIES = 10_000
ORACLE_QUERIES = 1_000
SEARCH_QUERIES = 5
EACH, K = 20, 5
CONTEXT_ROWS, FOUND = 2, 3
SEARCHED = 24  # rows searched, so that FOUND passages remain without twins
RankArray = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """One predictor on one set of queries.

    `predictions` (Q, D) float32 unit; `per_query` has one line per query in the same order, with
    the columns of `ranks_table`; `row_correction` (N, 2) float32; `report` has the figures.
    """

    name: str
    predictions: FloatArray
    per_query: pd.DataFrame
    row_correction: FloatArray
    report: dict[str, Any]


def evaluate(
    name: str,
    model: nn.Module,
    bank: Bank,
    windows: Windows,
    split: str = "test",
    max_queries: int | None = None,
    baselines: bool = True,
    counts_own: bool = False,
) -> tuple[dict[str, Any], list[Evaluation]]:
    """Evaluate a predictor on the first queries of a split, with the free ones if `baselines`.

    Returns the report (JSON scalars, lists, dicts; None for non-finite values) and the evaluations,
    the predictor's own first. Figures are fractions from 0 to 1, except ranks and milliseconds.
    `max_queries` None means MAX_QUERIES. With `counts_own` the predictor's hubness correction is
    fitted by the older definition, see `fit_hubness`. Raises ValueError for a split without
    queries.
    """
    if split not in SPLITS[1:]:
        raise ValueError(f"split: {split!r} has no queries; choose one of {', '.join(SPLITS[1:])}")
    if max_queries is not None and max_queries < 1:
        raise ValueError(f"max_queries: {max_queries}; at least 1 query is needed")
    queries = windows.queries[split].head(MAX_QUERIES if max_queries is None else max_queries)
    seed = windows.seed
    models = {name: model}
    if baselines:
        others = tuple(other for other in FREE if other != name)
        models |= fit_free_predictors(bank, windows, others, seed)
    old = (name,) if counts_own else ()
    own, *rivals = (
        _timed(one, models[one.name], bank, queries)
        for one in evaluate_together(models, bank, windows, queries, seed, old)
    )
    with part("pools, lanes, ceiling"):
        own = replace(own, report=own.report | jsonable(_details(own, bank, windows, queries)))
    keys = (*FIGURES, "ci95", "raw", "corrected", "hubness_beta", "latency_ms")
    report = {
        "model": name,
        "split": split,
        "seed": seed,
        "ctx": queries.ctx,
        "leaky": windows.leaky,
        "windows_sha256": windows.sha256,
        "bank_sha256": bank.sha256,
        "bank_rows": bank.num_rows,
        "candidates": len(np.unique(windows.representative_N)),
        **own.report,
        "hubness_counts_own": counts_own,
        "baselines": {e.name: {key: e.report[key] for key in keys} for e in rivals},
        "best_baseline": _best_baseline(own, rivals, bank, queries, seed),
    }
    return report, [own, *rivals]


def evaluate_together(
    models: Mapping[str, nn.Module],
    bank: Bank,
    windows: Windows,
    queries: Queries,
    seed: int = 0,
    counting_own: Collection[str] = (),
) -> list[Evaluation]:
    """Predict with each model; rank all of them, plain and corrected, in one pass of the bank.

    The served order is that of the corrected filtered ranks; intervals are over documents. The
    hubness corrections of the models named in `counting_own` have the older definition.
    """
    answers, fitted = [], []
    for name, model in models.items():
        with part(f"predict {name}"):
            prediction_QD = predict_queries(model, bank, queries)
        fitted.append(fit_hubness(model, bank, windows, seed, name not in counting_own))
        answers.append((prediction_QD, (None, fitted[-1].row_correction)))
    with part("rank"):
        ranked = rank_together(answers, queries, bank, windows.representative_N)
    with part("intervals"):
        return _evaluations(models, answers, fitted, ranked, bank, queries, seed)


def _evaluations(
    models: Mapping[str, nn.Module],
    answers: Sequence[tuple[FloatArray, tuple[FloatArray | None, ...]]],
    fitted: Sequence[Hubness],
    ranked: Sequence[Sequence[Ranks]],
    bank: Bank,
    queries: Queries,
    seed: int,
) -> list[Evaluation]:
    """Return the figures of each model with their intervals and its table."""
    document_Q = bank.document_N[queries.target_row_Q]
    evaluations = []
    for name, (prediction_QD, _), hubness, (plain, corrected) in zip(
        models, answers, fitted, ranked, strict=True
    ):
        report = {
            "queries": len(queries),
            "documents": len(np.unique(document_Q)),
            **figures(plain.rank_Q),
            "ci95": document_interval(plain.rank_Q, document_Q, seed),
            "raw": figures(plain.rank_raw_Q),
            "corrected": {
                **figures(corrected.rank_Q),
                "ci95": document_interval(corrected.rank_Q, document_Q, seed),
                "raw": figures(corrected.rank_raw_Q),
            },
            "hubness_beta": hubness.beta,
        }
        table = ranks_table(queries, bank, plain, corrected)
        one = Evaluation(name, prediction_QD, table, hubness.row_correction, jsonable(report))
        evaluations.append(one)
    return evaluations


def _timed(one: Evaluation, model: nn.Module, bank: Bank, queries: Queries) -> Evaluation:
    """Return the evaluation with the latency of its predictor."""
    latency_ms = measure_latency(model, bank, queries)
    return replace(one, report=one.report | {"latency_ms": latency_ms})


def long_table(evaluations: Sequence[Evaluation]) -> pd.DataFrame:
    """Return the per-query tables of all predictors in one table with a column `predictor`."""
    tables = [one.per_query.assign(predictor=one.name) for one in evaluations]
    return pd.concat(tables, ignore_index=True)


def _details(own: Evaluation, bank: Bank, windows: Windows, queries: Queries) -> dict[str, Any]:
    """Return pools, lanes, the oracle ceiling and the latency of exhaustive searches."""
    rank_raw_Q = own.per_query["rank_raw"].to_numpy()
    num_candidates = len(np.unique(windows.representative_N))
    last_QD, truth_QD = bank.unit(queries.target_row_Q - 1), bank.unit(queries.target_row_Q)
    return {
        "pools": _pools(rank_raw_Q, num_candidates),
        "oracle": _oracle(bank, windows, queries, own.row_correction),
        "lanes": lane_report(own.per_query, bank, windows.seed),
        "copy_ratio": copy_ratio(own.predictions, last_QD, truth_QD),
        "contrastive_accuracy": contrastive_accuracy(rank_raw_Q, num_candidates),
        "latency_ms": own.report["latency_ms"] | _search_latency(own, bank),
    }


def _pools(rank_Q: NDArray[np.float64], num_candidates: int) -> dict[str, dict[str, float]]:
    """Return the expected Hit@k in random pools, from raw ranks, because a pool removes nothing."""
    pools = [pool for pool in POOLS if pool < num_candidates] + [num_candidates]
    return {
        str(pool): {f"hit_at_{k}": pool_hit_at(rank_Q, pool, num_candidates, k) for k in (1, 5, 10)}
        for pool in pools
    }


def _oracle(
    bank: Bank, windows: Windows, queries: Queries, row_correction: FloatArray
) -> dict[str, Any]:
    """Return the figures of a search with the truth itself, the ceiling of any predictor."""
    asked = queries.head(ORACLE_QUERIES)
    truth_QD = bank.unit(asked.target_row_Q)
    ranks = exact_ranks(truth_QD, asked, bank, windows.representative_N, (None, row_correction))
    plain, corrected = (figures(found.rank_Q) for found in ranks)
    return {"queries": len(asked), **plain, "corrected": corrected}


def lane_report(per_query: pd.DataFrame, bank: Bank, seed: int) -> dict[str, dict[str, Any]]:
    """Return the figures of each lane that has queries; empty for a bank without lanes.

    The lanes are those of `bank`, not the column of the table.
    """
    if bank.lane_N is None:
        return {}
    lanes = {}
    code_Q = lane_codes(bank, per_query["target_row"].to_numpy())
    lane_Q = np.array(lane_names(bank), dtype=object)[code_Q]
    for lane in lane_figures(per_query, {}, bank, seed):
        corrected_Q = per_query["rank_corrected"][lane_Q == lane.lane]
        lanes[lane.lane] = {
            "queries": lane.num_queries,
            "documents": lane.num_documents,
            **lane.figures,
            "ci95": lane.ci95,
            "corrected": figures(corrected_Q.to_numpy()),
        }
    return lanes


def _search_latency(found: Evaluation, bank: Bank) -> dict[str, float]:
    """Time exhaustive searches of the whole bank, one query at a time, in milliseconds."""
    search_ms = []
    for prediction_1D in found.predictions[:SEARCH_QUERIES, None]:
        begin = time.perf_counter()
        top_rows(prediction_1D, bank, min(10, bank.num_rows), found.row_correction)
        search_ms.append(1000 * (time.perf_counter() - begin))
    p50, p95 = np.quantile(search_ms, [0.5, 0.95])
    return {"exact_search_p50": float(p50), "exact_search_p95": float(p95)}


def _best_baseline(
    own: Evaluation, rivals: Sequence[Evaluation], bank: Bank, queries: Queries, seed: int
) -> dict[str, Any] | None:
    """Compare the predictor, paired by query, with the free one of the best corrected Hit@5.

    That is the served order, as in a decision; the plain difference stands beside it.
    """
    if not rivals:
        return None
    best = max(rivals, key=lambda e: e.report["corrected"]["hit_at_5"])
    document_Q = bank.document_N[queries.target_row_Q]
    found: dict[str, Any] = {"name": best.name}
    names = {"rank": "hit_at_5_difference", "rank_corrected": "corrected_hit_at_5_difference"}
    for order, name in names.items():
        own_Q, best_Q = (hit_at(e.per_query[order].to_numpy(), 5) for e in (own, best))
        found[name] = jsonable(vars(paired_difference(own_Q, best_Q, document_Q, seed)))
    return found


def query_table(queries: Queries, bank: Bank) -> pd.DataFrame:
    """Return one line per query: query, target_row, sequence, document, lane.

    `lane` is UNASSIGNED_LANE for a row or a bank without lanes.
    """
    target_row_Q = queries.target_row_Q
    lane_Q = np.full(len(queries), UNASSIGNED_LANE, dtype=object)
    if bank.lane_N is not None:
        lane_Q = np.array(lane_names(bank), dtype=object)[lane_codes(bank, target_row_Q)]
    return pd.DataFrame(
        {
            "query": queries.query_Q,
            "target_row": target_row_Q,
            "sequence": np.array(bank.sequences, dtype=object)[bank.sequence_N[target_row_Q]],
            "document": np.array(bank.documents, dtype=object)[bank.document_N[target_row_Q]],
            "lane": lane_Q,
        }
    )


def ranks_table(queries: Queries, bank: Bank, plain: Ranks, corrected: Ranks) -> pd.DataFrame:
    """Return `query_table` with rank, rank_raw, rank_corrected, rank_corrected_raw, top_row."""
    return query_table(queries, bank).assign(
        rank=plain.rank_Q,
        rank_raw=plain.rank_raw_Q,
        rank_corrected=corrected.rank_Q,
        rank_corrected_raw=corrected.rank_raw_Q,
        top_row=plain.top_row_Q,
    )


@part("examples")
def example_table(
    measured: Evaluation, queries: Queries, bank: Bank, windows: Windows
) -> pd.DataFrame:
    """Return up to EACH hits (rank within K), then up to EACH misses, in the queries' order.

    `queries` are the queries of `measured`. Columns: outcome, rank (plain, filtered), context (its
    last CONTEXT_ROWS passages), truth, found_1 ... found_3 (the best passages outside the context,
    without twins), lane, sequence, document. A row without text is named by sequence, document and
    row.
    """
    per_query = measured.per_query
    is_hit_Q = per_query["rank"].to_numpy() <= K
    random = generator(windows.seed, "examples")
    kinds = [np.flatnonzero(is_hit_Q), np.flatnonzero(~is_hit_Q)]
    drawn = [np.sort(random.choice(one, min(EACH, len(one)), replace=False)) for one in kinds]
    place_E = np.concatenate(drawn)
    asked = queries.take(place_E)
    row_ES, score_ES = top_rows(
        measured.predictions[place_E], bank, min(SEARCHED, bank.num_rows), exclude=asked
    )
    names = _Names(bank)
    lines = []
    for number, place in enumerate(place_E):
        target, first = int(asked.target_row_Q[number]), int(asked.first_row_Q[number])
        found = _first_of_groups(row_ES[number][np.isfinite(score_ES[number])], windows)
        passages = [names.of(row) for row in found] + [""] * (FOUND - len(found))
        context = range(max(first, target - CONTEXT_ROWS), target)
        query = per_query.iloc[place]
        lines.append(
            {
                "outcome": "hit" if is_hit_Q[place] else "miss",
                "rank": float(query["rank"]),
                "context": " / ".join(names.of(row) for row in context),
                "truth": names.of(target),
            }
            | {f"found_{at}": passage for at, passage in enumerate(passages, start=1)}
            | {name: query[name] for name in ("lane", "sequence", "document")}
        )
    return pd.DataFrame(lines)


class _Names:
    """The text of a row, or its place if it has none."""

    def __init__(self, bank: Bank) -> None:
        self.bank, self.texts = bank, bank.texts()

    def of(self, row: int) -> str:
        text = "" if self.texts is None else str(self.texts[row])
        document = self.bank.documents[self.bank.document_N[row]]
        return text or f"row {row:,}, {self.bank.sequences[self.bank.sequence_N[row]]}, {document}"


def _first_of_groups(row_S: IntArray, windows: Windows) -> list[int]:
    """Return the first FOUND rows of different passages."""
    firsts: dict[int, int] = {}
    for row in row_S.tolist():
        firsts.setdefault(int(windows.representative_N[row]), row)
    return list(firsts.values())[:FOUND]


@part("second stage")
def evaluate_reranking(
    model: nn.Module,
    bank: Bank,
    windows: Windows,
    queries: Queries,
    own: Evaluation,
    rerank: str = LANE,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Re-rank the answers of `own` to `queries`; return the report and the new ranks.

    For plain and for corrected scores the report has the weights, the figures with `ci95`, and the
    paired Hit@5 differences to the original ranks: of the order `rerank`, of the orders that it
    includes (`lane` and `lexical` for hybrid), and for lanes of the old system's rule (`old_rule`)
    and of the true lane (`true_lane`, the ceiling). `shortlist` is the number of re-ranked
    candidates, `on_list` the share of queries with the truth among them, `classifier` the accuracy
    of the predicted lanes. The table has rank_reranked, rank_corrected_reranked. Raises ValueError
    for a bank without the lanes or texts that `rerank` needs.
    """
    check_rerank(rerank, bank, windows, windows.seed)
    reranker = fit_reranker(model, bank, windows, own.row_correction, windows.seed)
    assert reranker is not None
    stage = reranker.stage(rerank, bank)
    clues = stage.after_queries(queries, bank)
    report: dict[str, Any] = {"order": rerank, "shortlist": SIZE}
    if clues.log_p_QL is not None:
        report["classifier"] = _classifier(clues.log_p_QL, queries, bank, windows)
    table = own.per_query[["query", "target_row"]].copy()
    names = {PLAIN: "rank", CORRECTED: "rank_corrected"}
    included = [one for one in reranker.weights if set(TERMS[one]) < set(TERMS[rerank])]
    for kind, correction in zip(KINDS, (None, own.row_correction), strict=True):
        groups = windows.representative_N
        listed = shortlist(own.predictions, queries, bank, groups, correction)
        rank_Q = own.per_query[names[kind]].to_numpy()
        case = _Case(listed, stage.terms(listed.row_QC, clues), rank_Q, queries, bank, windows.seed)
        weights = {one: reranker.weights[one][kind] for one in (rerank, *included)}
        table[f"{names[kind]}_reranked"] = case.ranks(weights[rerank])
        report[kind] = {"on_list": float(listed.is_truth_QC.any(axis=1).mean())}
        report[kind] |= case.report(weights[rerank])
        report[kind] |= {one: case.report(weights[one]) for one in included}
        if clues.log_p_QL is not None:
            report[kind] |= case.lane_controls(clues.log_p_QL)
    return jsonable(report), table


@dataclass(frozen=True)
class _Case:
    """One kind of scores: its shortlists with the terms of the stage, and its original ranks."""

    listed: Shortlist
    terms: Mapping[str, FloatArray]
    rank_Q: RankArray
    queries: Queries
    bank: Bank
    seed: int

    def ranks(self, weights: Weights) -> RankArray:
        """Return the ranks (Q,) after re-ranking."""
        return reranked_ranks(self.listed, summed(self.listed, self.terms, weights), self.rank_Q)

    def report(self, weights: Weights) -> dict[str, Any]:
        """Return the weights and the figures of the re-ranked lists."""
        return vars(weights) | self._figures(self.ranks(weights))

    def lane_controls(self, log_p_QL: FloatArray) -> dict[str, Any]:
        """Return the figures of the old rule and of the true lane."""
        code_N, code_Q = lane_codes(self.bank), target_codes(self.queries, self.bank)
        old_QC = old_rule_scores(self.listed, log_p_QL, code_N)
        true_Q = true_lane_ranks(self.listed, self.rank_Q, code_Q, code_N)
        old_Q = reranked_ranks(self.listed, old_QC, self.rank_Q)
        return {"old_rule": self._figures(old_Q), "true_lane": self._figures(true_Q)}

    def _figures(self, rank_Q: RankArray) -> dict[str, Any]:
        document_Q = self.bank.document_N[self.queries.target_row_Q]
        hit_Q, before_Q = hit_at(rank_Q, 5), hit_at(self.rank_Q, 5)
        difference = paired_difference(hit_Q, before_Q, document_Q, self.seed)
        return {
            **figures(rank_Q),
            "ci95": document_interval(rank_Q, document_Q, self.seed),
            "hit_at_5_difference": vars(difference),
        }


def _classifier(
    log_p_QL: FloatArray, queries: Queries, bank: Bank, windows: Windows
) -> dict[str, Any]:
    """Return the accuracy of the predicted lanes, beside that of the commonest train lane."""
    code_Q = target_codes(queries, bank)
    commonest = np.bincount(lane_codes(bank, windows.train_rows())).argmax()
    share = float((code_Q == commonest).mean())
    return calibration(log_p_QL, code_Q) | {"commonest_lane": share}
