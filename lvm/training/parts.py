"""What each part of a model does while it trains: its share of predictions, gradients, updates."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lvm.models.skip import Skip, without

IDLE_SHARE = 0.001  # of the prediction: 1 - cosine without the part


@torch.no_grad()
def part_shares(model: nn.Module, context_BTD: Tensor) -> dict[str, float]:
    """Return 1 - cosine between the predictions with and without each part, mean over (B, T)."""
    if not isinstance(model, Skip):
        return {}
    was_training = model.training
    model.eval()
    full_BTD = model(context_BTD)
    shares = {
        part: 1 - float((full_BTD * without(model, part)(context_BTD)).sum(dim=-1).mean())
        for part in model.ablations
    }
    model.train(was_training)
    return shares


class PartNorms:
    """Lengths by part of the gradient of a step and of the update that it makes.

    Make it before the step; ask for `figures` after it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts = model.parts() if isinstance(model, Skip) else {}
        self._before = {
            name: [p.detach().clone() for p in part] for name, part in self._parts.items()
        }
        self._gradient = {name: _length([p.grad for p in p_]) for name, p_ in self._parts.items()}

    def figures(self) -> dict[str, float]:
        """Return gradient_<part> and update_<part>, the latter as a share of the weights."""
        found = {f"gradient_{name}": length for name, length in self._gradient.items()}
        for name, part in self._parts.items():
            change = [p.detach() - old for p, old in zip(part, self._before[name], strict=True)]
            found[f"update_{name}"] = _length(change) / max(1e-12, _length(part))
        return found


def _length(tensors: Iterable[Tensor | None]) -> float:
    return sum(float(t.detach().double().square().sum()) for t in tensors if t is not None) ** 0.5
