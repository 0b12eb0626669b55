"""Runs of the studies: the trainings and replay of `phases`, the cells and verdict of `scaling`."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from lvm.bank.bank import Bank
from lvm.evaluation.metrics import figures, soft_hit_at
from lvm.report.phases import PhaseStory, phase_figure, phases_markdown, phases_table, phases_text
from lvm.report.studies import (
    scaling_figure,
    scaling_note,
    scaling_page,
    scaling_report,
    scaling_text,
)
from lvm.report.tables import HITS, MARKDOWN
from lvm.retrieval.rerank import LANE, NONE
from lvm.shadow.replay import MEASUREMENT, split_seed
from lvm.studies.phase_comparison import PhaseComparison, Trained, old_checks
from lvm.studies.phases import (
    OLD_DECISION,
    Job,
    grown_job,
    is_by_lane,
    longest_windows,
    old_difference,
    read_old_gates,
    read_phases,
)
from lvm.studies.scaling_cells import Cell, CellResult, Trainer
from lvm.studies.scaling_grid import Plan, Scaling
from lvm.studies.scaling_verdict import K
from lvm.system.settings import read_gate_rules
from lvm.tracking import logged_models, runs
from lvm.tracking.datasets import Inputs
from lvm.tracking.registry import ARTIFACT, BASELINE, Registry, locked
from lvm.tracking.runs import publish_report

TRAINING_TAG, SHADOW_TAG = "training_sha256", "phases_shadow_sha256"
REPLAY = "shadow-eval"
LOCKS = Path("data/phases")
FIGURE = "phases.png"


@dataclass(frozen=True)
class Done:
    """A finished training with its model, registered as a version."""

    run_id: str
    model_id: str
    version: str
    report: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Shadow:
    """A finished replay: its report and its table of ranks by query."""

    run_id: str
    report: dict[str, Any]
    per_query: pd.DataFrame


def replay_seed(registry: Registry, bank: Bank) -> int:
    """Return the seed by which a replay of new models will split the bank."""
    baseline = registry.aliases().get(BASELINE)
    card = next((one for one in registry.cards() if one.version == baseline), None)
    return split_seed(None if card is None else card.facts, (), bank)


def train_all(registry: Registry, jobs: Sequence[Job]) -> list[Done]:
    """Return the finished training of each job, in their order; none is repeated."""
    done: dict[str, Done] = {}
    for job in jobs:
        if job.grows_from is not None:
            job = grow(job, done[job.grows_from])
        done[job.name] = train_or_find(registry, job)
    return list(done.values())


def grow(job: Job, base: Done) -> Job:
    """Return the job that starts from the weights of `base`."""
    init = reference(base.run_id)
    return grown_job(job, init, logged_models.load(init).model)


def train_or_find(registry: Registry, job: Job) -> Done:
    """Return the latest complete training of a job's inputs; launch one if there is none."""
    return find_or_launch(registry, f"phase {job.name}", job.sha256, job.parameters)


def find_or_launch(
    registry: Registry, what: str, sha256: str, parameters: Mapping[str, Any]
) -> Done:
    """Return the latest complete training of this sha256; launch `train` if there is none."""
    with one_at_a_time(sha256, what):
        for run_id in runs.find_finished(TRAINING_TAG, sha256):
            try:
                done = read_done(registry, run_id)
            except ValueError as error:
                print(f"{what}: run {run_id} is of no use: {error}", flush=True)
                continue
            print(f"{what}: run {run_id} has these inputs, nothing to train", flush=True)
            return done
        return read_done(registry, runs.launch("train", parameters))


@contextmanager
def one_at_a_time(sha256: str, what: str) -> Iterator[None]:
    """Let one process on this machine at a time look for the work of this sha256, or do it."""
    LOCKS.mkdir(parents=True, exist_ok=True)
    lock = FileLock(LOCKS / f".{sha256[:16]}.lock")
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        print(f"{what}: another process is at it, waiting", flush=True)
        held = lock.acquire()
    with held:
        yield


def read_done(registry: Registry, run_id: str) -> Done:
    """Read what a training logged, and register its model if it has no version.

    Raises ValueError if a part of it cannot be read.
    """
    card = logged_models.load(reference(run_id))
    assert card.model_id is not None
    report = runs.read_json(run_id, "report.json")
    version = registry.version_of(card.model_id)
    version = version or registry.register(card.model_id, card.facts)
    return Done(run_id, card.model_id, version, report)


def reference(run_id: str) -> str:
    """Return the URI of the model that a training run logged."""
    return f"runs:/{run_id}/{ARTIFACT}"


def shadow_or_find(
    registry: Registry,
    jobs: Sequence[Job],
    done: Sequence[Done],
    bank: Bank,
    promote: str,
    max_queries: int | None,
) -> Shadow:
    """Return one shadow evaluation over all models; launch one unless an earlier one can be reused.

    An earlier replay is reused if its models, data and rules match, the alias has not moved since,
    it scored every model, and it can be read. The key is a tag of this run before the replay is
    launched, so the replay is found again however this run ends.
    """
    asked = {"promote": promote, "rerank": LANE if is_by_lane(jobs, bank) else NONE}
    asked["max_queries"] = "auto" if max_queries is None else str(max_queries)
    asked["registry"] = registry.name
    models = sorted({(one.model_id, one.version) for one in done})
    windows_sha256 = longest_windows(jobs).sha256
    rules = asdict(read_gate_rules())
    parts = [MEASUREMENT, bank.sha256, windows_sha256, models, asked, rules]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    with one_at_a_time(key, REPLAY):
        found = reusable_replay(registry, key, promote, {one.version for one in done})
        if found is not None:
            print(f"{REPLAY}: run {found.run_id} replayed these models, nothing to do", flush=True)
            return found
        runs.set_tags({SHADOW_TAG: key})
        references = dict.fromkeys(reference(one.run_id) for one in done)
        candidates = {"candidates": ",".join(references), "bank": str(bank.path)}
        return read_shadow(runs.launch(REPLAY, candidates | asked))


def reusable_replay(registry: Registry, key: str, promote: str, needed: Set[str]) -> Shadow | None:
    """Return the latest readable replay of this key that scored these versions and still holds.

    A replay that was killed after its promotion counts, since the alias moves last.
    """
    with locked():
        registry.repair()
    promoted = {move["run"] for move in registry.history()}
    for run_id in runs.find_finished_children(SHADOW_TAG, key, REPLAY, promoted):
        try:
            found = read_shadow(run_id)
            check_scored(found.report, needed)
        except ValueError as error:
            print(f"{REPLAY}: run {run_id} is of no use: {error}", flush=True)
            continue
        if is_alias_unmoved(registry, found.report, promote):
            return found
    return None


def read_shadow(run_id: str) -> Shadow:
    """Read what a replay logged; raises ValueError if a part of it cannot be read."""
    report = runs.read_json(run_id, "report.json")
    return Shadow(run_id, report, runs.read_frame(run_id, "per_query.parquet"))


def check_scored(replay: dict[str, Any], needed: Set[str]) -> None:
    """Raise ValueError if one of these versions, or every free predictor, was left unscored.

    The next replay may score it: a process killed for lack of memory may succeed then.
    """
    scored = {str(one["version"]) for one in replay["outcomes"] if one["figures"]}
    missing = sorted(needed - scored, key=int)
    if missing:
        raise ValueError(f"version {', '.join(missing)} was not scored in it")
    if replay["best_free"] is None:
        raise ValueError("no free predictor was scored in it")


def is_alias_unmoved(registry: Registry, replay: dict[str, Any], promote: str) -> bool:
    """Tell whether the alias is at the version where that replay left it."""
    decision = replay["decision"]
    name = decision["winner"] if promote == "enabled" else decision["baseline"]
    version_by_name = {one["name"]: one["version"] for one in replay["outcomes"]}
    return version_by_name.get(name) == registry.aliases().get(BASELINE)


def as_trained(job: Job, done: Done, replay: dict[str, Any]) -> Trained:
    """Return what the comparison of the phases needs of one.

    Raises ValueError if the replay lacks this version, or if the model may have seen the answers:
    its windows were replaced meanwhile, or the alias moved to a model of another seed.
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
        name=job.name,
        label=job.label,
        phase=job.phase,
        recipe=job.recipe,
        run_id=done.run_id,
        version=done.version,
        candidate=str(outcome["name"]),
        report=done.report,
    )


def publish_phases(
    measured: PhaseComparison, shadow: Shadow, promote: str, gates: str, report_path: str | None
) -> None:
    """Log the page with its figure, the metrics of every phase and the JSON report."""
    known, decision = read_phases(), shadow.report["decision"]
    old = old_difference(*(known[name] for name in OLD_DECISION))
    checks = old_checks(measured, read_old_gates()) if gates == "old" else []
    is_enabled = promote == "enabled"
    reasons = decision["reasons"]
    story = PhaseStory(known, old, decision["winner"], reasons, is_enabled, checks)
    for row in measured.rows:
        hits = {f"phases/{row.name}/{key}": row.measured.figures[key] for key in HITS}
        runs.log_metrics(hits, step=1)
    runs.describe_run(phases_table(measured, MARKDOWN))
    runs.log_artifact(phases_markdown(measured, story, FIGURE), "report.md")
    runs.log_artifact(phase_figure(measured, known), FIGURE)
    text = phases_text(measured, story)
    runs.log_artifact(text + "\n", "phases.txt")
    print(f"\n{text}", flush=True)
    report = measured.report() | {"old_decision": old.report(), "decision": decision}
    report |= {"old_gates": [asdict(check) for check in checks], "shadow_run": shadow.run_id}
    publish_report(report, report_path)


def print_round(cell: Cell, record: Mapping[str, float]) -> None:
    """Print one round of a training as a line."""
    print(
        f"{_name(cell)}, round {record['epoch']:.0f}: loss {record['train/loss']:.4f}  "
        f"val Hit@5 {100 * record['val/hit_at_5']:.2f} %  ({record['train/seconds']:.0f} s)",
        flush=True,
    )


def log_cell(kind: str, result: CellResult, inputs: Inputs) -> None:
    """Log a cell as a nested run once it is finished, so that none is left half logged."""
    facts = {"kind": kind, **vars(result.cell), "kept": result.was_kept}
    measured = figures(result.rank_Q)
    with runs.child_run(f"{kind}: {_name(result.cell)}", facts):
        for record in result.history:
            values = {name: value for name, value in record.items() if name != "epoch"}
            runs.log_metrics(values, step=int(record["epoch"]), dataset=inputs.dataset)
        best = {f"measured/{name}": value for name, value in measured.items()}
        best["measured/soft_hit_at_5"] = float(soft_hit_at(result.rank_Q, K).mean())
        best |= {"parameters": result.parameters, "documents": result.documents}
        runs.log_metrics(best, step=result.best_round, dataset=inputs.dataset)
    kept = ", kept from an earlier run" if result.was_kept else ""
    shown = f"Hit@5 {100 * measured['hit_at_5']:.2f} % measured"
    print(
        f"{kind}: {_name(result.cell)}: {shown}, best round {result.best_round}{kept}", flush=True
    )


def finish_scaling(
    scaling: Scaling,
    plan: Plan,
    free: dict[str, dict[str, Any]],
    trainer: Trainer,
    report_path: str | None,
) -> None:
    """Log verdict, gains, page, figure; print the tables; write the report."""
    num_queries, name = len(trainer.queries.measured), scaling.verdict.name
    runs.set_tags({"verdict": name})
    page = scaling_page(scaling, plan, free, num_queries, trainer.bank.sha256[:12])
    runs.log_artifact(page, "scaling.md")
    runs.describe_run(scaling_note(scaling))
    if scaling.soft is not None and scaling.hit is not None:
        runs.log_artifact(scaling_figure(scaling, plan, free), "scaling.png")
        gains = {"data": scaling.soft.data, "parameters": scaling.soft.parameters}
        bounds = ("mean", "low", "high")
        runs.log_metrics({f"gain/{k}_{b}": getattr(g, b) for k, g in gains.items() for b in bounds})
    print(f"\n{scaling_text(scaling, plan, free, num_queries)}\n")
    publish_report(scaling_report(scaling, plan, free, num_queries), report_path)


def _name(cell: Cell) -> str:
    trial = f"{cell.fraction:g} of the data, width {cell.width}, seed {cell.seed}"
    return f"{trial}, {cell.steps} steps at lr {cell.lr:g}"
