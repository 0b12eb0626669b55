"""Settlement of a replay: the decision against the alias as it is now, carried out or kept."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from lvm.shadow.comparison import Outcome, ShadowResult
from lvm.shadow.decision import Decision, decide
from lvm.system.processes import defer_signals
from lvm.system.thresholds import GateRules
from lvm.tracking import alias
from lvm.tracking import versions as registered
from lvm.tracking.alias import BASELINE
from lvm.tracking.page import DECIDED, LOG, SHADOW, figure_tags

Publish = Callable[[Decision], None]
TellFailure = Callable[[Decision, tuple[str, ...], str], None]


def settle(
    result: ShadowResult,
    versions: Mapping[str, str | None],
    rules: GateRules,
    run_id: str,
    publish: Publish,
    tell_failure: TellFailure | None,
) -> Decision:
    """Decide, publish, then move the alias; return the decision. A dry run has no `tell_failure`.

    `versions` gives the version of each candidate by its name. The alias is read anew under the
    registry's lock, which is held to the end: of two settlements at one moment the second decides
    after the first, and keeps what it finds. Versions to promote are read whole, then `publish` is
    called, then the alias moves, so that a move without a report cannot happen; stop signals wait.
    Where a move fails, `tell_failure` is given the names that did take the alias, and why the next
    one did not, so that the report can say so; the error goes on.
    """
    is_enabled = tell_failure is not None
    with ExitStack() as held:
        if is_enabled:
            held.enter_context(alias.locked())
            held.enter_context(defer_signals())
            alias.repair()
        expected = alias.aliases().get(BASELINE)
        withdrawn = alias.withdrawn()
        barred = frozenset(name for name, version in versions.items() if version in withdrawn)
        decision = decide(result, replayed_name(expected, versions), rules, barred)
        if is_enabled:
            for name in decision.promote:
                registered.load(f"models:/{alias.NAME}/{versions[name]}")
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
    """Return the name under which a version is replayed, or its number where it takes no part.

    `versions` as `settle` has them. A replay names its baseline by this too: where the two names
    differ, the alias has moved.
    """
    if version is None:
        return None
    names = (name for name, other in versions.items() if other == version)
    return next(names, f"version {version}")


def tag_measured(result: ShadowResult, versions: Mapping[str, str | None], run_id: str) -> None:
    """Tag every version of the replay with its figures and the run that measured them.

    Figures on a query log have the prefix `log_`, those on the frozen test split `shadow_`. What
    was not scored keeps the figures it has; its reason is the tag `<prefix>unscored`.
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
    """Return what one scored candidate showed in a replay as tags, without a prefix."""
    place = [one.name for one in result.outcomes].index(outcome.name) + 1
    hits = figure_tags(outcome.figures, outcome.ci95, outcome.corrected, outcome.corrected_ci95)
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
    """Return by what a version takes the alias, under names that no later replay writes to."""
    outcome = result.outcome(name)
    assert outcome is not None
    measured = measured_tags(outcome, result) | {"run": run_id}
    reason = decision.reasons[decision.promote.index(name)]
    return {f"{DECIDED}{key}": text for key, text in measured.items()} | {"reason": reason}
