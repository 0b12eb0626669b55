"""Training losses, apart from the models they train.

Shapes: P supervised positions, D vector dim, K negatives.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize

TWIN_COSINE = 0.995
# On val of the quick docstring bank a linear map reached Hit@5 14.5 % with tau fixed at 0.08, and
# 14.1 % with tau left to fall to 0.053: the likelihood likes sharper scores than the ranks do.
TEMPERATURE_RANGE = (0.07, 0.2)


class SampledSoftmax(nn.Module):
    """Softmax of the target against K shared bank negatives, with a learnable temperature.

    loss = -log(e^{s(p, y)/tau} / (e^{s(p, y)/tau} + sum_j e^{s(p, n_j)/tau})) + w (1 - s(p, y)),
    s the cosine, w `cosine_weight`, averaged over positions. Negatives drawn uniformly over
    duplicate groups need no logQ correction: it would be one constant. A negative that is a twin
    of the position's own target (cosine >= 0.995) is masked.
    """

    def __init__(self, temperature: float = 0.08, cosine_weight: float = 0.1) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.cosine_weight = cosine_weight

    def temperature(self) -> Tensor:
        """Return tau, a positive scalar."""
        return self.log_temperature.exp()

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """Put tau back into `TEMPERATURE_RANGE`, after an optimiser step."""
        low, high = (math.log(bound) for bound in TEMPERATURE_RANGE)
        self.log_temperature.clamp_(low, high)

    def forward(self, prediction_PD: Tensor, target_PD: Tensor, negative_KD: Tensor) -> Tensor:
        """Return the scalar loss of unit predictions against unit targets and unit negatives."""
        true_score_P = (prediction_PD * target_PD).sum(dim=-1)
        score_PK = prediction_PD @ negative_KD.T
        with torch.no_grad():
            twin_PK = target_PD @ negative_KD.T >= TWIN_COSINE
        temperature = self.temperature()
        logit_PK = (score_PK / temperature).masked_fill(twin_PK, -torch.inf)
        logit_PL = torch.cat([true_score_P[:, None] / temperature, logit_PK], dim=1)
        log_share_P = logit_PL[:, 0].float() - logit_PL.float().logsumexp(dim=1)
        return (self.cosine_weight * (1 - true_score_P) - log_share_P).mean()


def seed_loss(
    prediction_BD: Tensor, target_BD: Tensor, alpha: float, temperature: float = 0.07
) -> Tensor:
    """Return the old recipe's loss: MSE + 0.5 (1 - cos) + alpha InfoNCE inside the batch.

    Predictions and targets are unit vectors, (B, D); InfoNCE has B - 1 negatives. MSE of unit
    vectors is 2 (1 - cos) / D, so it adds nothing that the cosine term lacks.
    """
    cosine_B = (prediction_BD * target_BD).sum(dim=-1)
    logit_BB = normalize(prediction_BD, dim=-1) @ target_BD.T / temperature
    own_B = torch.arange(len(logit_BB), device=logit_BB.device)
    contrast = cross_entropy(logit_BB, own_B)
    return mse_loss(prediction_BD, target_BD) + 0.5 * (1 - cosine_B).mean() + alpha * contrast
