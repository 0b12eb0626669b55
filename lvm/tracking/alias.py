"""The alias `baseline` of the registered model: atomic moves, recorded in a history."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from lvm.system.errors import explain_failure
from lvm.system.processes import defer_signals
from lvm.tracking.store import STORE_ERRORS, database_file
from lvm.tracking.versions import (
    DECIDED,
    NAME,
    UNKNOWN_CODES,
    check_version,
    description,
    find_version,
)

BASELINE, PREVIOUS = "baseline", "previous"
BASELINE_URI = f"models:/{NAME}@{BASELINE}"
MOVE, PENDING = "move/", "pending_move"
BY_GATES, BY_HAND, ROLLED_BACK = "decided", "by hand", "rolled back"
MAX_REASON = 1000
FAILURES = (*STORE_ERRORS, OSError)


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
