"""The phase table of phases.yaml: its old published figures with intervals, its trainings now."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from scipy import stats
from torch import nn

from lvm.bank.bank import Bank
from lvm.evaluation.metrics import LEVEL
from lvm.models.table import TRAINED_MODELS
from lvm.retrieval.lanes import check_lanes
from lvm.retrieval.rerank import LANE
from lvm.system.errors import CONTROL, one_line_errors
from lvm.system.settings import read_yaml, validated
from lvm.training.checkpoint import training_sha256
from lvm.training.config import TrainConfig, resolve
from lvm.training.data import Batches
from lvm.training.optimizer import TrainingPlan, plan_training
from lvm.windows.export import ensure_windows
from lvm.windows.planning import Windows

PHASES_FILE = Path(__file__).parents[1] / "phases.yaml"
POWER = 0.8
# The model of the old system, whatever the defaults of train are.
MODEL = {"model": "memory_gru", "hidden": 512, "layers": 4}
# The decision that ended the old phases: a longer context answered less, hence "data scarcity".
OLD_DECISION = ("3.5", "3")
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

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
Count = Annotated[int, Field(ge=1, le=10**9)]
Number = Annotated[float, Field(ge=0, le=1e9)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=STRICT)
class Published:
    """What the old system published of a phase: shares of queries, ranked in `pool` candidates."""

    hit_at_1: Share
    hit_at_5: Share
    hit_at_10: Share
    pool: Count
    windows: Count
    best_epoch: Count
    last_epoch: Count
    steps: Count


@dataclass(frozen=True, config=STRICT)
class SeedSettings:
    """What a phase decides under recipe=seed alone."""

    batch_size: Count
    accumulation: Count
    alpha: Number


@dataclass(frozen=True, config=STRICT)
class Phase:
    """One phase: what it trains, how its answers are ordered, what was published of it.

    `grown` names a model that is trained from the weights of the phase's own. `after` names the
    phase that it is compared with, if that is not the one before it.
    """

    name: str
    ctx: Count
    chunk: Count
    seed: SeedSettings
    rerank: Literal["none", "lane"] = "none"
    grown: str | None = None
    after: str | None = None
    published: Published | None = None

    def settings(self, recipe: str) -> dict[str, Any]:
        """Return the options of `train` that the phase decides, unless the user types them.

        These are ctx, chunk, model, hidden and layers; under recipe=seed also batch_size,
        accumulation and alpha.
        """
        shared = {"ctx": self.ctx, "chunk": self.chunk, **MODEL}
        return shared | (vars(self.seed) if recipe == "seed" else {})


@dataclass(frozen=True, config=STRICT)
class OldGates:
    """The old criteria of success; phases.yaml explains each."""

    gain_above: Number
    best_epoch_above: Count
    loss_rise: Number
    latency_p95_ms: Number


@one_line_errors
def read_phases(path: str | Path = PHASES_FILE) -> dict[str, Phase]:
    """Read the phases in their order; raises ValueError on a missing, unknown or wrong value."""
    found: dict[str, Phase] = {}
    for key, values in _section(Path(path), "phases").items():
        if not _is_name(key):
            raise ValueError(f"phases {path}: a phase is named {key!r}; give it a word or a number")
        name = str(key)
        one = _phase(name, values, f"phases {path}: phases.{name}")
        if name in found:
            raise ValueError(f"phases {path}: phases.{name} appears twice")
        if one.after is not None and one.after not in found:
            known = ", ".join(found) or "none"
            raise ValueError(
                f"phases {path}: phases.{name}.after is {one.after!r}; it must be a phase above "
                f"it: {known}"
            )
        found[name] = one
    return found


def decided_by_phase(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a phase decides: those of the options of `train` that are None.

    Its sizes are those of its own model; another model keeps its default sizes. Raises ValueError
    for an unknown phase.
    """
    if given["phase"] is None:
        return {}
    known = read_phases()
    if given["phase"] not in known:
        raise ValueError(f"phase: unknown '{given['phase']}'; the table has {', '.join(known)}")
    phase = known[given["phase"]]
    settings = phase.settings(given["recipe"])
    if given["model"] not in (None, settings["model"], phase.grown):
        settings = {k: v for k, v in settings.items() if k not in ("hidden", "layers")}
    return {name: value for name, value in settings.items() if given[name] is None}


@one_line_errors
def read_old_gates(path: str | Path = PHASES_FILE) -> OldGates:
    """Read the section `old_gates`; raises ValueError as `read_phases` does."""
    values = _section(Path(path), "old_gates")
    return validated(OldGates, values, f"phases {path}: old_gates")


@one_line_errors
def chosen_phases(words: str, known: Mapping[str, Phase]) -> list[Phase]:
    """Return the phases of a list with commas, each once; ValueError on an unknown one or none."""
    names = list(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        wrong = f"unknown '{unknown[0]}'" if unknown else "none was given"
        raise ValueError(f"phases: {wrong}; the table has {', '.join(known)}")
    return [known[name] for name in names]


def _section(path: Path, section: str) -> dict[Any, Any]:
    contents = read_yaml(path, "phases")
    values = contents.get(section) if isinstance(contents, dict) else None
    if not isinstance(values, dict) or not values:
        raise ValueError(f"phases {path}: no section '{section}'; see lvm/phases.yaml")
    return values


def _phase(name: str, values: Any, where: str) -> Phase:
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}; it must have keys and values")
    if "name" in values:
        raise ValueError(f"{where} does not know name; it is named by its key")
    read = {**values, "name": name}
    for key, kind in (("seed", SeedSettings), ("published", Published)):
        if isinstance(values.get(key), dict):
            read[key] = validated(kind, values[key], f"{where}.{key}")
    after = values.get("after")
    if isinstance(after, int | float) and _is_name(after):
        read["after"] = str(after)
    one = validated(Phase, read, where)
    if one.grown is not None and one.grown not in TRAINED_MODELS:
        known = ", ".join(TRAINED_MODELS)
        raise ValueError(f"{where}.grown is {one.grown!r}; it must be one of {known}")
    return one


def _is_name(name: Any) -> bool:
    is_number = isinstance(name, int | float) and not isinstance(name, bool)
    return is_number or (isinstance(name, str) and name != "" and not CONTROL.search(name))


@dataclasses.dataclass(frozen=True)
class OldDifference:
    """Hit@5 of two published phases with Wilson intervals, and their difference.

    The interval of the difference is Newcombe's hybrid score (Statistics in Medicine 1998, method
    10), the p-value Fisher's exact test. With `queries_needed` queries a phase, a difference of
    this size is found with 80 % power (two-sided 5 %).
    """

    later: str
    earlier: str
    later_hits: int
    later_pool: int
    earlier_hits: int
    earlier_pool: int
    later_ci95: list[float]
    earlier_ci95: list[float]
    difference: float
    low: float
    high: float
    p_value: float
    queries_needed: int

    def report(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def wilson(hits: int, queries: int) -> list[float]:
    """Return the 95 % interval of a share (Wilson, JASA 1927)."""
    found = stats.binomtest(hits, queries).proportion_ci(1 - LEVEL, method="wilson")
    return [float(found.low), float(found.high)]


def hits_of(published: Published, key: str) -> int:
    """Return the number of answered queries behind a published share."""
    return round(getattr(published, key) * published.pool)


def published_report(published: Published) -> dict[str, Any]:
    """Return the published figures with their Wilson intervals, as JSON values."""
    keys = ("hit_at_1", "hit_at_5", "hit_at_10")
    ci95 = {key: wilson(hits_of(published, key), published.pool) for key in keys}
    return {**asdict(published), "ci95": ci95}


def old_difference(later: Phase, earlier: Phase) -> OldDifference:
    """Compare the published figures of two phases; raises ValueError if one has none."""
    if later.published is None or earlier.published is None:
        raise ValueError(f"phases: nothing was published of {later.name} or {earlier.name}")
    num, pool = hits_of(later.published, "hit_at_5"), later.published.pool
    other_num, other_pool = hits_of(earlier.published, "hit_at_5"), earlier.published.pool
    share, other = num / pool, other_num / other_pool
    (low, high), (other_low, other_high) = wilson(num, pool), wilson(other_num, other_pool)
    table = [[num, pool - num], [other_num, other_pool - other_num]]
    z = stats.norm.ppf(1 - LEVEL / 2) + stats.norm.ppf(POWER)
    variance = share * (1 - share) + other * (1 - other)
    change = share - other
    return OldDifference(
        later=later.name,
        earlier=earlier.name,
        later_hits=num,
        later_pool=pool,
        earlier_hits=other_num,
        earlier_pool=other_pool,
        later_ci95=[low, high],
        earlier_ci95=[other_low, other_high],
        difference=change,
        low=change - math.hypot(share - low, other_high - other),
        high=change + math.hypot(high - share, other - other_low),
        p_value=float(stats.fisher_exact(table).pvalue),
        queries_needed=math.ceil(z**2 * variance / change**2) if change else 0,
    )


@dataclasses.dataclass(frozen=True)
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
    return TrainConfig.of_options(chosen)


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
