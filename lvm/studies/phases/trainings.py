"""The trainings of the phase table, planned as `train` does them."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lvm.bank.store import Bank
from lvm.retrieval.lanes import check_lanes
from lvm.retrieval.rerank import LANE
from lvm.studies.phases.table import Phase
from lvm.training.batches import Batches
from lvm.training.config import TrainConfig, resolve
from lvm.training.plan import TrainingPlan, plan_training, training_sha256
from lvm.windows.export import ensure_windows
from lvm.windows.planning import Windows

# Options of `train` by size and recipe, beside those of a phase; the recipe has the rest.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "full": {"dense": {}, "seed": {}},
    "quick": {
        "dense": {"hidden": 256, "negatives": 2048, "epochs": 8},
        "seed": {"hidden": 256, "epochs": 30},
    },
    "tiny": {
        "dense": {"hidden": 16, "layers": 2, "slots": 2, "negatives": 64, "epochs": 1},
        "seed": {"hidden": 16, "layers": 2, "slots": 2, "epochs": 2},
    },
}


@dataclass(frozen=True)
class Job:
    """One phase under one recipe: the options of `train` that are typed for it, and its plan.

    `name` is unique; `label` lacks the recipe. A grown job starts from the weights of the job
    `grows_from`; its `sha256` is final only when that one is done (`grown_job`).
    """

    name: str
    label: str
    phase: Phase
    recipe: str
    parameters: dict[str, Any]
    windows: Windows
    plan: TrainingPlan
    sha256: str
    grows_from: str | None = None


class Planner:
    """Plans trainings on one bank, opening the windows of each context length once.

    The windows are split by document under `seed`, the seed of the replay, so that no answer of the
    replay is among the rows trained on.
    """

    def __init__(self, bank: Bank, seed: int = 0) -> None:
        self.bank, self.seed = bank, seed
        self._windows: dict[int, Windows] = {}

    def all_jobs(
        self, phases: Sequence[Phase], recipes: Sequence[str], size: str, given: Mapping[str, Any]
    ) -> list[Job]:
        """Plan every phase under every recipe; `given` are options that the user typed.

        Raises ValueError if one is impossible on this bank.
        """
        jobs = []
        for phase in phases:
            for recipe in recipes:
                suffix = "" if len(recipes) == 1 else f" {recipe}"
                jobs += self.jobs(phase, recipe, SIZES[size][recipe] | dict(given), suffix)
        return jobs

    def jobs(
        self, phase: Phase, recipe: str, parameters: dict[str, Any], suffix: str = ""
    ) -> list[Job]:
        """Plan the trainings of a phase, its own and then the grown one; names end in `suffix`."""
        own = self.job(phase.name, phase, recipe, parameters, suffix)
        if phase.grown is None:
            return [own]
        label = f"{phase.name} {phase.grown}"
        grown = self.job(label, phase, recipe, {**parameters, "model": phase.grown}, suffix)
        return [own, replace(grown, grows_from=own.name)]

    def job(
        self, label: str, phase: Phase, recipe: str, parameters: dict[str, Any], suffix: str = ""
    ) -> Job:
        """Plan one training that starts from its own initial weights."""
        ctx = {**phase.settings(recipe), **parameters}["ctx"]
        if ctx not in self._windows:
            windows = ensure_windows(self.bank, ctx, split="document", seed=self.seed)
            self._windows[ctx] = windows
        windows = self._windows[ctx]
        chosen = training_config(phase, recipe, parameters)
        config = resolve(chosen, windows.ctx, windows.num_train_rows)
        is_dense = config.recipe == "dense"
        batches = Batches(self.bank, windows, config.batch_size, config.seed, is_dense)
        typed = {**parameters, "phase": phase.name, "recipe": recipe}
        return Job(
            name=label + suffix,
            label=label,
            phase=phase,
            recipe=recipe,
            parameters=typed | {"windows": str(windows.folder)},
            windows=windows,
            plan=plan_training(batches, config),
            sha256=training_sha256(config, windows),
        )


def training_config(phase: Phase, recipe: str, parameters: Mapping[str, Any]) -> TrainConfig:
    """Return the config of a training: a typed option wins over what the phase decides."""
    chosen = {**phase.settings(recipe), **parameters, "recipe": recipe}
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in chosen.items() if name in known})


def grown_job(job: Job, init: str, initial: nn.Module) -> Job:
    """Return the job that starts from the weights of `initial`, which `train` reads at `init`."""
    parameters = {**job.parameters, "init": init}
    chosen = training_config(job.phase, job.recipe, parameters)
    config = resolve(chosen, job.windows.ctx, job.windows.num_train_rows)
    return replace(job, parameters=parameters, sha256=training_sha256(config, job.windows, initial))


def is_by_lane(jobs: Sequence[Job], bank: Bank) -> bool:
    """Tell whether a phase is to be re-ranked by lane and the bank allows it; print why not."""
    if not any(job.phase.rerank == LANE for job in jobs):
        return False
    windows = longest_windows(jobs)
    try:
        check_lanes(bank, windows, windows.seed)
    except ValueError as error:
        print(f"phases are shown as ranked: {error}", flush=True)
        return False
    return True


def longest_windows(jobs: Sequence[Job]) -> Windows:
    """Return the windows of the longest context, those of the replay."""
    return max((job.windows for job in jobs), key=lambda windows: windows.ctx)
