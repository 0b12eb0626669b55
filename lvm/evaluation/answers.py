"""The per-query table: what was asked, at which rank it was answered.

Shapes: Q queries.
"""

import numpy as np
import pandas as pd

from lvm.bank.store import Bank
from lvm.evaluation.lane_metrics import UNASSIGNED_LANE, lane_codes, lane_names
from lvm.retrieval.exact import Ranks
from lvm.windows.queries import Queries


def query_table(queries: Queries, bank: Bank) -> pd.DataFrame:
    """Name the target of each query: query, target_row, sequence, document, lane.

    `lane` is UNASSIGNED_LANE where the row, or the whole bank, has none.
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
