"""Recompute figures of copy-last and the moving average without lvm, beside those of `eval`.

`python -m benchmarks.independent --bank <bank folder> --measured <measured.parquet of an eval>`.
Duplicate groups, averages and ranks are recomputed in numpy; the queries are those of the eval.
Shapes: N bank rows, D vector dim, K groups, Q queries.
"""

from pathlib import Path

import click
import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from tabulate import tabulate

TWIN_COSINE = 0.999
SCORE_TIE = 1e-6
BLOCK = 200


def groups(stored_ND: np.ndarray, unit_ND: np.ndarray) -> np.ndarray:
    """Return the group (N,) of each row: exact twins, or cosine >= 0.999, chained.

    Rows this close differ by at most sqrt(2 - 2 x 0.999) along any direction, so only neighbours in
    the order along a random direction are compared.
    """
    draw = np.random.default_rng(1)
    along_N = unit_ND @ draw.normal(size=unit_ND.shape[1]).astype(np.float32)
    scale = np.linalg.norm(np.random.default_rng(1).normal(size=unit_ND.shape[1]))
    order = np.argsort(along_N)
    place = along_N[order] / scale
    reach = np.sqrt(2 - 2 * TWIN_COSINE) * 1.001
    bytes_N = np.ascontiguousarray(stored_ND).view(np.dtype((np.void, stored_ND[0].nbytes)))
    _, first_N, twin_N = np.unique(bytes_N.ravel(), return_index=True, return_inverse=True)
    left, right = [np.arange(len(unit_ND))], [first_N[twin_N]]
    for step in range(1, len(order)):
        near = np.flatnonzero(place[step:] - place[:-step] <= reach)
        if not len(near):
            break
        one, other = order[near], order[near + step]
        close = np.einsum("nd,nd->n", unit_ND[one], unit_ND[other]) >= TWIN_COSINE
        left.append(one[close])
        right.append(other[close])
        if step == 400:  # more neighbours gave no further pair in a bank of 121,518 rows
            break
    pairs = (np.concatenate(left), np.concatenate(right))
    graph = coo_matrix((np.ones(len(pairs[0])), pairs), shape=(len(unit_ND),) * 2)
    return connected_components(graph, directed=False)[1]


def ranks(
    unit_ND: np.ndarray, group_N: np.ndarray, start_N: np.ndarray, asked: tuple, decay: float
) -> np.ndarray:
    """Return the filtered rank of each target under weights decay^k (0: the last row alone)."""
    target_Q, ctx = asked
    row_N = pd.Series(np.arange(len(unit_ND))).groupby(group_N)
    first_K, last_K = row_N.min().to_numpy(), row_N.max().to_numpy()
    prediction_QD = np.empty((len(target_Q), unit_ND.shape[1]), np.float32)
    for place, target in enumerate(target_Q):
        context_TD = unit_ND[max(start_N[target], target - ctx) : target][::-1]
        weight_T = decay ** np.arange(len(context_TD)) if decay else np.eye(1, len(context_TD))[0]
        mean_D = weight_T @ context_TD
        prediction_QD[place] = mean_D / np.linalg.norm(mean_D)
    rank_Q = np.empty(len(target_Q))
    for begin in range(0, len(target_Q), BLOCK):
        score_QK = prediction_QD[begin : begin + BLOCK] @ unit_ND[first_K].T
        for place, target in enumerate(target_Q[begin : begin + BLOCK]):
            score_K, own = score_QK[place], group_N[target]
            truth = score_K[own]
            low = max(start_N[target], target - ctx)
            score_K[(first_K >= low) & (last_K < target)] = -9
            score_K[own] = -9
            ties = (np.abs(score_K - truth) <= SCORE_TIE).sum()
            rank_Q[begin + place] = 1 + (score_K > truth + SCORE_TIE).sum() + ties / 2
    return rank_Q


@click.command()
@click.option("--bank", required=True, help="Bank folder.")
@click.option("--measured", required=True, help="measured.parquet of an `eval` of that bank.")
@click.option("--ctx", default=1000, show_default=True, help="Rows of context of that eval.")
@click.option("--decay", default=0.5, show_default=True, help="Decay of its moving average.")
@click.option("--queries", default=3000, show_default=True, help="First queries at most.")
def main(bank: str, measured: str, ctx: int, decay: float, queries: int) -> None:
    """Print Hit@1/5/10 of both computations."""
    stored_ND = np.load(Path(bank) / "vectors.npy")
    unit_ND = stored_ND.astype(np.float32)
    unit_ND /= np.linalg.norm(unit_ND, axis=1, keepdims=True)
    sequence_N = pd.read_parquet(Path(bank) / "rows.parquet")["sequence"].to_numpy()
    begins_N = np.r_[True, sequence_N[1:] != sequence_N[:-1]]
    start_N = np.maximum.accumulate(np.where(begins_N, np.arange(len(begins_N)), 0))
    group_N = groups(stored_ND, unit_ND)
    table = pd.read_parquet(measured)
    rows = []
    for name, own_decay in (("copy-last", 0.0), ("ema", decay)):
        part = table[table["predictor"] == name].head(queries)
        target_Q = part["target_row"].to_numpy()
        found = {
            "independent": ranks(unit_ND, group_N, start_N, (target_Q, ctx), own_decay),
            "lvm": part["rank"].to_numpy(),
        }
        for who, rank_Q in found.items():
            hits = [f"{100 * (rank_Q <= k).mean():.2f}" for k in (1, 5, 10)]
            rows.append([name, who, *hits, f"{np.median(rank_Q):g}"])
    print(f"{queries:,} queries, {group_N.max() + 1:,} groups of {len(group_N):,} rows")
    print(tabulate(rows, ["predictor", "by", "Hit@1 %", "Hit@5 %", "Hit@10 %", "median rank"]))


if __name__ == "__main__":
    main()
