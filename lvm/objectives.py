"""Training losses, apart from the models they train.

Shapes: P supervised positions, D vector dim, K shared negatives, C positions with negatives of
their own, H own negatives of a position, B windows of this process, G windows of the whole batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize

TWIN_COSINE = 0.995
# The likelihood likes sharper scores than the ranks do: left alone tau falls too far.
TEMPERATURE_RANGE = (0.03, 0.2)


@dataclass(frozen=True)
class OwnNegatives:
    """Unit negatives (C, H, D) of the positions `place_C` alone; `real_CH` tells which exist."""

    place_C: Tensor
    vector_CHD: Tensor
    real_CH: Tensor

    def to(self, device: torch.device) -> "OwnNegatives":
        """Return them on `device`."""
        parts = (self.place_C, self.vector_CHD, self.real_CH)
        return OwnNegatives(*(part.to(device) for part in parts))

    def within(self, begin: int, end: int) -> "OwnNegatives":
        """Return those of the positions from `begin` up to `end`, counted from `begin`."""
        inside_C = (self.place_C >= begin) & (self.place_C < end)
        place_C = self.place_C[inside_C] - begin
        return OwnNegatives(place_C, self.vector_CHD[inside_C], self.real_CH[inside_C])


class SampledSoftmax(nn.Module):
    """Softmax of the target against K shared bank negatives, with a learnable temperature.

    share = e^{s(p, y)/tau} / (e^{s(p, y)/tau} + sum_j e^{s(p, n_j)/tau}), s the cosine;
    loss = (1 - share^q) / q + w (1 - s(p, y)), w `cosine_weight`, q `focus`: generalised cross
    entropy (Zhang, Sabuncu, arXiv 1805.07836, section 3.2), -log(share) at q = 0. The loss of a
    target that cannot be found is bounded, so that those within reach, the first ranks, count more.
    Negatives drawn uniformly over duplicate groups need no logQ correction: it would be one
    constant. A negative that is a twin of the position's own target (cosine >= 0.995) is masked.
    Own negatives of a position join its sum.
    """

    def __init__(
        self, temperature: float = 0.035, cosine_weight: float = 0.1, focus: float = 0.0
    ) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.cosine_weight, self.focus = cosine_weight, focus

    def temperature(self) -> Tensor:
        """Return tau, a positive scalar."""
        return self.log_temperature.exp()

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """Put tau back into `TEMPERATURE_RANGE`, after an optimiser step."""
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
        score_PK = prediction_PD @ negative_KD.T
        with torch.no_grad():
            twin_PK = target_PD @ negative_KD.T >= TWIN_COSINE
        temperature = self.temperature()
        logit_PK = (score_PK / temperature).masked_fill(twin_PK, -torch.inf)
        logits = [true_score_P[:, None] / temperature, logit_PK]
        if own is not None:
            logits.append(_own_logits(prediction_PD, target_PD, own, temperature))
        logit_PL = torch.cat(logits, dim=1)
        log_share_P = logit_PL[:, 0].float() - logit_PL.float().logsumexp(dim=1)
        missed_P = -log_share_P
        if self.focus:
            missed_P = -torch.expm1(self.focus * log_share_P) / self.focus
        return missed_P + self.cosine_weight * (1 - true_score_P)


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

    Predictions and targets are unit vectors; the target of prediction b is row `own_B[b]` of the
    whole batch's, the other G - 1 are its negatives in InfoNCE. MSE of unit vectors is
    2 (1 - cos) / D, so it adds nothing that the cosine term lacks.
    """
    target_BD = target_GD[own_B]
    cosine_B = (prediction_BD * target_BD).sum(dim=-1)
    logit_BG = normalize(prediction_BD, dim=-1) @ target_GD.T / temperature
    contrast = cross_entropy(logit_BG, own_B)
    return mse_loss(prediction_BD, target_BD) + 0.5 * (1 - cosine_B).mean() + alpha * contrast
