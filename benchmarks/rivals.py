"""Sequence models of the literature over frozen vectors, each trained by its own recipe.

They have no moving average and no skip. `lcm` regresses standardised vectors, as the base LCM does
(Large Concept Models, arXiv 2412.08821, section 2.3.1). `sasrec` and `gru4rec` are trained by
softmax cross entropy and Adam, as RecBole trains them, here against sampled rows instead of all.
`gsasrec` is trained by gBCE (arXiv 2308.07192, section 4). The items of those recommenders are
learned; here they are the bank's vectors, behind a linear map in and one out. Attention layers are
`lvm.models.transformer`'s: rotary, SwiGLU, RMSNorm, at most 399 rows back.
Shapes: B batch, T time, D vector dim, H hidden, P positions, K negatives.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, dropout, softplus

from lvm.bank.bank import Bank
from lvm.models.layers import RMSNorm, unit
from lvm.models.transformer import TransformerLayer
from lvm.training.data import Batch, Batches
from lvm.training.loss import log_sum
from lvm.windows.planning import Windows

CHUNK = 200  # rows of a block; SASRec reads 200 rows at most, too
POSITIONS = 2000  # of a batch
SAMPLED, SAMPLED_BINARY = 4096, 256  # negatives of a step
CALIBRATION = 0.75  # t of gBCE
MEASURED_ROWS = 20_000  # from which the mean and the scale of a feature are taken
LEAST_SCALE = 1e-3  # MiniLM has features that are always 0; the others vary by about 0.05
WARM_UP = 0.1  # of all steps, where the rate has a schedule


@dataclass(frozen=True)
class Recipe:
    """Sizes, loss and optimizer of a rival; `standardised` models see and predict z-scores."""

    loss: str
    layers: int
    lr: float
    recurrent: bool = False
    standardised: bool = False
    weight_decay: float = 0.0
    scheduled: bool = False
    dropout: float = 0.2
    hidden: int = 256
    epochs: int = 100
    patience: int = 5


RECIPES = {
    "sasrec": Recipe("softmax", layers=2, lr=1e-3),
    "gsasrec": Recipe("gbce", layers=2, lr=1e-3),
    "gru4rec": Recipe("softmax", layers=1, lr=1e-3, recurrent=True, dropout=0.3),
    "lcm": Recipe(
        "mse", layers=4, lr=3e-4, standardised=True, weight_decay=0.1, scheduled=True, dropout=0.1
    ),
}


class Rival(nn.Module):
    """A causal encoder between a linear map in and one out."""

    def __init__(self, name: str, dim: int) -> None:
        super().__init__()
        self.recipe = recipe = RECIPES[name]
        self.config = {"model": name, "dim": dim, **asdict(recipe)}
        hidden = recipe.hidden
        self.register_buffer("mean_D", torch.zeros(dim))
        self.register_buffer("scale_D", torch.ones(dim))
        self.project_in = nn.Linear(dim, hidden)
        layers = 0 if recipe.recurrent else recipe.layers
        self.layers = nn.ModuleList(TransformerLayer(hidden, recipe.dropout) for _ in range(layers))
        self.gru = None
        if recipe.recurrent:
            self.gru = nn.GRU(hidden, hidden, recipe.layers, batch_first=True)
        self.norm = RMSNorm(hidden)
        self.project_out = nn.Linear(hidden, dim)

    def measure(self, unit_ND: Tensor) -> None:
        """Take the mean and the scale of each feature from train rows."""
        self.mean_D.copy_(unit_ND.mean(dim=0))
        self.scale_D.copy_(unit_ND.std(dim=0).clamp(min=LEAST_SCALE))

    def standard(self, vector_BTD: Tensor) -> Tensor:
        """Return z-scores; vectors unchanged if the recipe does not standardise."""
        return (vector_BTD - self.mean_D) / self.scale_D

    def raw(self, context_BTD: Tensor) -> Tensor:
        """Return what the loss sees, (B, T, D)."""
        rate = self.recipe.dropout
        state_BTH = dropout(self.project_in(self.standard(context_BTD)), rate, self.training)
        if self.gru is not None:
            state_BTH = self.gru(state_BTH)[0]
        else:
            num_steps = state_BTH.shape[1]
            chunk = min(CHUNK, num_steps)
            state_BTH = nn.functional.pad(state_BTH, (0, 0, 0, -num_steps % chunk))
            for layer in self.layers:
                state_BTH = layer(state_BTH, chunk)
            state_BTH = state_BTH[:, :num_steps]
        raw_BTD: Tensor = self.project_out(self.norm(state_BTH))
        return raw_BTD

    def forward(self, context_BTD: Tensor) -> Tensor:
        """Return unit predictions (B, T, D)."""
        return unit(self.raw(context_BTD) * self.scale_D + self.mean_D)

    def loss(self, batch: Batch, negative_KD: Tensor, num_rows: int) -> Tensor:
        """Return the mean loss over the positions of a batch; the bank has `num_rows` items."""
        raw_PD = self.raw(batch.context_BTD)[batch.real_BT]
        target_PD = batch.target_BTD[batch.real_BT]
        if self.recipe.loss == "mse":
            return (raw_PD - self.standard(target_PD)).square().mean()
        true_logit_P = (raw_PD * target_PD).sum(dim=-1)
        if self.recipe.loss == "softmax":
            other_P = log_sum(raw_PD, target_PD, negative_KD, False)
            return (torch.logaddexp(true_logit_P, other_P) - true_logit_P).mean()
        return gbce(true_logit_P, raw_PD @ negative_KD.T, num_rows)


def gbce(true_logit_P: Tensor, logit_PK: Tensor, num_rows: int) -> Tensor:
    """Return generalised binary cross entropy: -beta log s(true) - sum_k log(1 - s(negative_k)).

    beta = a (t (1 - 1 / a) + 1 / a), a = K / (N - 1) the sampling rate of negatives.
    """
    rate = logit_PK.shape[1] / (num_rows - 1)
    beta = rate * (CALIBRATION * (1 - 1 / rate) + 1 / rate)
    positive_P = binary_cross_entropy_with_logits(
        true_logit_P, torch.ones_like(true_logit_P), reduction="none"
    )
    return (beta * positive_P + softplus(logit_PK).sum(dim=1)).mean()


def train_rival(
    name: str,
    bank: Bank,
    windows: Windows,
    seed: int,
    validate: Callable[[nn.Module], float],
    most_epochs: int | None = None,
) -> tuple[Rival, list[float]]:
    """Train a rival; return the epoch with the best val figure, and the figures of all epochs.

    Training ends after the recipe's epochs, after `most_epochs` if those are fewer, or where
    `patience` epochs were no better.
    """
    torch.manual_seed(seed)
    batches = Batches(bank, windows, max(1, POSITIONS // windows.ctx), seed)
    model = Rival(name, bank.dim)
    recipe = model.recipe
    rows = batches.negative_row
    if recipe.standardised:
        model.measure(torch.from_numpy(bank.unit(rows[:: max(1, len(rows) // MEASURED_ROWS)])))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    epochs = range(1, 1 + min(recipe.epochs, most_epochs or recipe.epochs))
    total = sum(batches.num_batches(epoch) for epoch in epochs)
    num_negatives = {"mse": 0, "softmax": SAMPLED, "gbce": SAMPLED_BINARY}[recipe.loss]
    history: list[float] = []
    best, step = {}, 0
    for epoch in epochs:
        model.train()
        for batch in batches.epoch(epoch):
            if recipe.scheduled:
                optimizer.param_groups[0]["lr"] = recipe.lr * lr_factor(step / total)
            negative_KD = batches.negatives(step, num_negatives)
            optimizer.zero_grad(set_to_none=True)
            model.loss(batch, negative_KD, len(rows)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
        history.append(validate(model.eval()))
        if history[-1] == max(history):
            best = {key: value.clone() for key, value in model.state_dict().items()}
        elif len(history) - 1 - history.index(max(history)) >= recipe.patience:
            break
    model.load_state_dict(best)
    return model.eval(), history


def lr_factor(progress: float) -> float:
    """Return the share of the peak rate: a linear warm-up, then a cosine."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
