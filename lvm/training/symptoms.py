"""Warnings drawn from a training history."""


def training_warnings(
    history: list[dict[str, float]], best_epoch: int, optimiser_steps: int
) -> list[str]:
    """Return what a reader of these figures should doubt, one sentence each."""
    warnings = []
    if best_epoch == 1 and len(history) > 1:
        warnings.append("best at epoch 1: the model got worse with training, or hardly trained")
    if optimiser_steps < 300:
        warnings.append(f"only {optimiser_steps} optimiser steps: too few to judge the model by")
    last = history[-1] if history else {}
    best = next((record for record in history if record["epoch"] == best_epoch), last)
    if last.get("val/cosine", 0) > best.get("val/cosine", 0) and best is not last:
        if last["val/hit_at_5"] < best["val/hit_at_5"]:
            warnings.append("val cosine rose while Hit@5 fell: cosine does not choose the epoch")
    return warnings
