"""The registered model in MLflow: its versions with their pages, the moves of its alias."""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
from filelock import FileLock
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from tabulate import tabulate

from lvm.models.facts import Facts, facts_from_tags
from lvm.system.errors import explain_failure
from lvm.system.processes import defer_signals
from lvm.tracking.store import STORE_ERRORS, database_file

NAME, ARTIFACT = "lvm", "model"  # of the registered model; of a trained model in its run
BASELINE, PREVIOUS = "baseline", "previous"
BASELINE_URI = f"models:/{NAME}@{BASELINE}"
MOVE, PENDING = "move/", "pending_move"
BY_GATES, BY_HAND, ROLLED_BACK = "decided", "by hand", "rolled back"
LOST = "lost/"  # <baseline version>/<queries>: the run in which a version lost to the baseline
MAX_REASON = 1000
FAILURES = (*STORE_ERRORS, OSError)
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
    """What is known of a predictor without its weights; None where it has no version.

    `val_hit_at_5` is that of the corrected order as it was registered; NaN if none was.
    """

    reference: str
    facts: Facts
    model_id: str | None = None
    run_id: str | None = None
    version: str | None = None
    val_hit_at_5: float = math.nan


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
    verdict = tags.get(f"{prefix}verdict")
    return (
        f"{MEASUREMENTS[prefix].capitalize()}: place {place} on {queries} queries from "
        f"{documents} documents ({source}), {link}" + (f"; {verdict}" if verdict else "")
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
    own = (model_id, str(version.run_id), str(version.version))
    return Card(reference, facts, *own, _val_hit_at_5(version.tags))


def _val_hit_at_5(tags: Mapping[str, str]) -> float:
    try:
        return float(tags[f"{VAL}{CORRECTED}"].partition(" ")[0])
    except (KeyError, ValueError):  # "none" of a predictor without row correction
        return math.nan


def _all_versions() -> list[ModelVersion]:
    client, query = MlflowClient(), f"name = '{NAME}'"
    page = client.search_model_versions(query, max_results=PAGE_SIZE)
    found = list(page)
    while page.token:
        page = client.search_model_versions(query, max_results=PAGE_SIZE, page_token=page.token)
        found += page
    return sorted(found, key=lambda version: int(version.version))


def aliases() -> dict[str, str]:
    """Return the version of each alias of `lvm`; empty if no version was ever registered."""
    try:
        return {k: str(v) for k, v in MlflowClient().get_registered_model(NAME).aliases.items()}
    except MlflowException as error:
        if error.error_code not in UNKNOWN_CODES:
            raise
        return {}


def promote(
    version: str, expected: str | None, evidence: Mapping[str, str], how: str = BY_GATES
) -> None:
    """Set the alias `baseline` to `version`, and `previous` to the version that it replaces.

    `expected` is the baseline that the decision was made against. `evidence` replaces the tags of
    an earlier decision on the version; its `reason` and `decision_run` are recorded with `how` in
    the history. Raises ValueError, and changes nothing, if the version is unknown, if it is the
    baseline already, or if the alias has moved since the decision.
    """
    with locked(), defer_signals():
        repair()
        now = aliases()
        current = now.get(BASELINE)
        if current != expected:
            raise ValueError(
                f"version: baseline moved from {expected} to {current} meanwhile; decide again"
            )
        version = check_version(version)
        if version == current:
            raise ValueError(f"version: {version} is the baseline already")
        _move(version, now, evidence, how)


def rollback(evidence: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Swap the aliases `baseline` and `previous`; return the restored and the withdrawn version.

    Raises ValueError if there is no previous baseline.
    """
    with locked(), defer_signals():
        repair()
        now = aliases()
        if BASELINE not in now or PREVIOUS not in now:
            raise ValueError(
                "rollback: no previous baseline is recorded; use the entry point promote"
            )
        if now[PREVIOUS] == now[BASELINE]:
            known = [one["replaced"] for one in history() if one["version"] == now[BASELINE]]
            raise ValueError(
                f"rollback: previous and baseline are both version {now[BASELINE]}; the history "
                f"says it replaced version {known[-1] if known else 'none'}: use promote"
            )
        told = {"reason": "rolled back", **(evidence or {})}
        _move(now[PREVIOUS], now, told, ROLLED_BACK)
        return now[PREVIOUS], now[BASELINE]


def tag_version(version: str, tags: Mapping[str, str]) -> None:
    """Set tags on a version of `lvm`, and update its description, which is made of them.

    The lock keeps two replays that end at the same time from mixing their figures.
    """
    client = MlflowClient()
    with locked():
        for key, value in tags.items():
            client.set_model_version_tag(NAME, version, key, value)
        known = client.get_model_version(NAME, version).tags
        client.update_model_version(NAME, version, description=description(known))


def losses(baseline: str, queries_sha256: str) -> dict[str, str]:
    """Return version -> run of the versions that lost to this baseline on these queries."""
    key = _loss_key(baseline, queries_sha256)
    return {str(one.version): one.tags[key] for one in _all_versions() if key in one.tags}


def record_loss(version: str, baseline: str, queries_sha256: str, run: str) -> None:
    """Record that a version lost to this baseline on these queries in a decision."""
    tag_version(version, {_loss_key(baseline, queries_sha256): run})


def _loss_key(baseline: str, queries_sha256: str) -> str:
    return f"{LOST}{baseline}/{queries_sha256[:16]}"


def history() -> list[dict[str, str]]:
    """Return every move of the alias `baseline`, oldest first.

    A move has `at` (UTC), `version`, `replaced` (a version or none), `run`, `reason`, `how`
    (BY_GATES, BY_HAND or ROLLED_BACK). It is stored as a tag `move/<time>-<run>` of the registered
    model as well as of the version that took the alias.
    """
    tags = _tags()
    return [json.loads(tags[key]) for key in sorted(tags) if key.startswith(MOVE)]


def withdrawn() -> set[str]:
    """Return the versions that lost the alias in a rollback and were not promoted by hand since."""
    found: set[str] = set()
    for move in history():
        how = move.get("how", BY_GATES)
        if how == ROLLED_BACK:
            found.add(move["replaced"])
        if how != BY_GATES:
            found.discard(move["version"])
    return found


def repair() -> None:
    """Finish or undo an interrupted move; call this under the lock.

    A move first writes its plan as the tag `pending_move`, so that the state is known if the
    process is killed at any point.
    """
    pending = _tags().get(PENDING)
    if pending is None:
        return
    planned = json.loads(pending)
    if aliases().get(BASELINE) == planned["move"]["version"]:
        _record(planned)
    else:
        _set_previous(planned["previous"])
    MlflowClient().delete_registered_model_tag(NAME, PENDING)


def _move(version: str, now: Mapping[str, str], evidence: Mapping[str, str], how: str) -> None:
    """Set both aliases or neither: if the second fails, the first is restored.

    If only the record fails, the move stands, and the next `repair` writes the record.
    """
    client, at = MlflowClient(), datetime.now(UTC)
    move = {
        "at": at.isoformat(timespec="seconds"),
        "version": version,
        "replaced": now.get(BASELINE, "none"),
        "run": evidence.get("decision_run", "none"),
        "reason": evidence.get("reason", "none")[:MAX_REASON],
        "how": how,
    }
    key = f"{MOVE}{at:%Y%m%dT%H%M%S.%f}-{move['run'][:8]}"
    tags = {} if how == ROLLED_BACK else dict(evidence)
    planned = {"key": key, "move": move, "previous": now.get(PREVIOUS), "tags": tags}
    client.set_registered_model_tag(NAME, PENDING, json.dumps(planned))
    try:
        if BASELINE in now:
            client.set_registered_model_alias(NAME, PREVIOUS, now[BASELINE])
        client.set_registered_model_alias(NAME, BASELINE, version)
    except FAILURES:  # the move may have succeeded although its response was lost
        if aliases().get(BASELINE) != version:
            repair()
            raise
    found = aliases().get(BASELINE)
    if found != version:
        client.delete_registered_model_tag(NAME, PENDING)
        raise ValueError(
            f"version: another user set baseline to version {found} at the same moment as this to "
            f"{version}; look at the history, then decide again"
        )
    try:
        repair()
    except FAILURES as error:
        reason = explain_failure(error)
        print(
            f"version {version} is the baseline; its history follows with the next move: {reason}"
        )


def _record(planned: Mapping[str, Any]) -> None:
    version, text = planned["move"]["version"], json.dumps(planned["move"])
    tags = planned.get("tags", {})
    if tags:  # a rollback has none: the evidence of the earlier decision holds again
        _drop_evidence(version, kept=tags)
    tag_version(version, tags | {planned["key"]: text})
    MlflowClient().set_registered_model_tag(NAME, planned["key"], text)


def _drop_evidence(version: str, kept: Mapping[str, str]) -> None:
    """Delete the tags of an earlier decision on a version: a move by hand has no figures."""
    client = MlflowClient()
    for key in client.get_model_version(NAME, version).tags:
        if key.startswith(DECIDED) and key not in kept:
            client.delete_model_version_tag(NAME, version, key)


def _set_previous(version: str | None) -> None:
    """Restore `previous` to `version`; delete the alias if that version no longer exists."""
    if version is not None and find_version(version) is not None:
        MlflowClient().set_registered_model_alias(NAME, PREVIOUS, version)
    elif PREVIOUS in aliases():
        MlflowClient().delete_registered_model_alias(NAME, PREVIOUS)


def _tags() -> dict[str, str]:
    try:
        return dict(MlflowClient().get_registered_model(NAME).tags)
    except MlflowException as error:
        if error.error_code not in UNKNOWN_CODES:
            raise
        return {}


@contextmanager
def locked() -> Iterator[None]:
    """Hold the lock of a store's aliases: one process of this user on this machine at a time.

    The lock is reentrant. Users of a tracking server on other machines are not locked out; a move
    detects that another user moved the alias.
    """
    uri = mlflow.get_registry_uri()
    database = database_file(uri)
    if database is not None:
        path = Path(f"{database}.registry.lock")
    else:
        digest = hashlib.sha256(uri.encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"lvm-registry-{os.getuid()}-{digest}.lock"
    with FileLock(path, is_singleton=True):
        yield
