"""Residual MLP over the last few vectors: the rival without a long context.

Shapes: B batch, T time, D vector dim, L last vectors, H hidden.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from lvm.models.layers import Dropout, RMSNorm
from lvm.models.skip import Residual


@dataclass(frozen=True, kw_only=True)
class ResMLPConfig:
    """Sizes of a `ResMLP`; `last` is the number of vectors that it uses."""

    dim: int
    hidden: int = 512
    layers: int = 4
    last: int = 8
    decay: float = 0.5
    dropout: float = 0.2

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "layers", "last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is less than 1")


class ResMLP(Residual):
    """Residual predictor whose state is an MLP of the last `last` vectors (default 8).

    After Ippolito et al., ACL 2020 (arXiv 2005.05255), section 3: residual feed-forward blocks.
    """

    def __init__(self, **config: object) -> None:
        sizes = ResMLPConfig(**config)  # type: ignore[arg-type]
        super().__init__(sizes.dim, sizes.hidden, sizes.decay, sizes.dropout)
        self.config = {"model": "res_mlp", **asdict(sizes)}
        self.dim, self.last = sizes.dim, sizes.last
        self.project_in = nn.Linear(sizes.last * sizes.dim, sizes.hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                RMSNorm(sizes.hidden),
                nn.Linear(sizes.hidden, 2 * sizes.hidden),
                nn.GELU(),
                nn.Linear(2 * sizes.hidden, sizes.hidden),
                Dropout(sizes.dropout),
            )
            for _ in range(sizes.layers)
        )

    def encode(self, context_BTD: Tensor, recent_BTE: Tensor) -> Tensor:
        vector_BTD = recent_BTE[..., : self.dim]
        padded_BTD = pad(vector_BTD, (0, 0, self.last - 1, 0))
        num_steps = vector_BTD.shape[1]
        last_BTX = torch.cat([padded_BTD[:, k : k + num_steps] for k in range(self.last)], dim=-1)
        return self._state(last_BTX)

    def begin_encoder(self, context_TD: Tensor, recent_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last hidden state (H,) and the last vectors (L, D), padded with zeros."""
        vector_LD = recent_TE[-self.last :, : self.dim]
        last_LD = pad(vector_LD, (0, 0, self.last - len(vector_LD), 0))
        return self._state(last_LD.flatten()), last_LD

    def step_encoder(self, vector_D: Tensor, recent_E: Tensor, cache: Tensor) -> Tensor:
        cache.copy_(torch.cat([cache[1:], recent_E[None, : self.dim]]))
        return self._state(cache.flatten())

    def _state(self, last_BTX: Tensor) -> Tensor:
        state_BTH = gelu(self.project_in(last_BTX))
        for block in self.blocks:
            state_BTH = state_BTH + block(state_BTH)
        return state_BTH
