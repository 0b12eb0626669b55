"""Ablations of an evaluation: what a predictor owes to each of its parts, to rows far back."""

from typing import Any

from lvm.bank.store import Bank
from lvm.evaluation.controls import MAX_QUERIES, Questions, RankArray
from lvm.evaluation.intervals import holm
from lvm.models.skip import Skip, without
from lvm.prediction.predict import predict_queries
from lvm.system.atomic import jsonable
from lvm.windows.planning import Windows
from lvm.windows.queries import Queries

LAST_ROWS = 20


def run_ablations(
    model: Skip, bank: Bank, windows: Windows, queries: Queries, rank_Q: RankArray
) -> dict[str, Any]:
    """Return the report of all ablations on the first MAX_QUERIES of `queries`, as JSON values.

    `rank_Q` holds the plain filtered ranks of the whole predictor. Keys: queries, documents,
    `full` (its figures), `without`: one entry a part with the figures of the predictor without it;
    the part `older_rows` is all but the last LAST_ROWS rows of the context. Weights stay as they
    were trained. Differences are without - full; `p_holm` is that of Hit@5 over all parts.
    """
    asked = Questions(bank, windows, queries).head(MAX_QUERIES)
    full_Q = rank_Q[: len(asked.queries)]
    predictors: list[tuple[str, Skip, Queries]] = [
        (part, without(model, part), asked.queries) for part in model.ablations
    ]
    if asked.queries.ctx > LAST_ROWS:
        predictors.append(("older_rows", model, asked.queries.with_ctx(LAST_ROWS)))
    answers = [predict_queries(part, bank, short, progress=True) for _, part, short in predictors]
    entries: list[dict[str, Any]] = [
        {"part": name, **asked.figures(part_Q), **asked.differences(part_Q, full_Q)}
        for (name, _, _), part_Q in zip(predictors, asked.ranks(*answers), strict=True)
    ]
    p_values = holm([entry["hit_at_5_difference"]["p_value"] for entry in entries])
    for entry, p_value in zip(entries, p_values, strict=True):
        entry["p_holm"] = float(p_value)
    report = {**asked.size(), "full": asked.figures(full_Q), "without": entries}
    return dict(jsonable(report))
