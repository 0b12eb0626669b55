"""Settlement of a replay: the decision against the alias as it is now, carried out or kept."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

from lvm import registry
from lvm.comparison import Outcome, ShadowResult
from lvm.promotion import Decision, decide
from lvm.registry import BASELINE
from lvm.rules import GateRules


def settle(
    result: ShadowResult,
    versions: Mapping[str, str | None],
    rules: GateRules,
    run_id: str,
    publish: Callable[[Decision], None],
    is_enabled: bool,
) -> Decision:
    """Decide, publish, then move the alias where `is_enabled`; return the decision.

    `versions` gives the version of each candidate by its name. The alias is read anew under the
    registry's lock, which is held to the end: of two settlements at one moment the second decides
    after the first, and keeps what it finds. `publish` comes before any change, so that a move
    without a report cannot happen.
    """
    with registry.locked() if is_enabled else nullcontext():
        expected = registry.aliases().get(BASELINE)
        decision = decide(result, _name_of(expected, versions), rules)
        publish(decision)
        for name in decision.promote if is_enabled else ():
            version, outcome = versions[name], result.outcome(name)
            assert version is not None and outcome is not None
            evidence = measured_tags(outcome, result, run_id) | {
                "replaced_version": str(expected).lower(),
                "reason": decision.reasons[decision.promote.index(name)],
            }
            registry.promote(version, expected, evidence)
            expected = version
    return decision


def tag_measured(result: ShadowResult, versions: Mapping[str, str | None], run_id: str) -> None:
    """Tag every version of the replay with its figures and the run that measured them."""
    for outcome in result.outcomes:
        version = versions[outcome.name]
        if version is not None:
            registry.tag_version(version, measured_tags(outcome, result, run_id))


def measured_tags(outcome: Outcome, result: ShadowResult, run_id: str) -> dict[str, str]:
    """Return what one candidate showed in a replay as tags."""
    place = [one.name for one in result.outcomes].index(outcome.name) + 1
    hit = {f"shadow_{key}": _cell(outcome.figures, outcome.ci95, key) for key in _TAGGED}
    hit["shadow_corrected_hit_at_5"] = _cell(outcome.corrected, outcome.corrected_ci95, "hit_at_5")
    return hit | {
        "decision_run": run_id,
        "shadow_place": f"{place} of {len(result.outcomes)}",
        "shadow_queries": str(result.num_queries),
        "shadow_documents": str(result.num_documents),
        "shadow_bank_rows": str(result.num_rows),
        "shadow_bank_sha256": result.bank_sha256,
        "shadow_note": outcome.why_unscored or outcome.leak or "none",
    }


_TAGGED = ("hit_at_1", "hit_at_5", "hit_at_10", "mrr_at_10")


def _cell(figures: Mapping[str, float], ci95: Mapping[str, list[float]], key: str) -> str:
    if key not in figures:
        return "none"
    low, high = ci95[key]
    return f"{figures[key]:.4f} [{low:.4f}, {high:.4f}]"


def _name_of(version: str | None, versions: Mapping[str, str | None]) -> str | None:
    """Return the name under which a version was replayed, or its number where it was not."""
    if version is None:
        return None
    names = (name for name, other in versions.items() if other == version)
    return next(names, f"version {version}")
