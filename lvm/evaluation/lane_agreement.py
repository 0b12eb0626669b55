"""Agreement of assigned lanes with the labels that a bank brings along.

Shapes: N bank rows, A labels of the bank, L assigned lanes.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from lvm.bank.row_table import UNASSIGNED
from lvm.bank.store import Bank


@dataclass(frozen=True)
class Agreement:
    """How far assigned lanes are the bank's own labels, over the rows that have both.

    Attributes:
        adjusted_rand: 1 for equal partitions, 0 in the mean for random ones (Hubert & Arabie,
            Journal of Classification 1985); `nmi` is mutual information over the mean entropy.
        best_match: lane of each label in the one-to-one matching with the most rows; its share of
            the rows is `best_match_accuracy`, of all labelled rows `best_match_of_labelled`.
        same_name_accuracy: share whose lane is called as their label, among rows whose label is
            one of the lanes' names; None where no name is shared.
        count_AL: rows by (label, lane), the unassigned ones in the last column.
    """

    num_labelled: int
    num_assigned: int
    adjusted_rand: float
    nmi: float
    best_match: dict[str, str]
    best_match_accuracy: float
    best_match_of_labelled: float
    same_name_accuracy: float | None
    labels: tuple[str, ...]
    lanes: tuple[str, ...]
    count_AL: NDArray[np.int64]

    def report(self) -> dict[str, Any]:
        """Return the agreement as JSON-able values."""
        values = asdict(self) | {"counts": self.count_AL.tolist()}
        del values["count_AL"]
        return values


def lane_agreement(labelled: Bank, assigned: Bank) -> Agreement | None:
    """Compare the lanes of two views of one bank; None where no row has both label and lane."""
    label_N, lane_N = labelled.lane_N, assigned.lane_N
    if label_N is None or lane_N is None:
        return None
    has_label_N = label_N != UNASSIGNED
    both_N = has_label_N & (lane_N != UNASSIGNED)
    if not both_N.any():
        return None
    num_lanes = len(assigned.lanes)
    column_N = np.where(lane_N == UNASSIGNED, num_lanes, lane_N).astype(np.int64)
    flat = label_N[has_label_N].astype(np.int64) * (num_lanes + 1) + column_N[has_label_N]
    size = len(labelled.lanes) * (num_lanes + 1)
    count_AL = np.bincount(flat, minlength=size).reshape(-1, num_lanes + 1)
    row, column = linear_sum_assignment(count_AL[:, :-1], maximize=True)
    num_matched = int(count_AL[row, column].sum())
    return Agreement(
        num_labelled=int(has_label_N.sum()),
        num_assigned=int(both_N.sum()),
        adjusted_rand=float(adjusted_rand_score(label_N[both_N], lane_N[both_N])),
        nmi=float(normalized_mutual_info_score(label_N[both_N], lane_N[both_N])),
        best_match={labelled.lanes[a]: assigned.lanes[b] for a, b in zip(row, column, strict=True)},
        best_match_accuracy=num_matched / int(both_N.sum()),
        best_match_of_labelled=num_matched / int(has_label_N.sum()),
        same_name_accuracy=_same_name(count_AL, labelled.lanes, assigned.lanes),
        labels=labelled.lanes,
        lanes=assigned.lanes,
        count_AL=count_AL,
    )


def _same_name(
    count_AL: NDArray[np.int64], labels: tuple[str, ...], lanes: tuple[str, ...]
) -> float | None:
    shared = [name for name in labels if name in lanes]
    num_rows = sum(int(count_AL[labels.index(name), :-1].sum()) for name in shared)
    if not num_rows:
        return None
    same = sum(int(count_AL[labels.index(name), lanes.index(name)]) for name in shared)
    return same / num_rows
