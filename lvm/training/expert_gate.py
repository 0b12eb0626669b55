"""Training of the experts' gate: losses, lane labels, statistics of its choices.

Shapes: B windows of a batch, T time, P positions, Q queries, N bank rows, L lanes, X experts.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lvm.bank.bank import UNASSIGNED, Bank
from lvm.models.tmd_experts import top_gates
from lvm.system.seeding import generator
from lvm.training.config import Settings
from lvm.training.data import Batch, Batches
from lvm.windows.planning import IntArray, Windows

MEAN_DECAY = 0.95
DEAD_SHARE = 0.5


@dataclass(frozen=True)
class LaneLabels:
    """The lane of each position's target (B, T), UNASSIGNED if unknown; the weight of its loss."""

    lane_BT: Tensor
    weight: float


class GateLoss(nn.Module):
    """balance * KL(mean || prior) + z_weight * mean(lse^2) + weight * CE(lane).

    A batch is a few windows, often of one lane. Balancing a single batch would teach the gate to
    ignore the lanes (Qiu et al., arXiv 2501.11873). The mean therefore runs over many steps; only
    the current step contributes a gradient. `count_X` counts the choices since it was last reset.
    """

    prior_X: Tensor
    belongs_LX: Tensor
    mean_X: Tensor
    count_X: Tensor

    def __init__(
        self, prior_X: Tensor, belongs_LX: Tensor, balance: float, z_weight: float
    ) -> None:
        super().__init__()
        self.balance, self.z_weight = balance, z_weight
        self.register_buffer("prior_X", prior_X.float())
        self.register_buffer("belongs_LX", belongs_LX)
        self.register_buffer("mean_X", prior_X.float().clone())
        self.register_buffer("count_X", torch.zeros(len(prior_X), dtype=torch.int64))

    def forward(self, logit_PX: Tensor, lane_P: Tensor, lane_weight: float) -> Tensor:
        """Return the scalar loss of the logits; `lane_weight` weighs the lane loss of this step."""
        share_X = logit_PX.softmax(dim=-1).mean(dim=0)
        with torch.no_grad():
            if torch.isfinite(share_X).all():  # the loop skips a step whose loss is not finite
                self.mean_X.lerp_(share_X, 1 - MEAN_DECAY)
                self.count_X += (top_gates(logit_PX) > 0).sum(dim=0)
        mean_X = self.mean_X + (share_X - share_X.detach())
        loss = self.balance * balance_loss(mean_X, self.prior_X)
        loss = loss + self.z_weight * z_loss(logit_PX)
        if lane_weight and len(self.belongs_LX):
            loss = loss + lane_weight * lane_loss(logit_PX, lane_P, self.belongs_LX)
        return loss

    def take_counts(self) -> Tensor:
        """Return `count_X` and reset it to zero."""
        count_X = self.count_X.clone()
        self.count_X.zero_()
        return count_X


def balance_loss(mean_X: Tensor, prior_X: Tensor) -> Tensor:
    """Return KL(mean || prior) of the gate's mean probabilities; 0 if they equal the prior.

    The balance loss of Fedus et al. (arXiv 2101.03961, section 2.2) has its minimum at equal
    shares, which does not fit lanes of unequal size.
    """
    mean_X = mean_X.clamp_min(torch.finfo(mean_X.dtype).tiny)
    return (mean_X * (mean_X / prior_X).log()).sum()


def z_loss(logit_PX: Tensor) -> Tensor:
    """Return mean(logsumexp^2), which keeps logits small (Zoph et al., arXiv 2202.08906, eq. 5)."""
    return logit_PX.logsumexp(dim=-1).square().mean()


def lane_loss(logit_PX: Tensor, lane_P: Tensor, belongs_LX: Tensor) -> Tensor:
    """Return the mean -log probability of the experts of the target's lane.

    Probabilities are the softmax over all experts. Positions without a lane are omitted; the loss
    is 0 if no position has a lane.
    """
    known_P = lane_P != UNASSIGNED
    logit_PX, own_PX = logit_PX[known_P], belongs_LX[lane_P[known_P]]
    own_P = logit_PX.masked_fill(~own_PX, -torch.inf).logsumexp(dim=-1)
    return (logit_PX.logsumexp(dim=-1) - own_P).sum() / max(1, len(own_P))


def train_lanes(bank: Bank, windows: Windows) -> IntArray:
    """Return the lane (N,) of each train row; UNASSIGNED for other rows and rows without a lane."""
    lane_N = np.full(bank.num_rows, UNASSIGNED, dtype=np.int64)
    train_row = windows.train_rows()
    if bank.lane_N is not None:
        lane_N[train_row] = bank.lane_N[train_row]
    return lane_N


def permuted_lanes(lane_N: IntArray, document_N: NDArray[np.integer], seed: int) -> IntArray:
    """Return the lanes permuted among documents: each lane keeps its number of documents.

    A document of several lanes counts as one document per run of rows of one lane.
    """
    breaks_N = np.ones(len(lane_N), dtype=bool)
    breaks_N[1:] = (lane_N[1:] != lane_N[:-1]) | (document_N[1:] != document_N[:-1])
    lane_R = lane_N[breaks_N]
    told = np.flatnonzero(lane_R != UNASSIGNED)
    lane_R[told] = generator(seed, "permuted lanes").permutation(lane_R[told])
    return lane_R[np.cumsum(breaks_N) - 1]


def lane_experts(num_lanes: int, num_experts: int) -> NDArray[np.bool_]:
    """Return which experts belong to which lane, (L, X).

    With at most as many lanes as experts, expert e belongs to lane e mod L; with more, lane l has
    expert l mod X. 16 lanes and 16 experts give one expert per lane.
    """
    period = min(num_lanes, num_experts)
    return np.arange(num_lanes)[:, None] % period == np.arange(num_experts)[None, :] % period


def expert_prior(lane_N: IntArray, num_lanes: int, num_experts: int) -> NDArray[np.float64]:
    """Return the share (X,) of positions that each expert should get.

    A lane's share is its share of the rows, after adding one row to each lane so that none is zero;
    it is divided equally among the experts of the lane. Without lanes every share is 1 / X.
    """
    if num_lanes == 0:
        return np.full(num_experts, 1 / num_experts)
    count_L = np.bincount(lane_N[lane_N != UNASSIGNED], minlength=num_lanes) + 1.0
    belongs_LX = lane_experts(num_lanes, num_experts)
    each_L = count_L / count_L.sum() / belongs_LX.sum(axis=1)
    prior_X: NDArray[np.float64] = each_L @ belongs_LX
    return prior_X


def load_figures(count_X: NDArray[np.integer]) -> dict[str, float]:
    """Return statistics of the load; the load of an expert is its share of all choices.

    `expert_load_max` is the largest load, `expert_load_entropy` the entropy over log X (1: equal
    loads), `dead_experts` the number of experts with a load below 0.5 / X.
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
    """Return the summed weight (L, X) that the queries of each lane give to each expert."""
    table_LX = np.zeros((num_lanes, gate_QX.shape[1]))
    known_Q = lane_Q != UNASSIGNED
    np.add.at(table_LX, lane_Q[known_Q], gate_QX[known_Q])
    return table_LX


def mutual_information(table_LX: NDArray[np.floating]) -> float:
    """Return the mutual information of lane and expert in nats, at most the lanes' entropy."""
    joint_LX = table_LX / max(table_LX.sum(), np.finfo(float).tiny)
    apart_LX = joint_LX.sum(axis=1, keepdims=True) * joint_LX.sum(axis=0, keepdims=True)
    some = joint_LX > 0
    return float((joint_LX[some] * np.log(joint_LX[some] / apart_LX[some])).sum())


class LaneSupervision:
    """The lanes of every target, with a weight that falls linearly to 0 over all steps.

    Without lanes the gate is trained by its balance loss alone, towards equal shares.

    Raises:
        ValueError: lanes are to be permuted in a bank without lanes.
    """

    def __init__(
        self, bank: Bank, windows: Windows, batches: Batches, config: Settings, total_steps: int
    ) -> None:
        self._batches, self._config, self._total_steps = batches, config, total_steps
        self._num_lanes = len(bank.lanes)
        self._lane_N = train_lanes(bank, windows)
        if config.experts_control == "permuted":
            if self._num_lanes < 2:
                raise ValueError(f"experts_control: bank {bank.path} has no two lanes to permute")
            self._lane_N = permuted_lanes(self._lane_N, bank.document_N, config.seed)

    def loss(self) -> GateLoss:
        """Return the loss of the gate, balanced to the lane shares of the train rows."""
        num_experts, config = self._config.experts, self._config
        prior_X = expert_prior(self._lane_N, self._num_lanes, num_experts)
        belongs_LX = np.zeros((0, num_experts), dtype=bool)
        if self._num_lanes:
            belongs_LX = lane_experts(self._num_lanes, num_experts)
        prior, belongs = torch.from_numpy(prior_X), torch.from_numpy(belongs_LX)
        return GateLoss(prior, belongs, config.gate_balance, config.gate_z)

    def of_batch(self, batch: Batch, step: int) -> LaneLabels:
        """Return the lane labels of a batch and their weight at optimizer step `step`."""
        lane_BT = np.full(batch.real_BT.shape, UNASSIGNED, dtype=np.int64)
        for place, window in enumerate(batch.window_B):
            start, num_rows = self._batches.extent(window)
            lane_BT[place, :num_rows] = self._lane_N[start + 1 : start + num_rows + 1]
        weight = self._config.gate_lanes * (1 - step / self._total_steps)
        return LaneLabels(torch.from_numpy(lane_BT), weight)
