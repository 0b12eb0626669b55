"""What the hubness correction owes to the split: `python -m benchmarks.hubness --bank <bank>`.

A train row stands among the train-time predictions of its own document, a val row does not: part of
its penalty tells train rows from others, whatever they are like. Figures on val for the penalty of
all predictions, for one without those whose target is the row itself, for one without those whose
target lies in the row's own document.
Shapes: N bank rows, P train-time predictions, Q queries.
"""

from collections.abc import Callable

import click
import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate

from lvm.bank.store import open_bank
from lvm.evaluation.free_predictors import fit_free_predictors
from lvm.evaluation.intervals import paired_difference
from lvm.evaluation.metrics import figures, hit_at
from lvm.prediction.predict import on_train_rows, predict_queries
from lvm.retrieval.exact import exact_ranks
from lvm.retrieval.hubness import NEIGHBOURS, neighbour_penalty, train_positions
from lvm.windows.export import ensure_windows

BLOCK = 1024
HEADERS = ["predictions counted", "beta", "Hit@1 %", "Hit@5 %", "Hit@10 %", "median"] + [
    "against plain, points of Hit@5"
]


def mean_of_nearest(
    unit_rows: Callable[[slice], NDArray[np.float32]],
    prediction_PD: NDArray[np.float32],
    row_label_N: NDArray[np.integer],
    label_P: NDArray[np.integer],
) -> NDArray[np.float32]:
    """Return the mean cosine (N,) of each row to its nearest predictions of another label."""
    prediction, label = torch.from_numpy(prediction_PD), torch.from_numpy(label_P)
    means = []
    for begin in range(0, len(row_label_N), BLOCK):
        rows = slice(begin, begin + BLOCK)
        own_BP = torch.from_numpy(row_label_N[rows])[:, None] == label
        score_BP = (torch.from_numpy(unit_rows(rows)) @ prediction.T).masked_fill(own_BP, -1.0)
        means.append(score_BP.topk(NEIGHBOURS, dim=1, sorted=False).values.mean(dim=1).numpy())
    return np.concatenate(means)


@click.command()
@click.option("--bank", "path", required=True, help="Bank folder.")
@click.option("--ctx", default=1000, show_default=True, help="Rows of context.")
@click.option("--predictor", default="ema", show_default=True, help="Free predictor.")
@click.option("--queries", "num_queries", default=4000, show_default=True, help="Val queries.")
@click.option("--beta", "betas", multiple=True, default=(0.5, 0.75), show_default=True)
def main(path: str, ctx: int, predictor: str, num_queries: int, betas: tuple[float, ...]) -> None:
    """Print the figures on val with each way of counting."""
    bank = open_bank(path)
    windows = ensure_windows(bank, ctx)
    model = fit_free_predictors(bank, windows, (predictor,), windows.seed)[predictor]
    positions = train_positions(bank, windows, windows.seed)
    prediction_PD = predict_queries(on_train_rows(model), bank, positions)
    target_P, row_N = positions.target_row_Q, np.arange(bank.num_rows)
    nobody_P = np.full(len(target_P), -1)
    ways = {
        "all": (row_N, nobody_P),
        "not of the row itself": (row_N, target_P),
        "not of its document": (bank.document_N, bank.document_N[target_P]),
    }
    names, corrections = [("none", 0.0)], [None]
    for name, (row_label_N, label_P) in ways.items():
        mean_N = mean_of_nearest(bank.unit, prediction_PD, row_label_N, label_P)
        names += [(name, beta) for beta in betas]
        corrections += [neighbour_penalty(mean_N, beta) for beta in betas]
    queries = windows.queries["val"].head(num_queries)
    prediction_QD = predict_queries(model, bank, queries)
    found = exact_ranks(prediction_QD, queries, bank, windows.representative_N, corrections)
    document_Q = bank.document_N[queries.target_row_Q]
    rows = []
    for (name, beta), ranks in zip(names, found, strict=True):
        values = figures(ranks.rank_Q)
        hits = [f"{100 * values[f'hit_at_{k}']:.2f}" for k in (1, 5, 10)]
        change = paired_difference(
            hit_at(ranks.rank_Q, 5), hit_at(found[0].rank_Q, 5), document_Q, seed=0
        )
        shown = f"{100 * change.mean:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
        rows.append([name, beta, *hits, f"{values['median_rank']:.0f}", shown])
    print(f"{predictor}, val, {len(queries)} queries, {len(target_P)} train-time predictions")
    print(tabulate(rows, HEADERS))


if __name__ == "__main__":
    main()
