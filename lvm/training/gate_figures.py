"""What the choices of a gate show.

Shapes: Q queries, L lanes, X experts.
"""

import numpy as np
from numpy.typing import NDArray

from lvm.bank.store import UNASSIGNED

DEAD_SHARE = 0.5


def load_figures(count_X: NDArray[np.integer]) -> dict[str, float]:
    """Return figures of the load, the share of all choices that each expert has.

    `expert_load_max` is the largest load, `expert_load_entropy` its entropy over log X (1: equal
    loads), `dead_experts` counts those below 0.5 / X.
    """
    load_X = count_X / max(1, count_X.sum())
    some = load_X[load_X > 0]
    return {
        "expert_load_max": float(load_X.max()),
        "expert_load_entropy": float(-(some * np.log(some)).sum() / np.log(len(load_X))),
        "dead_experts": float((load_X < DEAD_SHARE / len(load_X)).sum()),
    }


def lane_table(
    gate_QX: NDArray[np.floating], lane_Q: NDArray[np.integer], num_lanes: int
) -> NDArray[np.float64]:
    """Return the weight (L, X) that the queries of each lane give to each expert, summed."""
    table_LX = np.zeros((num_lanes, gate_QX.shape[1]))
    known_Q = lane_Q != UNASSIGNED
    np.add.at(table_LX, lane_Q[known_Q], gate_QX[known_Q])
    return table_LX


def mutual_information(table_LX: NDArray[np.floating]) -> float:
    """Return the mutual information of lane and expert in nats; at most the lanes' entropy."""
    joint_LX = table_LX / max(table_LX.sum(), np.finfo(float).tiny)
    apart_LX = joint_LX.sum(axis=1, keepdims=True) * joint_LX.sum(axis=0, keepdims=True)
    some = joint_LX > 0
    return float((joint_LX[some] * np.log(joint_LX[some] / apart_LX[some])).sum())
