"""What the choices of a gate cost in training.

Shapes: P positions, L lanes, X experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lvm.bank.store import UNASSIGNED
from lvm.models.tmd_experts import top_gates

MEAN_DECAY = 0.95


@dataclass(frozen=True)
class Told:
    """The lane of each position's target (B, T), UNASSIGNED where unknown, and its weight."""

    lane_BT: Tensor
    weight: float


class GateLoss(nn.Module):
    """balance * KL(mean || prior) + z_weight * mean(lse^2) + weight * CE(lane).

    A batch is a few windows, often of one lane: balanced by itself it would have the gate ignore
    the lanes (Qiu et al., arXiv 2501.11873). So the mean is one over many steps, as they were,
    with the gradient of this step. `count_X` counts the choices since it was last set to zero.
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
        """Return the scalar loss of the logits; `lane_weight` is that of the lanes at this step."""
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
        """Return `count_X` as it is, then set it to zero."""
        count_X = self.count_X.clone()
        self.count_X.zero_()
        return count_X


def balance_loss(mean_X: Tensor, prior_X: Tensor) -> Tensor:
    """Return KL(mean || prior) of the gate's mean probabilities, 0 where they are the prior.

    The balance of Fedus et al. (arXiv 2101.03961, section 2.2) has its least value at equal
    shares, which lanes of unequal size contradict.
    """
    mean_X = mean_X.clamp_min(torch.finfo(mean_X.dtype).tiny)
    return (mean_X * (mean_X / prior_X).log()).sum()


def z_loss(logit_PX: Tensor) -> Tensor:
    """Return mean(logsumexp^2), which keeps logits small (Zoph et al., arXiv 2202.08906, eq. 5)."""
    return logit_PX.logsumexp(dim=-1).square().mean()


def lane_loss(logit_PX: Tensor, lane_P: Tensor, belongs_LX: Tensor) -> Tensor:
    """Return the mean -log probability that an expert of the target's lane is chosen.

    The probability is the full softmax over all experts. Positions without a lane are left out; 0
    where none has one.
    """
    known_P = lane_P != UNASSIGNED
    logit_PX, own_PX = logit_PX[known_P], belongs_LX[lane_P[known_P]]
    own_P = logit_PX.masked_fill(~own_PX, -torch.inf).logsumexp(dim=-1)
    return (logit_PX.logsumexp(dim=-1) - own_P).sum() / max(1, len(own_P))
