"""Training losses.

Shapes: P supervised positions, D vector dim, K shared negatives, C positions with negatives of
their own, H own negatives of a position, B windows of this process, G windows of the whole batch.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, mse_loss, normalize

TWIN_COSINE = 0.995
# Of a cosine in bf16, where eight bits count: up to 2^-8 by the rounding of each vector, then 2^-9
# by its own, 0.0098 together. The rest is for the order of the sum, the rounding of the bound.
BF16_ERROR = 0.015
LOSS_BLOCK = 512  # positions whose logits are held at a time
# The likelihood likes sharper scores than the ranks do: left alone tau falls too far.
TEMPERATURE_RANGE = (0.03, 0.2)
FIRST_WARMTH = 3.0  # with 1.0 an echo over 900 rows is not learned in 300 steps, with 3.0 in 150


@dataclass(frozen=True)
class OwnNegatives:
    """Unit negatives (C, H, D) of the positions `place_C`; `real_CH` masks the padding."""

    place_C: Tensor
    vector_CHD: Tensor
    real_CH: Tensor

    def to(self, device: torch.device) -> "OwnNegatives":
        """Return the negatives on `device`."""
        parts = (self.place_C, self.vector_CHD, self.real_CH)
        return OwnNegatives(*(part.to(device) for part in parts))


class SampledSoftmax(nn.Module):
    """Softmax of the target against K shared bank negatives, with a learnable temperature.

    share = e^{s(p, y)/tau} / (e^{s(p, y)/tau} + sum_j e^{s(p, n_j)/tau}), s the cosine; loss = (1 -
    share^q) / q + w (1 - s(p, y)), w `cosine_weight`, q `focus`: generalised cross entropy (Zhang,
    Sabuncu, arXiv 1805.07836, section 3.2), -log(share) at q = 0. With q > 0 the loss of a target
    out of reach is bounded, so that targets near the first ranks count more. Negatives are drawn
    uniformly over duplicate groups and need no logQ correction, which would be a constant. A
    negative that is a twin of the position's target (cosine >= 0.995) is masked. A position's own
    negatives join its sum. With `bf16_gradient` the gradient of the sum, which is the mean
    negative, is computed in bf16; the loss itself is not.
    """

    def __init__(
        self,
        temperature: float = 0.035,
        cosine_weight: float = 0.1,
        focus: float = 0.0,
        bf16_gradient: bool = False,
    ) -> None:
        super().__init__()
        self.bf16_gradient = bf16_gradient
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.cosine_weight, self.focus, self.warmth = cosine_weight, focus, 1.0

    def temperature(self) -> Tensor:
        """Return tau, a positive scalar: what is learned, times `warmth`."""
        return self.warmth * self.log_temperature.exp()

    def anneal(self, focus: float, progress: float) -> None:
        """Set q and tau for a training of which the share `progress` is over.

        Until half of it q rises from 0 to `focus`, and tau falls to what is learned from three
        times that: cross entropy with a mild temperature has a gradient while all answers are far
        off; the bounded loss with a sharp one has nearly none.
        """
        share = min(1.0, 2 * progress)
        self.focus, self.warmth = focus * share, FIRST_WARMTH ** (1 - share)

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """Clamp tau to `TEMPERATURE_RANGE`; called after each optimizer step."""
        low, high = (math.log(bound) for bound in TEMPERATURE_RANGE)
        self.log_temperature.clamp_(low, high)

    def forward(
        self,
        prediction_PD: Tensor,
        target_PD: Tensor,
        negative_KD: Tensor,
        own: OwnNegatives | None = None,
    ) -> Tensor:
        """Return the loss (P,) of unit predictions against unit targets and unit negatives."""
        true_score_P = (prediction_PD * target_PD).sum(dim=-1)
        temperature = self.temperature()
        own_PL = true_logit_P1 = (true_score_P / temperature)[:, None]
        if own is not None:
            logit_PH = _own_logits(prediction_PD, target_PD, own, temperature)
            own_PL = torch.cat([true_logit_P1, logit_PH], dim=1)
        scaled_PD = prediction_PD / temperature
        shared_P = log_sum(scaled_PD, target_PD, negative_KD, self.bf16_gradient)
        log_share_P = true_logit_P1[:, 0] - torch.logaddexp(own_PL.logsumexp(dim=1), shared_P)
        missed_P = -log_share_P
        if self.focus:
            missed_P = -torch.expm1(self.focus * log_share_P) / self.focus
        return missed_P + self.cosine_weight * (1 - true_score_P)


def log_sum(scaled_PD: Tensor, target_PD: Tensor, negative_KD: Tensor, half: bool) -> Tensor:
    """Return log sum_k exp(scaled . negative_k) without twins of the targets, (P,).

    Its gradient is the mean of the negatives under their softmax, (P, D): it is taken on the way,
    so that no more than `LOSS_BLOCK` x K logits are ever held. Targets, negatives get no gradient.
    """
    found: Tensor = _LogSum.apply(scaled_PD, target_PD, negative_KD, half)
    return found


class _LogSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scaled_PD: Tensor, target_PD: Tensor, negative_KD: Tensor, half: bool
    ) -> Tensor:
        lowest = torch.finfo(scaled_PD.dtype).min
        log_sum_P = scaled_PD.new_full((len(scaled_PD),), lowest)
        mean_PD = torch.zeros_like(scaled_PD)
        rough_KD = negative_KD.bfloat16() if half else negative_KD
        for begin in range(0, len(scaled_PD) if len(negative_KD) else 0, LOSS_BLOCK):
            part = slice(begin, begin + LOSS_BLOCK)
            logit_PK = scaled_PD[part] @ negative_KD.T
            logit_PK[_twins(target_PD[part], negative_KD, rough_KD)] = lowest
            top_P1 = logit_PK.amax(dim=1, keepdim=True)
            weight_PK = logit_PK.sub_(top_P1).exp_()
            total_P1 = weight_PK.sum(dim=1, keepdim=True)
            log_sum_P[part] = (top_P1 + total_P1.log())[:, 0]
            mean_PD[part] = (weight_PK.to(rough_KD.dtype) @ rough_KD) / total_P1
        ctx.save_for_backward(mean_PD)
        return log_sum_P

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor, None, None, None]:
        (mean_PD,) = ctx.saved_tensors
        return grad_P[:, None] * mean_PD, None, None, None


def _twins(target_PD: Tensor, negative_KD: Tensor, rough_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions beside the negatives that are twins of their targets.

    Where the negatives are also given in bf16, these tell which pairs are worth a look.
    """
    is_rough = rough_KD.dtype != negative_KD.dtype
    bound = TWIN_COSINE - BF16_ERROR if is_rough else TWIN_COSINE
    near_PK = target_PD.to(rough_KD.dtype) @ rough_KD.T >= bound
    place, negative = near_PK.nonzero(as_tuple=True)
    if is_rough:
        is_twin = (target_PD[place] * negative_KD[negative]).sum(dim=-1) >= TWIN_COSINE
        place, negative = place[is_twin], negative[is_twin]
    return place, negative


def _own_logits(
    prediction_PD: Tensor, target_PD: Tensor, own: OwnNegatives, temperature: Tensor
) -> Tensor:
    """Return the logits (P, H) of the own negatives, -inf where there is none."""
    score_CH = torch.einsum("cd,chd->ch", prediction_PD[own.place_C], own.vector_CHD)
    with torch.no_grad():
        twin_CH = torch.einsum("cd,chd->ch", target_PD[own.place_C], own.vector_CHD) >= TWIN_COSINE
    # Masked after the division, whose gradient at -inf would be no number.
    logit_CH = (score_CH / temperature).masked_fill(twin_CH | ~own.real_CH, -torch.inf)
    absent_PH = logit_CH.new_full((len(prediction_PD), logit_CH.shape[1]), -torch.inf)
    return absent_PH.index_copy(0, own.place_C, logit_CH)


def seed_loss(
    prediction_BD: Tensor, target_GD: Tensor, own_B: Tensor, alpha: float, temperature: float = 0.07
) -> Tensor:
    """Return the old recipe's loss: MSE + 0.5 (1 - cos) + alpha InfoNCE inside the batch.

    Predictions and targets are unit vectors. The target of prediction b is row `own_B[b]` of the
    whole batch's targets; the other G - 1 rows are its InfoNCE negatives. MSE of unit vectors is 2
    (1 - cos) / D, so it adds nothing to the cosine term.
    """
    target_BD = target_GD[own_B]
    cosine_B = (prediction_BD * target_BD).sum(dim=-1)
    logit_BG = normalize(prediction_BD, dim=-1) @ target_GD.T / temperature
    contrast = cross_entropy(logit_BG, own_B)
    return mse_loss(prediction_BD, target_BD) + 0.5 * (1 - cosine_B).mean() + alpha * contrast
