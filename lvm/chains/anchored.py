"""Anchored pages: consecutive rows of a pool around the nearest neighbours of missed answers.

Shapes: N pool rows, Q failing queries, k neighbours, D vector dim.
"""

from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lvm.bank.bank import Bank, FloatArray
from lvm.bank.files import read_columns
from lvm.bank.row_table import Integers
from lvm.chains.walks import Candidates, Chain, bank_pool, known_lanes, row_heads, row_lane_names
from lvm.system.seeding import generator
from lvm.system.settings import ChainRules

NUMBERS = ("target_row", "rank")
COLUMNS = (*NUMBERS, "split")
VAL = "val"
RUN_OVER_VAL = "give the per_query.parquet of a run over val: mlflow run . -e eval -P split=val"
MAX_QUERIES = 10_000_000
SAMPLE_ROWS = 2048
SEARCH_ROWS = 4096


@dataclass(frozen=True)
class AnchorPlan:
    """Which missed answers pages are searched for: failing `queries` of `lanes` (empty for all).

    `queries` is a parquet file of val queries; pages near test answers would leak the test split.
    `anchor` is the least cosine of an anchor row to the missed answer; None means a percentile of
    the pool's nearest-neighbour cosines.
    """

    queries: str
    lanes: tuple[str, ...] = ()
    anchor: float | None = None
    neighbours: int = 10
    max_chains: int | None = None
    seed: int = 0


def anchored_candidates(pool: Bank, base: Bank, plan: AnchorPlan, rules: ChainRules) -> Candidates:
    """Return pages of `pool` around the neighbours of missed answers, nearest first.

    A page is up to `max_length` consecutive rows of one document with the anchor in the middle. If
    the pool has no lanes, a page takes the lane of its query; if the base has none, a page keeps
    the lane of its rows.
    """
    target_Q, failing_Q = read_queries(plan.queries, base, rules)
    lane_N = row_lane_names(base)
    known_lanes(plan.lanes, list(base.lanes), f"base {base.path}")
    if plan.lanes:
        failing_Q = failing_Q[np.isin(lane_N[failing_Q], plan.lanes)]
    if not len(failing_Q):
        named = f" of lanes {', '.join(plan.lanes)}" if plan.lanes else ""
        raise ValueError(
            f"queries {plan.queries}: none{named} has a rank above {rules.failing_rank}; there is "
            "nothing to anchor pages to"
        )
    concepts = bank_pool(pool)
    index = faiss.IndexFlatIP(pool.dim)
    for _, block in pool.unit_blocks():
        index.add(block)
    least = plan.anchor
    if least is None:
        least = nearest_percentile(pool, index, rules, plan.seed)
    score_Qk, row_Qk = _nearest(index, base, failing_Q, plan.neighbours)
    near_Qk = (score_Qk >= least) & (row_Qk >= 0)
    query_A, at_A = np.nonzero(near_Qk)
    order = np.argsort(-score_Qk[query_A, at_A], kind="stable")
    query_A, row_A = query_A[order], row_Qk[query_A, at_A][order]
    if plan.max_chains is not None:
        cut = rules.candidates_per_chain * plan.max_chains
        query_A, row_A = query_A[:cut], row_A[:cut]
    heads = row_heads(pool)
    lanes = lane_N[failing_Q].tolist() if base.lane_N is not None else [None] * len(failing_Q)
    pages = _pages(pool, row_A, rules)
    chains = [
        Chain(str(heads[row]), page, lanes[query])
        for query, row, page in zip(query_A.tolist(), row_A.tolist(), pages, strict=True)
    ]
    found = int(near_Qk.any(axis=1).sum())
    origin = "given" if plan.anchor is not None else f"percentile {rules.anchor_percentile:g}"
    notes = [
        f"{len(failing_Q):,} missed answers, {found:,} with a neighbour of cosine {least:.3f} "
        f"({origin}) or more"
    ]
    if base.lane_N is None and pool.lane_N is not None:
        notes.append(f"base {base.path} has no lanes: a page keeps the lane of its rows")
    if base.lane_N is not None and pool.lane_N is None:
        notes.append(f"pool {pool.path} has no lanes: a page takes the lane of its query")
    return Candidates(pool.path.name, chains, concepts, tuple(notes), answer_rows=target_Q)


def _nearest(
    index: faiss.Index, base: Bank, row_Q: Integers, k: int
) -> tuple[FloatArray, Integers]:
    """Return cosines and index rows of the k nearest neighbours of base rows, (Q, k) each."""
    parts = [
        index.search(base.unit(row_Q[start : start + SEARCH_ROWS]), min(k, index.ntotal))
        for start in range(0, len(row_Q), SEARCH_ROWS)
    ]
    return np.concatenate([score for score, _ in parts]), np.concatenate([row for _, row in parts])


def read_queries(path: str, base: Bank, rules: ChainRules) -> tuple[Integers, Integers]:
    """Return the target rows of all queries, and of those with a rank above `failing_rank`."""
    table = _table(path, base)
    target_Q = table["target_row"].to_numpy(dtype=np.int64)
    failed_Q = table["rank"].to_numpy(dtype=np.float64) > rules.failing_rank
    return np.unique(target_Q), np.unique(target_Q[failed_Q])


def nearest_percentile(pool: Bank, index: faiss.Index, rules: ChainRules, seed: int) -> float:
    """Return the percentile of the rows' cosines to their nearest rows that are not twins."""
    random = generator(seed, "anchor sample")
    sample = np.sort(random.permutation(pool.num_rows)[:SAMPLE_ROWS])
    score_Qk, _ = index.search(pool.unit(sample), min(16, pool.num_rows))
    other_Qk = np.where(score_Qk < rules.twin, score_Qk, -1.0)
    nearest_Q = other_Qk.max(axis=1)
    nearest_Q = nearest_Q[nearest_Q > -1]
    if not len(nearest_Q):
        raise ValueError(f"source {pool.path}: its rows are all twins; give anchor a number")
    return float(np.percentile(nearest_Q, rules.anchor_percentile))


def _table(path: str, base: Bank) -> pd.DataFrame:
    try:
        there = pq.read_schema(path).names
        missing = [name for name in COLUMNS if name not in there]
        if missing:
            raise ValueError(f"queries {path}: no column {', '.join(missing)}; {RUN_OVER_VAL}")
        columns = [name for name in (*COLUMNS, "sequence") if name in there]
        if pq.read_metadata(path).num_rows > MAX_QUERIES or len(set(there)) < len(there):
            raise ValueError(
                f"queries {path}: has a column twice, or more than {MAX_QUERIES:,} rows"
            )
        table = read_columns([Path(path)], columns)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"queries {path}: missing or not parquet") from error
    other = table["split"][table["split"] != VAL]
    if len(other):
        raise ValueError(
            f"queries {path}: {len(other):,} of {len(table):,} queries are of split "
            f"{other.iloc[0]}, by which a model is judged; {RUN_OVER_VAL}"
        )
    for name in NUMBERS:
        if not pd.api.types.is_numeric_dtype(table[name]) or table[name].isna().any():
            raise ValueError(f"queries {path}: {name} must be a number in every line")
    outside = ~table["target_row"].between(0, base.num_rows - 1)
    if outside.any():
        raise ValueError(
            f"queries {path}: target_row {table['target_row'][outside].iloc[0]} is not a row of "
            f"base {base.path} ({base.num_rows} rows); give the bank of these queries"
        )
    if "sequence" in table:
        names = np.array(base.sequences, dtype=object)[base.sequence_N[table["target_row"]]]
        foreign = table["sequence"].to_numpy() != names
        if foreign.any():
            row = int(table["target_row"].to_numpy()[foreign][0])
            raise ValueError(
                f"queries {path}: row {row} is of sequence {table['sequence'][foreign].iloc[0]!r}, "
                f"in base {base.path} of {names[foreign][0]!r}; give the bank of these queries"
            )
    return table


def _pages(pool: Bank, anchor_A: Integers, rules: ChainRules) -> list[tuple[int, ...]]:
    """Return the rows around each anchor, shifted as needed to stay inside its document."""
    table = pool.document_table()
    first = table["first_row"].to_numpy()
    end = first + table["num_rows"].to_numpy()
    at_A = np.searchsorted(first, anchor_A, side="right") - 1
    pages = []
    for anchor, low, high in zip(anchor_A, first[at_A], end[at_A], strict=True):
        start = max(low, min(anchor - rules.max_length // 2, high - rules.max_length))
        pages.append(tuple(range(int(start), int(min(start + rules.max_length, high)))))
    return pages
