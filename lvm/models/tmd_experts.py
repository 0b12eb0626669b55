"""Recurrent predictor with expert heads; a gate chooses two of them at each position.

Shapes: B batch, T time, D vector dim, E = 2 D recent features, H hidden, F = H + E features of the
head, X experts, R rank of an expert.
"""

from dataclasses import asdict, dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from lvm.models.layers import Dropout, unit
from lvm.models.memory_gru import MemoryGRU, MemoryGRUConfig

ACTIVE = 2


@dataclass(frozen=True, kw_only=True)
class TMDExpertsConfig(MemoryGRUConfig):
    """Sizes of a `TMDExperts`: those of its trunk, a `MemoryGRU`, and those of its head."""

    experts: int = 16
    expert_rank: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("experts", "expert_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is less than 1")


class TMDExperts(MemoryGRU):
    """Predicts normalise(trunk_t + sum over two experts e of g_e(t) Up_e gelu(Down_e f_t)).

    The trunk is a `MemoryGRU` before its normalisation; f_t = [h_t; x_t; ema_t], each of unit
    length. Up starts at zero: with the weights of a trained trunk, step 0 equals that predictor. A
    single expert has no gate.
    """

    def __init__(self, *, experts: int = 16, expert_rank: int = 64, **trunk: object) -> None:
        super().__init__(**trunk)
        sizes = TMDExpertsConfig(experts=experts, expert_rank=expert_rank, **trunk)  # type: ignore[arg-type]
        self.config = {"model": "tmd_experts", **asdict(sizes)}
        num_features = sizes.hidden + 2 * sizes.dim
        self.head = ExpertHead(num_features, sizes.dim, experts, expert_rank, sizes.dropout)
        self.has_frozen_trunk = False

    def freeze_trunk(self) -> None:
        """Freeze all weights but the head's, and switch the trunk's dropout off."""
        self.has_frozen_trunk = True
        for child in self._trunk():
            child.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "TMDExperts":
        """Set training mode; a frozen trunk stays in evaluation mode."""
        super().train(mode)
        if self.has_frozen_trunk:
            for child in self._trunk():
                child.eval()
        return self

    def routed(self, context_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the predictions (B, T, D) and the gate's logits (B, T, X), None for one expert."""
        return self._route(*self._read(context_BTD))

    def _predict(self, adapted_BTD: Tensor, recent_BTE: Tensor, state_BTH: Tensor) -> Tensor:
        return self._route(adapted_BTD, recent_BTE, state_BTH)[0]

    def _route(
        self, adapted_BTD: Tensor, recent_BTE: Tensor, state_BTH: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        increment_BTD, logit_BTX = self.head(recent_BTE, state_BTH)
        sum_BTD = self._sum(adapted_BTD, recent_BTE, state_BTH)
        return unit((sum_BTD + increment_BTD).float()), logit_BTX

    def _trunk(self) -> list[nn.Module]:
        return [child for child in self.children() if child is not self.head]


class ExpertHead(nn.Module):
    """X maps of rank R with a gate; all are computed, and those not chosen get weight zero.

    At R = 64 two products over all experts are faster on a CPU than gathering the chosen ones. The
    gate is float32 throughout (Fedus et al., arXiv 2101.03961, section 2.4).
    """

    def __init__(self, features: int, dim: int, experts: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.experts, self.rank = experts, rank
        self.gate = nn.Linear(features, experts) if experts > 1 else None
        self.dropout = Dropout(dropout)
        self.down = nn.Linear(features, experts * rank, bias=False)
        self.up = nn.Linear(experts * rank, dim, bias=False)
        # The input has three parts of length 1: each input of gelu gets a variance of about 1.
        nn.init.normal_(self.down.weight, std=3**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, recent_BTE: Tensor, state_BTH: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the experts' increment (B, T, D) and the logits of the gate (B, T, X)."""
        state_BTH = unit(state_BTH)
        feature_BTF = torch.cat([state_BTH, recent_BTE.to(state_BTH.dtype)], dim=-1)
        hidden_BTXR = gelu(self.down(self.dropout(feature_BTF))).unflatten(-1, (-1, self.rank))
        logit_BTX = self._logits(feature_BTF)
        if logit_BTX is not None:
            hidden_BTXR = hidden_BTXR * top_gates(logit_BTX)[..., None].to(hidden_BTXR.dtype)
        # At most unit length like the trunk's inputs, so that one learning rate suits all.
        return self.up(hidden_BTXR.flatten(-2) / self.rank**0.5), logit_BTX

    def _logits(self, feature_BTF: Tensor) -> Tensor | None:
        if self.gate is None:
            return None
        with torch.autocast(feature_BTF.device.type, enabled=False):
            return linear(feature_BTF.float(), self.gate.weight, self.gate.bias)


def has_gate(model: nn.Module) -> TypeGuard[TMDExperts]:
    """Tell whether the predictor has a gate, and so `routed` logits."""
    return isinstance(model, TMDExperts) and model.head.gate is not None


def top_gates(logit_BTX: Tensor) -> Tensor:
    """Return the weights (B, T, X) of the experts: a softmax over the two largest logits, else 0.

    No position is dropped at any load (Jiang et al., Mixtral, arXiv 2401.04088, section 2.1).
    """
    top_BTA, expert_BTA = logit_BTX.topk(ACTIVE, dim=-1)
    return torch.zeros_like(logit_BTX).scatter(-1, expert_BTA, top_BTA.softmax(dim=-1))
