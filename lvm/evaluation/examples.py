"""Examples of answered queries, hits beside misses, drawn by seed.

Shapes: Q queries, E examples.
"""

import numpy as np
import pandas as pd

from lvm.bank.store import Bank
from lvm.evaluation.evaluate import Evaluation
from lvm.retrieval.search import IntArray, top_rows
from lvm.system.seeding import generator
from lvm.windows.planning import Windows
from lvm.windows.queries import Queries

EACH, K = 20, 5
CONTEXT_ROWS, FOUND = 2, 3
SEARCHED = 24  # rows, so that FOUND passages are left when twins count once


def example_table(
    measured: Evaluation, queries: Queries, bank: Bank, windows: Windows
) -> pd.DataFrame:
    """Return up to EACH hits (rank within K), then up to EACH misses, in the queries' order.

    `queries` are those of `measured`. Columns: outcome, rank (plain, filtered), context (its
    last CONTEXT_ROWS passages), truth, found_1 ... found_3 (the best passages outside the context,
    twins once), lane, sequence, document. A row without text is named by its place.
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
    """The text of a row, or where it lies."""

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
