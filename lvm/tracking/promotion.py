"""Promotion after a shadow replay: decide against the current alias, report, move the alias."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from lvm.report.shadow import forest_figure, rank_figure, shadow_lane_figure, shadow_markdown
from lvm.report.tables import HITS
from lvm.shadow.comparison import Outcome, ShadowResult
from lvm.shadow.decision import Decision, decide
from lvm.shadow.replay import Candidate
from lvm.system.processes import defer_signals
from lvm.system.thresholds import GateRules
from lvm.tracking import alias, logged_models, runs
from lvm.tracking.runs import Dataset
from lvm.tracking.versions import DECIDED, LOG, NAME, SHADOW, metric_tags

FIGURES = {"forest.png": forest_figure, "hits.png": rank_figure, "lanes.png": shadow_lane_figure}
Publish = Callable[[Decision], None]
TellFailure = Callable[[Decision, tuple[str, ...], str], None]


def promote_winner(
    result: ShadowResult,
    versions: Mapping[str, str | None],
    rules: GateRules,
    run_id: str,
    publish: Publish,
    tell_failure: TellFailure | None,
) -> Decision:
    """Decide, publish, then move the alias; return the decision. A dry run has no `tell_failure`.

    `versions` gives the version of each candidate by its name. The alias is read again under the
    registry's lock, which is held to the end: of two promotions at one moment the second decides
    after the first. Versions to promote are loaded whole, then `publish` is called, then the alias
    moves, so that no move lacks a report; stop signals are deferred. If a move fails,
    `tell_failure` receives the names that took the alias and why the next one did not, for the
    report; the error is raised again.
    """
    is_enabled = tell_failure is not None
    with ExitStack() as held:
        if is_enabled:
            held.enter_context(alias.locked())
            held.enter_context(defer_signals())
            alias.repair()
        expected = alias.aliases().get(alias.BASELINE)
        withdrawn = alias.withdrawn()
        barred = frozenset(name for name, version in versions.items() if version in withdrawn)
        decision = decide(result, replayed_name(expected, versions), rules, barred)
        if is_enabled:
            for name in decision.promote:
                logged_models.load(f"models:/{NAME}/{versions[name]}")
        publish(decision)
        moved: tuple[str, ...] = ()
        try:
            for name in decision.promote if is_enabled else ():
                version = str(versions[name])
                evidence = _evidence(name, decision, result, run_id)
                evidence["replaced_version"] = str(expected).lower()
                alias.promote(version, expected, evidence)
                expected, moved = version, (*moved, name)
        except BaseException as error:
            assert tell_failure is not None
            tell_failure(decision, moved, " ".join(str(error).split()) or type(error).__name__)
            raise
    return decision


def replayed_name(version: str | None, versions: Mapping[str, str | None]) -> str | None:
    """Return the name under which a version is replayed, or its number if it is not replayed.

    `versions` as for `promote_winner`. A replay names its baseline by this rule, too: if the two
    names differ, the alias has moved since.
    """
    if version is None:
        return None
    names = (name for name, other in versions.items() if other == version)
    return next(names, f"version {version}")


def tag_measured(result: ShadowResult, versions: Mapping[str, str | None], run_id: str) -> None:
    """Tag every version of the replay with its metrics and the run that measured them.

    Metrics on a query log have the prefix `log_`, those on the frozen test split `shadow_`. An
    unscored candidate keeps its earlier metrics; the tag `<prefix>unscored` says why.
    """
    prefix = LOG if result.is_log else SHADOW
    for outcome in result.outcomes:
        version = versions[outcome.name]
        if version is None:
            continue
        tags = {"unscored": outcome.why_unscored or "none"}
        if outcome.is_scored:
            tags |= measured_tags(outcome, result) | {"run": run_id}
        alias.tag_version(version, {f"{prefix}{key}": text for key, text in tags.items()})


def measured_tags(outcome: Outcome, result: ShadowResult) -> dict[str, str]:
    """Return the metrics of one scored candidate of a replay as tags, without a prefix."""
    place = [one.name for one in result.outcomes].index(outcome.name) + 1
    hits = metric_tags(outcome.figures, outcome.ci95, outcome.corrected, outcome.corrected_ci95)
    return hits | {
        "place": f"{place} of {len(result.outcomes)}",
        "source": result.source,
        "queries": str(result.num_queries),
        "documents": str(result.num_documents),
        "bank_rows": str(result.num_rows),
        "bank_sha256": result.bank_sha256,
        "note": outcome.leak or "none",
    }


def _evidence(name: str, decision: Decision, result: ShadowResult, run_id: str) -> dict[str, str]:
    """Return the evidence for a move of the alias as tags that no later replay overwrites."""
    outcome = result.outcome(name)
    assert outcome is not None
    measured = measured_tags(outcome, result) | {"run": run_id}
    reason = decision.reasons[decision.promote.index(name)]
    return {f"{DECIDED}{key}": text for key, text in measured.items()} | {"reason": reason}


def log_figures(
    candidates: Sequence[Candidate], result: ShadowResult, dataset: Dataset | None
) -> None:
    """Log each candidate's figures with its model; the best comes last, so that the run shows it.

    Figures on a query log have their own names, since they are not those of the test split.
    """
    prefix = "shadow_log" if result.is_log else "shadow"
    model_ids = {one.name: one.model_id for one in candidates}
    for outcome in reversed(result.outcomes):
        if outcome.is_scored:
            figures = {f"{prefix}/{key}": outcome.figures[key] for key in HITS}
            figures |= {f"{prefix}/{outcome.name}/{key}": outcome.figures[key] for key in HITS}
            model_id = model_ids[outcome.name]
            runs.log_metrics(figures, step=1, model_id=model_id, dataset=dataset)


def log_artifacts(result: ShadowResult, decision: Decision, failure: str | None) -> None:
    """Log the report as Markdown, its figures and the per-query table.

    If the promotion failed afterwards, replace the report and the decision.
    """
    text = shadow_markdown(result, decision, tuple(FIGURES), alias.history())
    runs.log_artifact(text if failure is None else f"**{failure}**\n\n{text}", "report.md")
    runs.log_artifact(decision.report() | {"failure": failure}, "decision.json")
    if failure is None:
        for name, draw in FIGURES.items():
            runs.log_artifact(draw(result), name)
        runs.log_artifact(result.per_query, "per_query.parquet")
