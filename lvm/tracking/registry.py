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
from typing import TYPE_CHECKING, Any

import mlflow
from filelock import FileLock
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from tabulate import tabulate

from lvm.models.facts import OWN_COUNTED, Facts, facts_from_tags, omits_own_document
from lvm.system.errors import explain_failure
from lvm.system.processes import defer_signals
from lvm.system.progress import part
from lvm.tracking.store import STORE_ERRORS, database_file

if TYPE_CHECKING:  # promote and rollback need no bank
    from lvm.bank.bank import Bank

NAME, ARTIFACT = "lvm", "model"  # of the registered model; of a trained model in its run
BASELINE, PREVIOUS = "baseline", "previous"
BASELINE_URI = f"models:/{NAME}@{BASELINE}"  # the default model; of another registry, its own
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

    `version` is one of the registered model `registry`; `val_hit_at_5` that of the corrected order,
    as it was registered, NaN if none was.
    """

    reference: str
    facts: Facts
    model_id: str | None = None
    run_id: str | None = None
    version: str | None = None
    registry: str | None = None
    val_hit_at_5: float = math.nan


@dataclass(frozen=True)
class Registry:
    """One registered model: the versions of one bank's predictors, of which aliases name two."""

    name: str = NAME

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(
                f"registry: {self.name!r} is not a name; use letters, digits, '_', '.' and '-'"
            )

    def uri(self, version: str) -> str:
        """Return the URI of a version."""
        return f"models:/{self.name}/{version}"

    @property
    def baseline_uri(self) -> str:
        """Return the URI of the version that has the alias `baseline`."""
        return f"models:/{self.name}@{BASELINE}"

    def name_for(self, bank: "Bank") -> str:
        """Return this name, or a free one if all versions here are of other banks.

        Versions of a bank that `bank` extends count as its own.
        """
        found = {card.facts.bank_sha256 for card in self.cards()}
        if not found or found & {bank.sha256, *bank.bases}:
            return self.name
        own = bank.path.stem
        return own if re.fullmatch(r"[\w.-]+", own) and own != self.name else f"{self.name}-2"

    def check_bank(self, bank: "Bank") -> None:
        """Raise ValueError if all versions are of other banks, none of which `bank` extends."""
        other = self.name_for(bank)
        if other == self.name:
            return
        theirs = self.cards()[-1].facts
        raise ValueError(
            f"registry: {self.name} holds versions of bank {theirs.bank} "
            f"({theirs.bank_sha256[:12]}), not of {bank.path} ({bank.sha256[:12]}); give this bank "
            f"a registry of its own, such as registry={other}"
        )

    @part("register")
    def register(
        self, model_id: str, facts: Facts, metrics: Mapping[str, str] | None = None
    ) -> str:
        """Make a version of this registry of the logged model; return its number.

        `metrics` are its `metric_tags` on val.
        """
        tags = {key: str(value) for key, value in asdict(facts).items()}
        tags |= {f"{VAL}{key}": text for key, text in (metrics or {}).items()}
        client = MlflowClient()
        try:
            client.create_registered_model(
                self.name,
                description="Predictors of the next text embedding; see the alias baseline.",
            )
        except MlflowException as error:
            if error.error_code != EXISTS_CODE:
                raise
        logged = client.get_logged_model(model_id)
        made = client.create_model_version(
            self.name,
            source=f"models:/{model_id}",
            run_id=logged.source_run_id,
            tags=tags,
            description=description(tags),
            model_id=model_id,
        )
        return str(made.version)

    def cards(self) -> list[Card]:
        """Return every readable version of this registry, the oldest first."""
        return [one for one in map(self._card, self._all_versions()) if isinstance(one, Card)]

    def versions(self) -> dict[str, Facts]:
        """Return version -> facts of every readable version of this registry, the oldest first."""
        return {str(card.version): card.facts for card in self.cards()}

    def unreadable_versions(self) -> dict[str, str]:
        """Return version -> reason of the versions whose tags are not the facts of a predictor."""
        found = {str(one.version): self._card(one) for one in self._all_versions()}
        return {version: one for version, one in found.items() if isinstance(one, str)}

    def version_of(self, model_id: str) -> str | None:
        """Return the newest version made of a logged model; None if it was never registered."""
        return next(
            (one.version for one in reversed(self.cards()) if one.model_id == model_id), None
        )

    def check_version(self, version: str) -> str:
        """Return the number of a version as MLflow writes it (it reads 01 as 1).

        Raises ValueError if this registry has no such version.
        """
        number = self.find_version(version)
        if number is None:
            found = MlflowClient().search_model_versions(f"name = '{self.name}'")
            known = ", ".join(sorted((str(one.version) for one in found), key=int)) or "none"
            raise ValueError(f"version: {self.name} has no version {version!r}; known: {known}")
        return number

    def find_version(self, version: str) -> str | None:
        """Return the number of a version as MLflow writes it; None if there is no such version."""
        try:
            return str(MlflowClient().get_model_version(self.name, version).version)
        except MlflowException as error:
            if error.error_code not in UNKNOWN_CODES:
                raise
            return None

    def _card(self, version: ModelVersion) -> Card | str:
        """Return the card of a version, or the reason why its tags are no facts."""
        try:
            facts = facts_from_tags(version.tags)
        except (KeyError, ValueError) as error:
            kind = type(error).__name__
            return f"its tags are not those of a predictor of this lvm ({kind}: {error})"
        reference = self.uri(version.version)
        model_id = str(version.source).removeprefix("models:/")
        own = (model_id, str(version.run_id), str(version.version))
        return Card(reference, facts, *own, self.name, _val_hit_at_5(version.tags))

    def _all_versions(self) -> list[ModelVersion]:
        client, query = MlflowClient(), f"name = '{self.name}'"
        page = client.search_model_versions(query, max_results=PAGE_SIZE)
        found = list(page)
        while page.token:
            page = client.search_model_versions(query, max_results=PAGE_SIZE, page_token=page.token)
            found += page
        return sorted(found, key=lambda version: int(version.version))

    def aliases(self) -> dict[str, str]:
        """Return the version of each alias; empty if no version was ever registered."""
        found = self._registered()
        return {} if found is None else {k: str(v) for k, v in found.aliases.items()}

    def promote(
        self, version: str, expected: str | None, evidence: Mapping[str, str], how: str = BY_GATES
    ) -> None:
        """Set the alias `baseline` to `version`, and `previous` to the version that it replaces.

        `expected` is the baseline that the decision was made against. `evidence` replaces the tags
        of an earlier decision on the version; its `reason` and `decision_run` are recorded with
        `how` in the history. Raises ValueError, and changes nothing, if the version is unknown, if
        it is the baseline already, or if the alias has moved since the decision.
        """
        with locked(), defer_signals():
            self.repair()
            now = self.aliases()
            current = now.get(BASELINE)
            if current != expected:
                raise ValueError(
                    f"version: baseline moved from {expected} to {current} meanwhile; decide again"
                )
            version = self.check_version(version)
            if version == current:
                raise ValueError(f"version: {version} is the baseline already")
            self._move(version, now, evidence, how)

    def rollback(self, evidence: Mapping[str, str] | None = None) -> tuple[str, str]:
        """Swap the aliases `baseline` and `previous`.

        Returns the restored and the withdrawn version. Raises ValueError if there is no previous
        baseline.
        """
        with locked(), defer_signals():
            self.repair()
            now = self.aliases()
            if BASELINE not in now or PREVIOUS not in now:
                raise ValueError(
                    "rollback: no previous baseline is recorded; use the entry point promote"
                )
            if now[PREVIOUS] == now[BASELINE]:
                known = [
                    one["replaced"] for one in self.history() if one["version"] == now[BASELINE]
                ]
                raise ValueError(
                    f"rollback: previous and baseline are both version {now[BASELINE]}; the "
                    f"history says it replaced version {known[-1] if known else 'none'}: use "
                    "promote"
                )
            evidence = {"reason": "rolled back", **(evidence or {})}
            self._move(now[PREVIOUS], now, evidence, ROLLED_BACK)
            return now[PREVIOUS], now[BASELINE]

    def tag_version(self, version: str, tags: Mapping[str, str]) -> None:
        """Set tags on a version, and update its description, which is made of them.

        The lock keeps two replays that end at the same time from mixing their figures.
        """
        client = MlflowClient()
        with locked():
            for key, value in tags.items():
                client.set_model_version_tag(self.name, version, key, value)
            known = client.get_model_version(self.name, version).tags
            client.update_model_version(self.name, version, description=description(known))

    def losses(self, baseline: str, queries_sha256: str) -> dict[str, str]:
        """Return version -> run of the versions that lost to this baseline on these queries."""
        key = _loss_key(baseline, queries_sha256)
        return {str(one.version): one.tags[key] for one in self._all_versions() if key in one.tags}

    def record_loss(self, version: str, baseline: str, queries_sha256: str, run: str) -> None:
        """Record that a version lost to this baseline on these queries in a decision."""
        self.tag_version(version, {_loss_key(baseline, queries_sha256): run})

    def history(self) -> list[dict[str, str]]:
        """Return every move of the alias `baseline`, oldest first.

        A move has `at` (UTC), `version`, `replaced` (a version or none), `run`, `reason`, `how`
        (BY_GATES, BY_HAND or ROLLED_BACK). It is stored as a tag `move/<time>-<run>` of the
        registered model as well as of the version that took the alias.
        """
        tags = self._tags()
        return [json.loads(tags[key]) for key in sorted(tags) if key.startswith(MOVE)]

    def withdrawn(self) -> set[str]:
        """Return the versions that a rollback took the alias from; not those promoted since."""
        found: set[str] = set()
        for move in self.history():
            how = move.get("how", BY_GATES)
            if how == ROLLED_BACK:
                found.add(move["replaced"])
            if how != BY_GATES:
                found.discard(move["version"])
        return found

    def repair(self) -> None:
        """Finish or undo an interrupted move; call this under the lock.

        A move first writes its plan as the tag `pending_move`, so that the state is known if the
        process is killed at any point.
        """
        pending = self._tags().get(PENDING)
        if pending is None:
            return
        planned = json.loads(pending)
        if self.aliases().get(BASELINE) == planned["move"]["version"]:
            self._record(planned)
        else:
            self._set_previous(planned["previous"])
        MlflowClient().delete_registered_model_tag(self.name, PENDING)

    def _move(
        self, version: str, now: Mapping[str, str], evidence: Mapping[str, str], how: str
    ) -> None:
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
        client.set_registered_model_tag(self.name, PENDING, json.dumps(planned))
        try:
            if BASELINE in now:
                client.set_registered_model_alias(self.name, PREVIOUS, now[BASELINE])
            client.set_registered_model_alias(self.name, BASELINE, version)
        except FAILURES:  # the move may have succeeded although its response was lost
            if self.aliases().get(BASELINE) != version:
                self.repair()
                raise
        found = self.aliases().get(BASELINE)
        if found != version:
            client.delete_registered_model_tag(self.name, PENDING)
            raise ValueError(
                f"version: another user set baseline to version {found} at the same moment as this "
                f"to {version}; look at the history, then decide again"
            )
        try:
            self.repair()
        except FAILURES as error:
            reason = explain_failure(error)
            print(
                f"version {version} is the baseline; its history follows with the next move: "
                f"{reason}"
            )

    def _record(self, planned: Mapping[str, Any]) -> None:
        version, text = planned["move"]["version"], json.dumps(planned["move"])
        tags = planned.get("tags", {})
        if tags:  # a rollback has none: the evidence of the earlier decision holds again
            self._drop_evidence(version, kept=tags)
        self.tag_version(version, tags | {planned["key"]: text})
        MlflowClient().set_registered_model_tag(self.name, planned["key"], text)

    def _drop_evidence(self, version: str, kept: Mapping[str, str]) -> None:
        """Delete the tags of an earlier decision on a version: a move by hand has no figures."""
        client = MlflowClient()
        for key in client.get_model_version(self.name, version).tags:
            if key.startswith(DECIDED) and key not in kept:
                client.delete_model_version_tag(self.name, version, key)

    def _set_previous(self, version: str | None) -> None:
        """Restore `previous` to `version`; delete the alias if that version no longer exists."""
        if version is not None and self.find_version(version) is not None:
            MlflowClient().set_registered_model_alias(self.name, PREVIOUS, version)
        elif PREVIOUS in self.aliases():
            MlflowClient().delete_registered_model_alias(self.name, PREVIOUS)

    def _tags(self) -> dict[str, str]:
        found = self._registered()
        return {} if found is None else dict(found.tags)

    def _registered(self) -> RegisteredModel | None:
        try:
            return MlflowClient().get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code not in UNKNOWN_CODES:
                raise
            return None


DEFAULT = Registry()


def _val_hit_at_5(tags: Mapping[str, str]) -> float:
    try:
        return float(tags[f"{VAL}{CORRECTED}"].partition(" ")[0])
    except (KeyError, ValueError):  # "none" of a predictor without row correction
        return math.nan


def _loss_key(baseline: str, queries_sha256: str) -> str:
    return f"{LOST}{baseline}/{queries_sha256[:16]}"


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
