"""Return of a training to its last good weights where its loss spikes or its weights overflow."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

from lvm.models.weights import optimizer_tensors, restore_optimizer
from lvm.training.checkpoint import Parts, Progress
from lvm.training.distributed import World
from lvm.training.loss import SampledSoftmax
from lvm.training.optimizer import WeightAverage

CLIP_NORM = 1.0
# Window and sigmas are those of OLMo-core's SkipStepOptimizer, which judges one step by mean and
# deviation; PaLM (arXiv 2204.02311, section 5.1) goes back by about 100 steps.
WINDOW = 128
SIGMAS = 6.0
SPAN = 4
SNAPSHOT_STEPS = 64
MAX_IN_A_ROW = 3
MAX_ROLLBACKS = 10
NORMAL_MAD = 1.4826  # standard deviations of a normal distribution in its MAD


def loss_bar(recent: list[float]) -> float:
    """Return what a loss must exceed to be far above `recent`; infinite before half a window.

    It is the higher of the largest loss there with the median + 6 robust deviations. Where losses
    come in any order, 4 above all of 128 before them happen by chance once in 12 million steps.
    """
    if len(recent) < WINDOW // 2:
        return float("inf")
    middle = median(recent)
    deviation = NORMAL_MAD * median(abs(loss - middle) for loss in recent)
    return max(max(recent), middle + SIGMAS * deviation)


def sees_spike(progress: Progress, loss: float) -> bool:
    """Take in the finite loss of a step; tell whether it is the fourth in a row above the bar.

    A high loss is no spike where fewer follow it: it counts among the recent ones then. Where the
    loss is as high after three returns in a row, its level has changed, which becomes the new one.
    """
    if progress.recent and loss > max(progress.recent) and loss > loss_bar(progress.recent):
        progress.above.append(loss)
        if len(progress.above) < SPAN:
            return False
        progress.above = []
        if progress.rollbacks_in_a_row < MAX_IN_A_ROW:
            return True
        forget(progress)
    progress.recent = [*progress.recent, *progress.above, loss][-WINDOW:]
    progress.above, progress.rollbacks_in_a_row = [], 0
    return False


def forget(progress: Progress) -> None:
    """Start a new level, where the losses to come are of another kind."""
    progress.recent, progress.above, progress.rollbacks_in_a_row = [], [], 0


def num_rollbacks(progress: Progress) -> int:
    """Return how often a training went back to its last good weights."""
    closed = sum(int(record.get("train/rollbacks", 0)) for record in progress.history)
    return closed + progress.rollbacks


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether no value is NaN or infinite, nor so large that the length of all overflows."""
    floats = [value for value in tensors if value.is_floating_point()]
    return bool(torch.isfinite(nn.utils.get_total_norm(floats)))


@dataclass
class Guard:
    """Takes the optimiser's steps; returns to the last good weights where one breaks them.

    `tensors` is the copy on the CPU to return to: weights, their average, temperature, optimiser,
    as they were before a step whose loss was within its range, taken every 64 steps. What was
    learnt since is lost, its batches are not read again. All ranks of a `world` decide alike.
    """

    model: nn.Module
    objective: SampledSoftmax
    averaged: WeightAverage
    optimizer: torch.optim.Optimizer
    world: World
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def step(self, progress: Progress, loss: float) -> bool:
        """Use the gradients of `loss`, which all ranks share; return whether all was finite.

        The step is skipped where loss or gradient are not finite. The last good weights return
        where the loss has spiked, or where the step makes a weight infinite or NaN.

        Raises:
            ValueError: there are none to return to, as the first weights were not finite.
        """
        norm = nn.utils.clip_grad_norm_(self._parameters(), CLIP_NORM)
        is_finite = math.isfinite(loss) and bool(torch.isfinite(norm))
        has_spiked = is_finite and sees_spike(progress, loss)
        moves = is_finite and not has_spiked
        is_sound = not moves or self._copy_when_due(progress)
        if moves and is_sound:
            self.optimizer.step()
        is_sound = is_sound and self._agreed(all_finite(self._parameters()))
        if moves and is_sound:
            self.objective.keep_in_range()
            self.averaged.update(self.model, progress.step)
        elif has_spiked or not is_sound:
            self._put_back(progress)
        self.optimizer.zero_grad(set_to_none=True)
        return is_finite and is_sound

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _copy_when_due(self, progress: Progress) -> bool:
        """Take a new copy where the last is old; return False where it would not be finite."""
        if progress.above or progress.step < progress.snapshot_step + SNAPSHOT_STEPS:
            return True
        now = {
            f"{part}/{k}": v for part, values in self._parts().items() for k, v in values.items()
        }
        if not self._agreed(all_finite(now.values())):
            return False
        self.tensors = {key: self._copied(key, value) for key, value in now.items()}
        progress.snapshot_step = progress.step
        return True

    def _put_back(self, progress: Progress) -> None:
        if not self.tensors:
            raise ValueError("init: the weights that training starts from are not finite")
        progress.rollbacks += 1
        progress.rollbacks_in_a_row += 1
        progress.above = []
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in self._parts()}
        for key, value in self.tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = value.clone()
        self.model.load_state_dict(parts["model"])
        self.objective.load_state_dict(parts["objective"])
        self.averaged.load_state_dict(parts["averaged"])
        restore_optimizer(self.optimizer, parts["optimizer"])

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the copy that a state on disk holds."""
        self.tensors = dict(tensors)

    def _parts(self) -> Parts:
        return {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer),
        }

    def _copied(self, key: str, value: Tensor) -> Tensor:
        """Return a copy on the CPU, in the place of the copy before it."""
        old = self.tensors.get(key)
        return value.detach().to("cpu", copy=True) if old is None else old.copy_(value)

    def _agreed(self, own: bool) -> bool:
        return own if self.world.size == 1 else all(self.world.gathered(own))
