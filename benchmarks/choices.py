"""Compare choices made on samples of val with those made on all val queries.

`python -m benchmarks.choices --bank <bank>` prints the choices on the first 500, 1,000, 2,000, ...
val queries: the decay of the moving average, the penalty of the ridge, and the hubness beta of
both.
"""

import click
import numpy as np
from tabulate import tabulate

from lvm.bank.bank import open_bank
from lvm.evaluation.free_predictors import DECAYS, PENALTIES, decay_models, ridge_models
from lvm.evaluation.metrics import hit_at
from lvm.models.predict import predict_queries
from lvm.retrieval.exact import Ranks, rank_together, selection_score
from lvm.retrieval.hubness import BETAS, penalties
from lvm.windows.export import ensure_windows

SIZES = (500, 1000, 2000, 4000)


@click.command()
@click.option("--bank", "path", required=True, help="Bank folder.")
@click.option("--ctx", default=1000, show_default=True, help="Rows of context.")
@click.option("--queries", "num_queries", default=4000, show_default=True, help="Val queries.")
def main(path: str, ctx: int, num_queries: int) -> None:
    """Print each choice and its Hit@5 on all queries."""
    bank = open_bank(path)
    windows = ensure_windows(bank, ctx)
    queries = windows.queries["val"].head(num_queries)
    groups = windows.representative_N
    found: dict[str, tuple[tuple[float, ...], list[Ranks]]] = {}
    families = {
        "decay of ema": (DECAYS, decay_models(bank)),
        "penalty of ridge": (PENALTIES, ridge_models(bank, windows, windows.seed)),
    }
    for name, (values, models) in families.items():
        predictions = [predict_queries(model, bank, queries) for model in models]
        answers = [(prediction_QD, (None,)) for prediction_QD in predictions]
        ranks = [one for (one,) in rank_together(answers, queries, bank, groups)]
        found[name] = (values, ranks)
        best = chosen(ranks, len(queries))
        corrections = penalties(models[best], bank, windows, windows.seed)
        answers = [(predictions[best], corrections)]
        found[f"beta, {name.split()[-1]}"] = (
            BETAS,
            rank_together(answers, queries, bank, groups)[0],
        )
    sizes = [size for size in SIZES if size < len(queries)] + [len(queries)]
    rows = []
    for name, (values, ranks) in found.items():
        for size in sizes:
            place = chosen(ranks, size)
            hit = hit_at(ranks[place].rank_Q, 5).mean()
            lost = hit - hit_at(ranks[chosen(ranks, len(queries))].rank_Q, 5).mean()
            rows.append(
                [name, f"{size:,}", values[place], f"{100 * hit:.2f}", f"{100 * lost:+.2f}"]
            )
    print(f"{path}: {bank.num_rows:,} rows, {len(queries):,} val queries, ctx {ctx}")
    headers = ["choice", "queries", "chosen", "Hit@5 % on all", "points lost"]
    print(tabulate(rows, headers, disable_numparse=True))


def chosen(ranks: list[Ranks], num_queries: int) -> int:
    """Return the index of the model with the best ranks on the first queries."""
    scores = [selection_score(np.asarray(one.rank_Q[:num_queries])) for one in ranks]
    return max(range(len(ranks)), key=lambda place: (scores[place], -place))


if __name__ == "__main__":
    main()
