"""The versions of the registered model: made of logged models, listed, described on their pages."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from tabulate import tabulate

from lvm.models.facts import OWN_COUNTED, Facts, facts_from_tags, omits_own_document
from lvm.system.progress import part

NAME, ARTIFACT = "lvm", "model"  # of the registered model; of a trained model in its run
UNKNOWN_CODES = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
EXISTS_CODE = "RESOURCE_ALREADY_EXISTS"
PAGE_SIZE = 500
METRICS = {"hit_at_1": "Hit@1", "hit_at_5": "Hit@5", "hit_at_10": "Hit@10", "mrr_at_10": "MRR@10"}
CORRECTED = "corrected_hit_at_5"
# Prefixes of a version's tags, each of one kind of measurement.
VAL, SHADOW, LOG, DECIDED = "val_", "shadow_", "log_", "decision_"
MEASUREMENTS = {
    VAL: "val queries, end of training",
    SHADOW: "test queries, latest shadow-eval",
    LOG: "query log, latest shadow-eval",
    DECIDED: "the decision that gave it the alias",
}
LEAKY_NOTE = "LEAKY: training saw rows of these queries; no figure here is evidence."
SPACE = "&ensp;"  # the tables of MLflow's pages have no space between their cells
Intervals = Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Card:
    """What is known of a predictor without its weights; None where it has no version."""

    reference: str
    facts: Facts
    model_id: str | None = None
    run_id: str | None = None
    version: str | None = None


@part("register")
def register(model_id: str, facts: Facts, metrics: Mapping[str, str] | None = None) -> str:
    """Make a version of `lvm` of the logged model; return its number.

    `metrics` are its `metric_tags` on val.
    """
    tags = {key: str(value) for key, value in asdict(facts).items()}
    tags |= {f"{VAL}{key}": text for key, text in (metrics or {}).items()}
    client = MlflowClient()
    try:
        client.create_registered_model(
            NAME, description="Predictors of the next text embedding; see the alias baseline."
        )
    except MlflowException as error:
        if error.error_code != EXISTS_CODE:
            raise
    logged = client.get_logged_model(model_id)
    made = client.create_model_version(
        NAME,
        source=f"models:/{model_id}",
        run_id=logged.source_run_id,
        tags=tags,
        description=description(tags),
        model_id=model_id,
    )
    return str(made.version)


def cards() -> list[Card]:
    """Return every readable version of `lvm`, the oldest first."""
    return [one for one in map(_card, _all_versions()) if isinstance(one, Card)]


def versions() -> dict[str, Facts]:
    """Return version -> facts of every readable version of `lvm`, the oldest first."""
    return {str(card.version): card.facts for card in cards()}


def unreadable_versions() -> dict[str, str]:
    """Return version -> reason of the versions whose tags are not the facts of a predictor."""
    found = {str(one.version): _card(one) for one in _all_versions()}
    return {version: one for version, one in found.items() if isinstance(one, str)}


def version_of(model_id: str) -> str | None:
    """Return the newest version made of a logged model; None if it was never registered."""
    return next((one.version for one in reversed(cards()) if one.model_id == model_id), None)


def check_version(version: str) -> str:
    """Return the number of a version as MLflow writes it (it reads 01 as 1).

    Raises ValueError if `lvm` has no such version.
    """
    number = find_version(version)
    if number is None:
        found = MlflowClient().search_model_versions(f"name = '{NAME}'")
        known = ", ".join(sorted((str(one.version) for one in found), key=int)) or "none"
        raise ValueError(f"version: {NAME} has no version {version!r}; known: {known}")
    return number


def find_version(version: str) -> str | None:
    """Return the number of a version as MLflow writes it; None if `lvm` has no such version."""
    try:
        return str(MlflowClient().get_model_version(NAME, version).version)
    except MlflowException as error:
        if error.error_code not in UNKNOWN_CODES:
            raise
        return None


def metric_tags(
    metrics: Mapping[str, float],
    ci95: Intervals,
    corrected: Mapping[str, float],
    corrected_ci95: Intervals,
) -> dict[str, str]:
    """Return one measurement as tags without a prefix: `fraction [low, high]`.

    They have nine digits, so that a page that rounds them shows what other tables show.
    """
    plain = {key: _interval(metrics, ci95, key) for key in METRICS}
    return plain | {CORRECTED: _interval(corrected, corrected_ci95, "hit_at_5")}


def description(tags: Mapping[str, str]) -> str:
    """Return the Markdown description of the version that has these tags."""
    named = {name: tags.get(name, "none") for name in ("phase", "recipe", "ctx", "bank", "split")}
    bank = f"{named['bank']} ({tags.get('bank_sha256', '')[:12]})"
    head = f"{tags.get('model')} ({tags.get('kind')}), ctx {named['ctx']}, recipe {named['recipe']}"
    blocks = [f"{head}, phase {named['phase']}; bank {bank}, split by {named['split']}"]
    if tags.get("leaky") == "True":
        blocks.append(f"**{LEAKY_NOTE}**")
    measured = {p: what for p, what in MEASUREMENTS.items() if f"{p}hit_at_5" in tags}
    if measured:
        lines = [
            [what, *(SPACE + _percent(tags[prefix + key]) for key in (*METRICS, CORRECTED))]
            for prefix, what in measured.items()
        ]
        headers = ["", *(SPACE + name for name in (*METRICS.values(), "corrected Hit@5"))]
        columns = ["left"] + ["right"] * (len(headers) - 1)
        body = tabulate(lines, headers, "pipe", colalign=columns, disable_numparse=True)
        blocks.append(f"% of the queries [95 % interval by document]\n\n{body}")
        if not omits_own_document(int(tags.get("fit_version", 0))):
            blocks.append(f"Corrected as logged, by the older definition: {OWN_COUNTED}.")
    blocks += [_origin(tags, prefix) for prefix in (SHADOW, LOG, DECIDED) if f"{prefix}run" in tags]
    return "\n\n".join(blocks)


def _origin(tags: Mapping[str, str], prefix: str) -> str:
    """Return the sentence that says which run measured or decided."""
    run = tags[f"{prefix}run"]
    link = f"[run {run[:8]}](#/runs/{run})"
    if prefix == DECIDED and "reason" in tags:
        return f"Took the alias by {link}: {tags['reason']}"
    keys = ("place", "queries", "documents", "source")
    place, queries, documents, source = (tags.get(prefix + key, "unknown") for key in keys)
    return (
        f"{MEASUREMENTS[prefix].capitalize()}: place {place} on {queries} queries from "
        f"{documents} documents ({source}), {link}"
    )


def _percent(text: str) -> str:
    """Write each fraction of a tag in percent with one digit."""
    return re.sub(r"\d[\d.]*(?:e-\d+)?", lambda number: f"{100 * float(number[0]):.1f}", text)


def _interval(metrics: Mapping[str, float], ci95: Intervals, key: str) -> str:
    if key not in metrics:
        return "none"
    low, high = ci95[key]
    value = f"{metrics[key]:.9g}"
    return (
        f"{value} [unknown]" if low is None or high is None else f"{value} [{low:.9g}, {high:.9g}]"
    )


def _card(version: ModelVersion) -> Card | str:
    """Return the card of a version, or the reason why its tags are no facts."""
    try:
        facts = facts_from_tags(version.tags)
    except (KeyError, ValueError) as error:
        return (
            f"its tags are not those of a predictor of this lvm ({type(error).__name__}: {error})"
        )
    reference = f"models:/{NAME}/{version.version}"
    model_id = str(version.source).removeprefix("models:/")
    return Card(reference, facts, model_id, str(version.run_id), str(version.version))


def _all_versions() -> list[ModelVersion]:
    client, query = MlflowClient(), f"name = '{NAME}'"
    page = client.search_model_versions(query, max_results=PAGE_SIZE)
    found = list(page)
    while page.token:
        page = client.search_model_versions(query, max_results=PAGE_SIZE, page_token=page.token)
        found += page
    return sorted(found, key=lambda version: int(version.version))
