"""What re-ranking by lane does to the candidates of a replay."""

from dataclasses import asdict, dataclass
from typing import Any

from lvm.bank.store import Bank
from lvm.evaluation.intervals import Difference, document_interval, paired_difference
from lvm.evaluation.metrics import figures, hit_at
from lvm.shadow.comparison import ShadowResult


@dataclass(frozen=True)
class Reranked:
    """One candidate with its best 200 ordered anew.

    `change` is the paired Hit@5 difference to its own ranks as they were, `lead` that to the best
    free predictor, re-ranked too; None for that one itself, or where none was scored.
    """

    name: str
    figures: dict[str, float]
    ci95: dict[str, list[float]]
    change: Difference
    lead: Difference | None

    def report(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return asdict(self)


def reranked_outcomes(result: ShadowResult, bank: Bank) -> list[Reranked]:
    """Return the scored candidates from the best re-ranked Hit@5 down."""
    tables = dict(list(result.per_query.groupby("candidate"))) if len(result.per_query) else {}
    hits = {name: hit_at(table["rank_reranked"].to_numpy(), 5) for name, table in tables.items()}
    free_Q = hits.get(result.best_free or "")
    found = []
    for name, table in tables.items():
        rank_Q = table["rank_reranked"].to_numpy()
        document_Q = bank.document_N[table["target_row"].to_numpy()]
        before_Q = hit_at(table["rank"].to_numpy(), 5)
        lead = None
        if free_Q is not None and name != result.best_free:
            lead = paired_difference(hits[name], free_Q, document_Q, result.seed)
        found.append(
            Reranked(
                name=str(name),
                figures=figures(rank_Q),
                ci95=document_interval(rank_Q, document_Q, result.seed),
                change=paired_difference(hits[name], before_Q, document_Q, result.seed),
                lead=lead,
            )
        )
    return sorted(found, key=lambda one: -one.figures["hit_at_5"])
