"""Guard of a training: skip bad steps, roll back to the last good weights after spikes."""

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
# WINDOW and SIGMAS as in OLMo-core's SkipStepOptimizer, which judges a single step by mean and
# deviation; PaLM (arXiv 2204.02311, section 5.1) goes back about 100 steps.
WINDOW = 128
SIGMAS = 6.0
SPAN = 4
SNAPSHOT_STEPS = 64
MAX_IN_A_ROW = 3
MAX_ROLLBACKS = 10
NORMAL_MAD = 1.4826  # standard deviation / median absolute deviation of a normal distribution


def loss_bar(recent: list[float]) -> float:
    """Return the bar above which a loss is far above `recent`; infinite before half a window.

    It is the larger of the maximum of `recent` and its median + 6 robust deviations. If losses were
    in random order, 4 of them above all of 128 earlier ones would occur once in 12 million steps.
    """
    if len(recent) < WINDOW // 2:
        return float("inf")
    middle = median(recent)
    deviation = NORMAL_MAD * median(abs(loss - middle) for loss in recent)
    return max(max(recent), middle + SIGMAS * deviation)


def sees_spike(progress: Progress, loss: float) -> bool:
    """Record the finite loss of a step; tell whether it is the fourth in a row above the bar.

    Fewer than four high losses in a row are not a spike and join the recent losses. If the loss is
    as high after three rollbacks in a row, its level has changed, and the new level is accepted.
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
    """Reset the recent losses, because the loss has changed its scale."""
    progress.recent, progress.above, progress.rollbacks_in_a_row = [], [], 0


def num_rollbacks(progress: Progress) -> int:
    """Return the number of rollbacks of a training."""
    closed = sum(int(record.get("train/rollbacks", 0)) for record in progress.history)
    return closed + progress.rollbacks


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether every value is finite and the norm of all values does not overflow."""
    floats = [value for value in tensors if value.is_floating_point()]
    return bool(torch.isfinite(nn.utils.get_total_norm(floats)))


@dataclass
class Guard:
    """Takes the optimizer's steps; rolls back to the last good weights if a step breaks them.

    `tensors` is the copy to return to, on the CPU: weights, their average, the temperature and the
    optimizer state, copied every 64 steps before a step whose loss is within its range. Later
    learning is lost and its batches are not read again. All ranks of `world` decide alike.
    """

    model: nn.Module
    objective: SampledSoftmax
    averaged: WeightAverage
    optimizer: torch.optim.Optimizer
    world: World
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def step(self, progress: Progress, loss: float) -> bool:
        """Apply the gradients of `loss`, the same on all ranks; return whether all was finite.

        The step is skipped if loss or gradient are not finite. The last good weights are restored
        if the loss has spiked, or if the step makes a weight infinite or NaN.

        Raises:
            ValueError: there are no good weights, because the first ones were not finite.
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
        """Renew the copy if it is old; return False if the new copy would not be finite."""
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
        """Restore the copy from a state file."""
        self.tensors = dict(tensors)

    def _parts(self) -> Parts:
        return {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer),
        }

    def _copied(self, key: str, value: Tensor) -> Tensor:
        """Return a copy on the CPU, in the memory of the previous copy."""
        old = self.tensors.get(key)
        return value.detach().to("cpu", copy=True) if old is None else old.copy_(value)

    def _agreed(self, own: bool) -> bool:
        return own if self.world.size == 1 else all(self.world.gathered(own))
