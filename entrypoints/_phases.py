"""The trainings of the phase table: planned, found finished, or launched."""

import hashlib
import json
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from entrypoints._candidates import split_seed
from entrypoints.train import TrainOptions
from lvm.bank.store import Bank
from lvm.retrieval.lanes import check_lanes
from lvm.retrieval.rerank import LANE, NONE
from lvm.shadow.measuring import MEASUREMENT
from lvm.studies.phases.compared import Trained
from lvm.studies.phases.table import Phase
from lvm.system.thresholds import read_gate_rules
from lvm.tracking import alias, logged_models
from lvm.tracking import runs as tracking
from lvm.tracking import versions as registered
from lvm.tracking.alias import BASELINE
from lvm.training.batches import Batches
from lvm.training.config import resolve
from lvm.training.fingerprint import training_sha256
from lvm.training.plan import TrainingPlan, plan_training
from lvm.windows.export import ensure_windows
from lvm.windows.planning import Windows

TRAINING_TAG, SHADOW_TAG = "training_sha256", "phases_shadow_sha256"
REPLAY = "shadow-eval"
LOCKS = Path("data/phases")


@dataclass(frozen=True)
class Job:
    """One phase under one recipe: the parameters of `train`, what they amount to.

    A grown one has the name of the job whose weights it starts from, and no final sha256 before
    that is done (`grow`).
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


@dataclass(frozen=True)
class Done:
    """A finished training with its model, registered as a version."""

    run_id: str
    model_id: str
    version: str
    report: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Shadow:
    """A finished replay: its report, its table of ranks by query."""

    run_id: str
    report: dict[str, Any]
    per_query: pd.DataFrame


class Planner:
    """Plans trainings on one bank as `train` would do them, reading the windows of a ctx once.

    The windows are split by document under the one `seed` that the replay will take, so that it
    finds none of its answers among the rows trained on.
    """

    def __init__(self, bank: Bank, seed: int = 0) -> None:
        self.bank, self.seed = bank, seed
        self._windows: dict[int, Windows] = {}

    def jobs(
        self, phase: Phase, recipe: str, parameters: dict[str, Any], suffix: str = ""
    ) -> list[Job]:
        """Plan the trainings of a phase; `suffix` goes behind their names.

        Raises ValueError where one is impossible on this bank.
        """
        own = self.job(phase.name, phase, recipe, parameters, suffix)
        if phase.grown is None:
            return [own]
        label = f"{phase.name} {phase.grown}"
        grown = self.job(label, phase, recipe, {**parameters, "model": phase.grown}, suffix)
        return [own, replace(grown, grows_from=own.name)]

    def job(
        self, label: str, phase: Phase, recipe: str, parameters: dict[str, Any], suffix: str = ""
    ) -> Job:
        """Plan one training that starts from its own first weights."""
        parameters = {**parameters, "phase": phase.name, "recipe": recipe}
        options = TrainOptions(**parameters).with_phase()
        if options.ctx not in self._windows:
            plan = {"split": "document", "seed": self.seed}
            self._windows[options.ctx] = ensure_windows(self.bank, options.ctx, **plan)
        windows = self._windows[options.ctx]
        config = resolve(options.config(), windows.ctx)
        is_dense = config.recipe == "dense"
        batches = Batches(self.bank, windows, config.batch_size, config.seed, is_dense)
        plan = plan_training(batches, config)
        sha256 = training_sha256(config, windows)
        parameters = {**parameters, "windows": str(windows.folder)}
        return Job(label + suffix, label, phase, recipe, parameters, windows, plan, sha256)


def replay_seed(bank: Bank) -> int:
    """Return the seed by which a replay of new models will split the bank."""
    baseline = alias.aliases().get(BASELINE)
    card = next((one for one in registered.cards() if one.version == baseline), None)
    return split_seed(card, (), bank)


def grow(job: Job, base: Done) -> Job:
    """Return the job that starts from the weights of `base`."""
    parameters = {**job.parameters, "init": reference(base.run_id)}
    config = resolve(TrainOptions(**parameters).with_phase().config(), job.windows.ctx)
    initial = logged_models.load(parameters["init"]).model
    sha256 = training_sha256(config, job.windows, initial)
    return replace(job, parameters=parameters, sha256=sha256)


def train_all(jobs: Sequence[Job]) -> list[Done]:
    """Return what each training left, in their order; what is finished already is not repeated."""
    done: dict[str, Done] = {}
    for job in jobs:
        begun = job if job.grows_from is None else grow(job, done[job.grows_from])
        done[job.name] = train_or_find(begun)
    return list(done.values())


def train_or_find(job: Job) -> Done:
    """Return the latest whole training of these inputs; launch it where there is none."""
    with one_at_a_time(job.sha256, f"phase {job.name}"):
        for run_id in tracking.find_finished(TRAINING_TAG, job.sha256):
            try:
                done = read_done(run_id)
            except ValueError as error:
                print(f"phase {job.name}: run {run_id} is of no use: {error}", flush=True)
                continue
            print(f"phase {job.name}: run {run_id} has these inputs, nothing to train", flush=True)
            return done
        return read_done(tracking.launch("train", job.parameters))


@contextmanager
def one_at_a_time(sha256: str, what: str) -> Iterator[None]:
    """Let one process on this machine look for the work of this sha256, or do it, at a time."""
    LOCKS.mkdir(parents=True, exist_ok=True)
    lock = FileLock(LOCKS / f".{sha256[:16]}.lock")
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        print(f"{what}: another process is at it, waiting", flush=True)
        held = lock.acquire()
    with held:
        yield


def read_done(run_id: str) -> Done:
    """Read what a training left, its model whole; register that where it was left out.

    Raises ValueError where a part of it cannot be read.
    """
    card = logged_models.load(reference(run_id))
    assert card.model_id is not None
    report = tracking.read_json(run_id, "report.json")
    version = registered.version_of(card.model_id)
    version = version or registered.register(card.model_id, card.facts)
    return Done(run_id, card.model_id, version, report)


def reference(run_id: str) -> str:
    """Return the URI of the model that a training run logged."""
    return f"runs:/{run_id}/{registered.ARTIFACT}"


def shadow_or_find(
    jobs: Sequence[Job], done: Sequence[Done], bank: Bank, promote: str, max_queries: int | None
) -> Shadow:
    """Return one shadow evaluation over all models, launched unless it stands already.

    One of before stands while its models, data, rules are these, the alias is where it left it, all
    were scored in it, and it can be read. This run is tagged with what it wants replayed before the
    replay is launched, so that the replay is found however this run ends.
    """
    longest = max((job.windows for job in jobs), key=lambda windows: windows.ctx)
    by_lane = any(job.phase.rerank == LANE for job in jobs) and has_lanes(bank, longest)
    asked = {"promote": promote, "rerank": LANE if by_lane else NONE}
    asked["max_queries"] = "auto" if max_queries is None else str(max_queries)
    models = sorted({(one.model_id, one.version) for one in done})
    parts = [MEASUREMENT, bank.sha256, longest.sha256, models, asked, asdict(read_gate_rules())]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    with one_at_a_time(key, REPLAY):
        found = standing_replay(key, promote, {one.version for one in done})
        if found is not None:
            print(f"{REPLAY}: run {found.run_id} replayed these models, nothing to do", flush=True)
            return found
        tracking.set_tags({SHADOW_TAG: key})
        runs = dict.fromkeys(reference(one.run_id) for one in done)
        candidates = {"candidates": ",".join(runs), "bank": str(bank.path)}
        return read_shadow(tracking.launch(REPLAY, candidates | asked))


def standing_replay(key: str, promote: str, versions: Set[str]) -> Shadow | None:
    """Return the latest replay of this key that can be read, scored these versions, and stands.

    One that was killed after its promotion stands, too: the alias moves last.
    """
    with alias.locked():
        alias.repair()
    promoted = {move["run"] for move in alias.history()}
    for run_id in tracking.find_finished_children(SHADOW_TAG, key, REPLAY, promoted):
        try:
            found = read_shadow(run_id)
            check_scored(found.report, versions)
        except ValueError as error:
            print(f"{REPLAY}: run {run_id} is of no use: {error}", flush=True)
            continue
        if replay_stands(found.report, promote):
            return found
    return None


def read_shadow(run_id: str) -> Shadow:
    """Read what a replay left; raises ValueError where a part of it cannot be read."""
    report = tracking.read_json(run_id, "report.json")
    return Shadow(run_id, report, tracking.read_frame(run_id, "per_query.parquet"))


def check_scored(replay: dict[str, Any], versions: Set[str]) -> None:
    """Raise ValueError where one of these versions, or every free predictor, was left unscored.

    The next replay may score it: what was killed for want of memory need not be again.
    """
    scored = {str(one["version"]) for one in replay["outcomes"] if one["figures"]}
    missing = sorted(versions - scored, key=int)
    if missing:
        raise ValueError(f"version {', '.join(missing)} was not scored in it")
    if replay["best_free"] is None:
        raise ValueError("no free predictor was scored in it")


def replay_stands(replay: dict[str, Any], promote: str) -> bool:
    """Tell whether the alias is at the version where that replay left it."""
    decision = replay["decision"]
    name = decision["winner"] if promote == "enabled" else decision["baseline"]
    versions = {one["name"]: one["version"] for one in replay["outcomes"]}
    return versions.get(name) == alias.aliases().get(BASELINE)


def has_lanes(bank: Bank, windows: Windows) -> bool:
    """Tell whether a lane can be foretold on this bank; print why not."""
    try:
        check_lanes(bank, windows, windows.seed)
    except ValueError as error:
        print(f"phases are shown as ranked: {error}", flush=True)
        return False
    return True


def as_trained(job: Job, done: Done, replay: dict[str, Any]) -> Trained:
    """Return what the report needs.

    Raises ValueError where the replay has not this version, or where it may have seen the answers:
    somebody replaced the planned windows meanwhile, or moved the alias to another seed's model.
    """
    known = {str(one["version"]): one for one in replay["outcomes"]}
    if done.version not in known:
        raise ValueError(f"shadow: version {done.version} of phase {job.name} took no part")
    outcome = known[done.version]
    if outcome["leak"] is not None:
        raise ValueError(
            f"shadow: phase {job.name} cannot be compared: {outcome['leak']}; data/windows or the "
            "baseline changed while it was trained: run phases again"
        )
    return Trained(
        job.name,
        job.label,
        job.phase,
        job.recipe,
        done.run_id,
        done.version,
        str(outcome["name"]),
        done.report,
    )
