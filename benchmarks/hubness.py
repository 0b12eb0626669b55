"""The hubness correction by both definitions: `python -m benchmarks.hubness --bank <bank>`.

The older definition counts the train-time predictions of a row's own document, the present one
omits them. For every free predictor it prints the figures, plain and corrected (beta chosen on
val), the paired differences, and how much nearer train rows are to their predictions than other
rows.
"""

import click
import numpy as np
from tabulate import tabulate

from lvm.bank.bank import open_bank
from lvm.evaluation.free_predictors import FREE, fit_free_predictors
from lvm.evaluation.metrics import figures, hit_at, paired_difference, points
from lvm.models.predict import predict_queries
from lvm.retrieval.exact import rank_together
from lvm.retrieval.hubness import fit_hubness
from lvm.windows.export import ensure_windows
from lvm.windows.planning import TRAIN

WAYS = ("plain", "own documents counted", "own documents left out")
HEADERS = ["predictor", "correction", "beta", "Hit@1 %", "Hit@5 %", "Hit@10 %", "median"]
HEADERS += ["Hit@5 - plain, points", "left out - counted", "train - other rows"]


@click.command()
@click.option("--bank", "path", required=True, help="Bank folder.")
@click.option("--ctx", default=1000, show_default=True, help="Rows of context.")
@click.option("--predictors", default=",".join(FREE), show_default=True, help="Free predictors.")
@click.option("--split", default="test", type=click.Choice(("test", "val")), show_default=True)
@click.option("--queries", "num_queries", default=10_000, show_default=True, help="At most.")
def main(path: str, ctx: int, predictors: str, split: str, num_queries: int) -> None:
    """Print the figures of each predictor, three lines each."""
    bank = open_bank(path)
    windows = ensure_windows(bank, ctx)
    queries = windows.queries[split].head(num_queries)
    document_Q = bank.document_N[queries.target_row_Q]
    is_train_N = windows.split_N == TRAIN
    answers, fitted = [], {}
    models = fit_free_predictors(bank, windows, predictors.split(","), windows.seed)
    for name, model in models.items():
        both = [fit_hubness(model, bank, windows, windows.seed, own) for own in (False, True)]
        fitted[name] = both
        corrections = (None, *(one.row_correction for one in both))
        answers.append((predict_queries(model, bank, queries), corrections))
    ranked = rank_together(answers, queries, bank, windows.representative_N)

    rows = []
    for (name, both), ranks in zip(fitted.items(), ranked, strict=True):
        hits = [hit_at(one.rank_Q, 5) for one in ranks]
        for place, (way, one) in enumerate(zip(WAYS, ranks, strict=True)):
            found = figures(one.rank_Q)
            cells = [f"{100 * found[f'hit_at_{k}']:.2f}" for k in (1, 5, 10)]
            changes, beta, gap = ["", ""], "", ""
            if place:
                changes[0] = points(paired_difference(hits[place], hits[0], document_Q, 0))
                beta, bias_N = both[place - 1].beta, both[place - 1].row_correction[:, 1]
                away = np.mean(bias_N[~is_train_N]) - np.mean(bias_N[is_train_N])
                gap = f"{away / beta:+.4f}" if beta else ""
            if place == 2:
                changes[1] = points(paired_difference(hits[2], hits[1], document_Q, 0))
            rows.append([name, way, beta, *cells, f"{found['median_rank']:g}", *changes, gap])
    num_documents = len(np.unique(document_Q))
    print(f"{split}: {len(queries):,} queries from {num_documents:,} documents, ctx {ctx}")
    print(tabulate(rows, HEADERS, disable_numparse=True))


if __name__ == "__main__":
    main()
