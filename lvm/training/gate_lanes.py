"""The lanes that a gate is told in training.

Shapes: N bank rows, L lanes, X experts.
"""

import numpy as np
from numpy.typing import NDArray

from lvm.bank.store import UNASSIGNED, Bank
from lvm.system.seeding import generator
from lvm.windows.planning import Windows

IntArray = NDArray[np.int64]


def train_lanes(bank: Bank, windows: Windows) -> IntArray:
    """Return the lane (N,) of each train row; UNASSIGNED elsewhere and where there is none."""
    lane_N = np.full(bank.num_rows, UNASSIGNED, dtype=np.int64)
    train_row = windows.train_rows()
    if bank.lane_N is not None:
        lane_N[train_row] = bank.lane_N[train_row]
    return lane_N


def permuted_lanes(lane_N: IntArray, document_N: NDArray[np.integer], seed: int) -> IntArray:
    """Return the lanes exchanged among documents: as many documents of each lane, others.

    A document of several lanes counts as one for each run of rows of one lane.
    """
    breaks_N = np.ones(len(lane_N), dtype=bool)
    breaks_N[1:] = (lane_N[1:] != lane_N[:-1]) | (document_N[1:] != document_N[:-1])
    lane_R = lane_N[breaks_N]
    told = np.flatnonzero(lane_R != UNASSIGNED)
    lane_R[told] = generator(seed, "permuted lanes").permutation(lane_R[told])
    return lane_R[np.cumsum(breaks_N) - 1]


def lane_experts(num_lanes: int, num_experts: int) -> NDArray[np.bool_]:
    """Tell which experts answer for which lane, (L, X).

    Where there are no more lanes than experts, expert e answers for lane e mod L; otherwise lane l
    is answered by expert l mod X. With 16 lanes and 16 experts that is one expert a lane.
    """
    period = min(num_lanes, num_experts)
    return np.arange(num_lanes)[:, None] % period == np.arange(num_experts)[None, :] % period


def expert_prior(lane_N: IntArray, num_lanes: int, num_experts: int) -> NDArray[np.float64]:
    """Return the share (X,) of positions that each expert should get.

    It is the share of the expert's lanes among the rows, one row added to each lane so that none
    has zero, divided equally among the experts of a lane; without lanes it is 1 / X.
    """
    if num_lanes == 0:
        return np.full(num_experts, 1 / num_experts)
    count_L = np.bincount(lane_N[lane_N != UNASSIGNED], minlength=num_lanes) + 1.0
    belongs_LX = lane_experts(num_lanes, num_experts)
    each_L = count_L / count_L.sum() / belongs_LX.sum(axis=1)
    prior_X: NDArray[np.float64] = each_L @ belongs_LX
    return prior_X
