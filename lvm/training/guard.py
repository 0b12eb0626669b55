"""Watch a training: skip bad steps, roll back after spikes, measure its parts, warn the user."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

from lvm.models.skip import Skip, without
from lvm.models.weights import optimizer_tensors, restore_optimizer
from lvm.system.distributed import World
from lvm.training.checkpoint import Parts, Progress
from lvm.training.loss import SampledSoftmax
from lvm.training.optimizer import TrainingPlan, WeightAverage

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

IDLE_SHARE = 0.001  # a part is idle if 1 - cosine with and without it is below this

# The old system trained for 24 steps on 514 examples with 3 negatives each.
MIN_STEPS = 300
MIN_EXAMPLES = 5000
MIN_NEGATIVES = 63
NOTABLE_FALL = 0.005  # of Hit@5
VISIBLE_DIFFERENCE = 0.02  # difference of Hit@5 that validation should be able to detect


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


@torch.no_grad()
def part_shares(model: nn.Module, context_BTD: Tensor) -> dict[str, float]:
    """Return 1 - cosine between predictions with and without each part, mean over (B, T)."""
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
    """Norms of the gradient and of the update of each part in one optimizer step.

    Create it before the step; call `figures` after it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts = model.parts() if isinstance(model, Skip) else {}
        self._before = {
            name: [p.detach().clone() for p in part] for name, part in self._parts.items()
        }
        self._gradient = {name: _length([p.grad for p in p_]) for name, p_ in self._parts.items()}

    def figures(self) -> dict[str, float]:
        """Return gradient_<part> and update_<part>, the latter relative to the weights."""
        found = {f"gradient_{name}": length for name, length in self._gradient.items()}
        for name, part in self._parts.items():
            change = [p.detach() - old for p, old in zip(part, self._before[name], strict=True)]
            found[f"update_{name}"] = _length(change) / max(1e-12, _length(part))
        return found


def _length(tensors: Iterable[Tensor | None]) -> float:
    return sum(float(t.detach().double().square().sum()) for t in tensors if t is not None) ** 0.5


def planned_warnings(plan: TrainingPlan) -> list[str]:
    """Return the warnings about a plan, before the first step."""
    warnings = []
    if plan.steps < MIN_STEPS:
        warnings.append(
            f"only {plan.steps} optimizer steps are planned ({plan.steps_per_epoch} per epoch, "
            f"epochs: {plan.epochs}); fewer than {MIN_STEPS} are too few to judge a model by: give "
            f"epochs={math.ceil(MIN_STEPS / max(1, plan.steps_per_epoch))} and omit max_steps"
        )
    if plan.examples_per_epoch < MIN_EXAMPLES:
        is_dense = plan.own_negatives is None
        more = MIN_EXAMPLES / max(1, plan.examples_per_epoch)
        remedy = f"a bank with {more:.1f} times the rows" if is_dense else "recipe=dense"
        warnings.append(
            f"only {plan.examples_per_epoch:,} training examples per epoch; fewer than "
            f"{MIN_EXAMPLES:,} cannot show whether data or targets are scarce: use {remedy}"
        )
    if plan.own_negatives is not None and plan.own_negatives < MIN_NEGATIVES:
        warnings.append(
            f"only {plan.own_negatives} negatives per example, all from its own batch; "
            "accumulation adds none, recipe=dense draws them from the bank"
        )
    return warnings


def validation_warnings(
    num_queries: int, detectable: float, wanted: float = VISIBLE_DIFFERENCE
) -> list[str]:
    """Return a warning if val has too few queries, with the number that would be enough.

    `detectable` is the `smallest_detectable` difference of two predictors on these queries; it
    falls with the square root of their number. It is NaN if all queries come from one document.
    """
    if math.isnan(detectable):
        return [
            f"the {num_queries:,} val queries come from one document; differences between models "
            "need two or more"
        ]
    if detectable <= wanted:
        return []
    needed = math.ceil(num_queries * (detectable / wanted) ** 2)
    return [
        f"validation is too small: {num_queries:,} queries detect differences of Hit@5 of "
        f"{100 * detectable:.1f} points or more; about {needed:,} queries, from proportionally "
        f"more documents, would detect {100 * wanted:.0f} points"
    ]


def epoch_warnings(
    history: Sequence[dict[str, float]], best_epoch: int, has_ended: bool = False
) -> list[str]:
    """Return the warnings about the epochs so far.

    Where the best epoch lies matters only once training has ended: until then it may improve.
    """
    warnings = []
    best = next((record for record in history if record["epoch"] == best_epoch), {})
    later = [record for record in history if best and record["epoch"] > best_epoch]
    smaller_lr = f"lr={max((one.get('train/lr', 0.0) for one in history), default=0.0) / 3:.1g}"
    if best_epoch == 1 and later and has_ended:
        warnings.append(
            f"best at epoch 1 of {len(history)}: more training made the model worse; try "
            f"{smaller_lr}, or model=skip, which has fewer parameters"
        )
    skipped = sum(int(record.get("train/skipped_steps", 0)) for record in history)
    if skipped:
        warnings.append(
            f"{skipped} optimizer steps were skipped because the loss, a gradient or a weight was "
            f"not finite; try {smaller_lr}, or precision=fp32"
        )
    returns = sum(int(record.get("train/rollbacks", 0)) for record in history)
    if returns:
        warnings.append(
            f"training went back to its last good weights {returns} times because the loss spiked "
            f"or a weight overflowed; try {smaller_lr}"
        )
    if has_ended and any(_rose_while_hits_fell(best, record) for record in later):
        warnings.append(
            f"val cosine rose while Hit@5 fell after epoch {best_epoch}: closer predictions were "
            "worse queries; there is nothing to do, because Hit@5 chooses the epoch"
        )
    return warnings


def _has_fallen(best: Mapping[str, float], later: Mapping[str, float]) -> bool:
    """Tell whether Hit@5 fell notably; a small fall after the best epoch means nothing."""
    return later["val/hit_at_5"] < best["val/hit_at_5"] - NOTABLE_FALL


def _rose_while_hits_fell(best: Mapping[str, float], later: Mapping[str, float]) -> bool:
    return _has_fallen(best, later) and later.get("val/cosine", 0) > best.get("val/cosine", 0)


def warnings_by_now(
    plan: TrainingPlan, history: Sequence[dict[str, float]], best_epoch: int
) -> list[str]:
    """Return the current warnings of a training in progress."""
    return planned_warnings(plan) + epoch_warnings(history, best_epoch)


def training_warnings(
    plan: TrainingPlan, history: Sequence[dict[str, float]], best_epoch: int, optimiser_steps: int
) -> list[str]:
    """Return the warnings of a finished training."""
    warnings = planned_warnings(plan) + epoch_warnings(history, best_epoch, has_ended=True)
    last = history[-1] if history else {}
    share = last.get("train/share_encoder", 1.0)
    if share < IDLE_SHARE:
        warnings.append(
            f"the encoder adds nothing: 1 - cosine of predictions with and without it is "
            f"{share:.4f}; model=skip predicts the same in less time"
        )
    if optimiser_steps < MIN_STEPS <= plan.steps:
        warnings.append(
            f"only {optimiser_steps} of {plan.steps} optimizer steps were taken, too few to judge "
            f"the model by: patience={plan.epochs} takes them all"
        )
    return warnings
