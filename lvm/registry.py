"""The registered model `lvm`: its versions with their facts, its alias `baseline`."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from pathlib import Path

import mlflow
import numpy as np
from filelock import FileLock
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from numpy.typing import NDArray
from torch import nn

from lvm.checkpoint import CONFIG, WEIGHTS, load_model, save_model
from lvm.facts import TRAINED, Facts, facts_from_tags
from lvm.models import FREE_MODELS
from lvm.stopping import undisturbed
from lvm.tracking import SQLITE

NAME = "lvm"
BASELINE, PREVIOUS = "baseline", "previous"
BASELINE_URI = f"models:/{NAME}@{BASELINE}"
ARTIFACT = "model"
ROW_CORRECTION = "row_correction.npy"
REQUIREMENTS = (
    *("faiss-cpu", "filelock", "mlflow", "numpy", "pandas", "pyarrow"),
    *("safetensors", "scipy", "torch", "tqdm"),
)
MOVE = "move/"
MAX_REASON = 1000
UNKNOWN_CODES = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True)
class Predictor:
    """A predictor with its facts; what it lacks (not logged, not registered) is None."""

    reference: str
    model: nn.Module
    facts: Facts
    model_id: str | None = None
    run_id: str | None = None
    version: str | None = None
    row_correction: NDArray[np.float32] | None = None


def log_predictor(
    model: nn.Module,
    facts: Facts,
    row_correction: NDArray[np.float32] | None = None,
    step: int = 0,
) -> str:
    """Log a predictor to the active run as safetensors without pickle; return its model id."""
    tensor = np.dtype(np.float32)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(tensor, (-1, -1, facts.dim))]),
        outputs=Schema([TensorSpec(tensor, (-1, facts.dim))]),
        params=ParamSchema([ParamSpec("k", DataType.long, 0)]),
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_model(model, Path(scratch) / ARTIFACT)
        artifacts = {"weights": str(folder / WEIGHTS), "config": str(folder / CONFIG)}
        if row_correction is not None:
            np.save(folder / ROW_CORRECTION, row_correction, allow_pickle=False)
            artifacts["row_correction"] = str(folder / ROW_CORRECTION)
        logged = mlflow.pyfunc.log_model(
            name=ARTIFACT if facts.kind == TRAINED else facts.model,
            python_model=str(Path(__file__).with_name("serving.py")),
            artifacts=artifacts,
            signature=signature,
            input_example=np.eye(2, facts.dim, dtype=tensor)[None],
            pip_requirements=[f"{name}=={_public_version(name)}" for name in REQUIREMENTS],
            metadata=asdict(facts),
            params={"model": facts.model, "ctx": facts.ctx},
            model_type=facts.model,
            step=step,
        )
    return str(logged.model_id)


def register(model_id: str, facts: Facts) -> str:
    """Make a version of `lvm` of the logged model; return its number."""
    client = MlflowClient()
    try:
        client.get_registered_model(NAME)
    except MlflowException as error:
        if error.error_code not in UNKNOWN_CODES:
            raise
        client.create_registered_model(
            NAME, description="Predictors of the next text embedding; see the alias baseline."
        )
    logged = client.get_logged_model(model_id)
    made = client.create_model_version(
        NAME,
        source=f"models:/{model_id}",
        run_id=logged.source_run_id,
        tags={key: str(value) for key, value in asdict(facts).items()},
        model_id=model_id,
    )
    return str(made.version)


def aliases() -> dict[str, str]:
    """Return alias -> version of `lvm`; nothing where no version was ever registered."""
    try:
        return {k: str(v) for k, v in MlflowClient().get_registered_model(NAME).aliases.items()}
    except MlflowException as error:
        if error.error_code not in UNKNOWN_CODES:
            raise
        return {}


def versions() -> dict[str, Facts]:
    """Return version -> facts of every version of `lvm`, the oldest first."""
    found = MlflowClient().search_model_versions(f"name = '{NAME}'", max_results=1000)
    ordered = sorted(found, key=lambda version: int(version.version))
    return {str(version.version): _facts(version) for version in ordered}


def version_of(model_id: str) -> str | None:
    """Return the newest version made of a logged model; None where it was never registered."""
    found = MlflowClient().search_model_versions(f"name = '{NAME}'", max_results=1000)
    numbers = [int(one.version) for one in found if one.source == f"models:/{model_id}"]
    return str(max(numbers)) if numbers else None


def load(reference: str) -> Predictor:
    """Read a predictor that was logged.

    `reference` is models:/lvm@<alias>, models:/lvm/<version>, runs:/<id>/model or models:/m-<id>.
    Raises ValueError, in one line, where there is none.
    """
    version = _resolve_version(reference)
    uri = reference if version is None else f"models:/{version.name}/{version.version}"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=scratch))
            card = Model.load(str(folder))
            facts = Facts(**(card.metadata or {}))
        except (MlflowException, OSError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"model: {reference} cannot be read by lvm: {reason}") from None
        correction = folder / "artifacts" / ROW_CORRECTION
        return Predictor(
            reference=reference,
            model=load_model(folder / "artifacts"),
            facts=facts,
            model_id=str(card.model_id),
            run_id=str(card.run_id),
            version=None if version is None else str(version.version),
            row_correction=np.load(correction) if correction.is_file() else None,
        )


def promote(version: str, expected: str | None, evidence: Mapping[str, str]) -> None:
    """Set the alias `baseline` to `version`, and `previous` to the version that it replaces.

    `expected` is the baseline that the decision was made against. `evidence` becomes tags of the
    version, and with `reason` and `decision_run` a line of the history. Raises ValueError where the
    version is unknown, where it is the baseline already, or where the alias has moved since the
    decision; nothing is changed then.
    """
    with locked():
        now = aliases()
        current = now.get(BASELINE)
        if current != expected:
            raise ValueError(
                f"version: baseline moved from {expected} to {current} meanwhile; decide again"
            )
        if version not in versions():
            known = ", ".join(versions()) or "none"
            raise ValueError(f"version: {NAME} has no version {version!r}; known: {known}")
        if version == current:
            raise ValueError(f"version: {version} is the baseline already")
        with undisturbed():
            tag_version(version, evidence)
            _move(version, now)
            _record(version, current, evidence)


def rollback(evidence: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Swap the aliases `baseline` and `previous`; return the restored and the withdrawn version.

    Raises ValueError where there is no previous baseline.
    """
    with locked():
        now = aliases()
        if BASELINE not in now or PREVIOUS not in now:
            raise ValueError(
                "rollback: no previous baseline is recorded; use the entry point promote"
            )
        with undisturbed():
            _move(now[PREVIOUS], now)
            _record(now[PREVIOUS], now[BASELINE], {"reason": "rolled back", **(evidence or {})})
        return now[PREVIOUS], now[BASELINE]


def tag_version(version: str, tags: Mapping[str, str]) -> None:
    """Set tags on a version of `lvm`."""
    for key, value in tags.items():
        MlflowClient().set_model_version_tag(NAME, version, key, value)


def history() -> list[dict[str, str]]:
    """Return every move of the alias `baseline`, the first one first.

    A move has `at` (UTC), `version`, `replaced` (a version or none), `run`, `reason`. It is kept as
    a tag `move/<number>` of the registered model as well as of the version that took the alias.
    """
    try:
        tags = MlflowClient().get_registered_model(NAME).tags
    except MlflowException as error:
        if error.error_code not in UNKNOWN_CODES:
            raise
        return []
    return [json.loads(tags[key]) for key in sorted(tags) if key.startswith(MOVE)]


def _move(version: str, now: Mapping[str, str]) -> None:
    """Set both aliases, or leave both: where the second fails, the first is put back."""
    client = MlflowClient()
    if BASELINE in now:
        client.set_registered_model_alias(NAME, PREVIOUS, now[BASELINE])
    try:
        client.set_registered_model_alias(NAME, BASELINE, version)
    except BaseException:
        if PREVIOUS in now:
            client.set_registered_model_alias(NAME, PREVIOUS, now[PREVIOUS])
        elif BASELINE in now:
            client.delete_registered_model_alias(NAME, PREVIOUS)
        raise


def _record(version: str, replaced: str | None, evidence: Mapping[str, str]) -> None:
    move = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": version,
        "replaced": replaced or "none",
        "run": evidence.get("decision_run", "none"),
        "reason": evidence.get("reason", "none")[:MAX_REASON],
    }
    key, text = f"{MOVE}{len(history()) + 1:06}", json.dumps(move)
    tag_version(version, {key: text})
    MlflowClient().set_registered_model_tag(NAME, key, text)


def _resolve_version(reference: str) -> ModelVersion | None:
    """Return the registered version that `reference` names; None for a logged model's own URI."""
    name, _, alias = reference.removeprefix("models:/").partition("@")
    client = MlflowClient()
    try:
        if not reference.startswith("models:/"):
            if not reference.startswith("runs:/"):
                raise ValueError(
                    f"model: unknown '{reference}'; give {', '.join(FREE_MODELS)}, "
                    f"{BASELINE_URI}, models:/{NAME}/<version> or runs:/<run id>/{ARTIFACT}"
                )
            return None
        if alias:
            return client.get_model_version_by_alias(name, alias)
        name, _, number = name.partition("/")
        if number == "latest":
            number = max(versions(), key=int, default="")
            if not number:
                raise ValueError(f"model: {reference} does not exist; run train first")
        return client.get_model_version(name, number) if number else None
    except MlflowException as error:
        if error.error_code not in UNKNOWN_CODES:
            raise
        there = ", ".join([*aliases(), *versions()]) or "nothing yet; run train, then shadow-eval"
        raise ValueError(f"model: {reference} does not exist; registered: {there}") from None


def _facts(version: ModelVersion) -> Facts:
    try:
        return facts_from_tags(version.tags)
    except (KeyError, ValueError):
        raise ValueError(
            f"registry: version {version.version} of {NAME} was not registered by lvm; delete it"
        ) from None


def _public_version(package: str) -> str:
    """Return the installed version without a local build label such as +cpu."""
    return installed_version(package).partition("+")[0]


@contextmanager
def locked() -> Iterator[None]:
    """Let one process of this machine decide over the aliases of a store at a time.

    Whoever holds the lock may take it again.
    """
    uri = mlflow.get_registry_uri()
    digest = hashlib.sha256(uri.encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"lvm-registry-{os.getuid()}-{digest}.lock"
    if uri.startswith(SQLITE):
        path = Path(f"{uri.removeprefix(SQLITE)}.registry.lock")
    with FileLock(path, is_singleton=True):
        yield
