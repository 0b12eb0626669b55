"""Warnings from the plan and the history of a training; measurements of a model's parts."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lvm.models.skip import Skip, without
from lvm.training.optimizer import TrainingPlan

IDLE_SHARE = 0.001  # of the prediction: 1 - cosine without the part

# The replaced system read its figures after 24 steps over 514 examples with 3 negatives each.
MIN_STEPS = 300
MIN_EXAMPLES = 5000
MIN_NEGATIVES = 63
NOTABLE_FALL = 0.005  # of Hit@5
VISIBLE_DIFFERENCE = 0.02  # of Hit@5: what a validation should be able to see


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


def planned_warnings(plan: TrainingPlan) -> list[str]:
    """Return what can be doubted before the first step, one sentence each."""
    warnings = []
    if plan.steps < MIN_STEPS:
        warnings.append(
            f"only {plan.steps} optimiser steps are planned ({plan.steps_per_epoch} an epoch, "
            f"epochs: {plan.epochs}): fewer than {MIN_STEPS} say nothing about the model"
        )
    if plan.examples_per_epoch < MIN_EXAMPLES:
        warnings.append(
            f"only {plan.examples_per_epoch:,} training examples an epoch: below {MIN_EXAMPLES:,} "
            "a lack of data cannot be told from a lack of targets; recipe=dense makes every "
            "position one"
        )
    if plan.own_negatives is not None and plan.own_negatives < MIN_NEGATIVES:
        warnings.append(
            f"only {plan.own_negatives} negatives an example: those of its own batch, accumulation "
            "adds none; recipe=dense draws them from the bank"
        )
    return warnings


def validation_warnings(
    num_queries: int, detectable: float, wanted: float = VISIBLE_DIFFERENCE
) -> list[str]:
    """Return what the val queries cannot see, with the number of queries that would do.

    `detectable` is `statistics.smallest_detectable` of two predictors on them; it falls with the
    square root of the number of queries. NaN: all are from one document.
    """
    if math.isnan(detectable):
        return [
            f"the {num_queries:,} val queries are from fewer than 2 documents: no difference can "
            "be judged by them"
        ]
    if detectable <= wanted:
        return []
    needed = math.ceil(num_queries * (detectable / wanted) ** 2)
    return [
        f"validation is too small: {num_queries:,} queries see a difference of Hit@5 from "
        f"{100 * detectable:.1f} points on; about {needed:,} queries, from as many times the "
        f"documents, would see {100 * wanted:.0f} points"
    ]


def epoch_warnings(
    history: Sequence[dict[str, float]], best_epoch: int, has_ended: bool = False
) -> list[str]:
    """Return what can be doubted after the epochs so far, one sentence each."""
    warnings = []
    best = next((record for record in history if record["epoch"] == best_epoch), {})
    later = [record for record in history if best and record["epoch"] > best_epoch]
    is_settled = has_ended or any(_has_fallen(best, record) for record in later)
    if best_epoch == 1 and later and is_settled:
        warnings.append("best at epoch 1: the model got worse with training, or hardly trained")
    skipped = sum(int(record.get("train/skipped_steps", 0)) for record in history)
    if skipped:
        warnings.append(
            f"{skipped} optimiser steps were skipped: loss, gradient or weights not finite"
        )
    returns = sum(int(record.get("train/rollbacks", 0)) for record in history)
    if returns:
        warnings.append(
            f"training went back to its last good weights {returns} times: the loss spiked, or the "
            "weights overflowed; a smaller lr is safer"
        )
    if any(_rose_while_hits_fell(best, record) for record in later):
        warnings.append("val cosine rose while Hit@5 fell: cosine does not choose the epoch")
    return warnings


def _has_fallen(best: Mapping[str, float], later: Mapping[str, float]) -> bool:
    """Any epoch after the best has fewer hits by definition: only a fall of some size counts."""
    return later["val/hit_at_5"] < best["val/hit_at_5"] - NOTABLE_FALL


def _rose_while_hits_fell(best: Mapping[str, float], later: Mapping[str, float]) -> bool:
    return _has_fallen(best, later) and later.get("val/cosine", 0) > best.get("val/cosine", 0)


def warnings_by_now(
    plan: TrainingPlan, history: Sequence[dict[str, float]], best_epoch: int
) -> list[str]:
    """Return what can be doubted while training."""
    return planned_warnings(plan) + epoch_warnings(history, best_epoch)


def training_warnings(
    plan: TrainingPlan, history: Sequence[dict[str, float]], best_epoch: int, optimiser_steps: int
) -> list[str]:
    """Return what a reader of the finished training should doubt, one sentence each."""
    warnings = planned_warnings(plan) + epoch_warnings(history, best_epoch, has_ended=True)
    last = history[-1] if history else {}
    share = last.get("train/share_encoder", 1.0)
    if share < IDLE_SHARE:
        warnings.append(
            f"the encoder adds nothing: its share of the predictions is {share:.4f} (1 - cosine "
            "without it); model=skip predicts the same for less"
        )
    if optimiser_steps < MIN_STEPS <= plan.steps:
        warnings.append(f"only {optimiser_steps} optimiser steps: too few to judge the model by")
    return warnings
