"""The registered model `lvm`: its versions with their facts, their files."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version as installed_version
from pathlib import Path

import mlflow
import numpy as np
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from numpy.typing import NDArray
from torch import nn

from lvm.bank.archive import map_array
from lvm.models.facts import TRAINED, Facts, facts_from_tags
from lvm.models.table import FREE_MODELS
from lvm.models.weights import CONFIG, WEIGHTS, Write, load_model, save_model
from lvm.retrieval.rerank import NONE, Reranker
from lvm.system.atomic import write_array
from lvm.system.errors import is_environment_error, one_line
from lvm.tracking.alias import (
    ARTIFACT,
    BASELINE,
    NAME,
    UNKNOWN_CODES,
    aliases,
)
from lvm.tracking.page import VAL, description

BASELINE_URI = f"models:/{NAME}@{BASELINE}"
ROW_CORRECTION = "row_correction.npy"
RERANKER = "lane_reranker.safetensors"
OPTIONAL = (ROW_CORRECTION, RERANKER)
REQUIREMENTS = (
    *("faiss-cpu", "filelock", "mlflow", "numpy", "pandas", "pyarrow"),
    *("safetensors", "scipy", "torch", "tqdm"),
)
PAGE = 500
EXISTS_CODE = "RESOURCE_ALREADY_EXISTS"
UNREADABLE = (MlflowException, OSError, TypeError, EOFError, ValueError)


@dataclass(frozen=True)
class Card:
    """What is known of a predictor without its weights; None where it has no version."""

    reference: str
    facts: Facts
    model_id: str | None = None
    run_id: str | None = None
    version: str | None = None


@dataclass(frozen=True)
class Predictor(Card):
    """A predictor with its facts; what it lacks (not logged, not registered) is None."""

    model: nn.Module = field(kw_only=True)
    row_correction: NDArray[np.float32] | None = None
    reranker: Reranker | None = None


def log_predictor(
    model: nn.Module,
    facts: Facts,
    row_correction: NDArray[np.float32] | None = None,
    step: int = 0,
    reranker: Reranker | None = None,
) -> str:
    """Log a predictor to the active run as safetensors without pickle; return its model id."""
    tensor = np.dtype(np.float32)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(tensor, (-1, -1, facts.dim))]),
        outputs=Schema([TensorSpec(tensor, (-1, facts.dim))]),
        params=ParamSchema(
            [
                ParamSpec("k", DataType.long, 0),
                ParamSpec("rerank", DataType.string, NONE),
                ParamSpec("keep_context", DataType.boolean, False),
                ParamSpec("packed", DataType.string, ""),
            ]
        ),
    )
    with tempfile.TemporaryDirectory() as scratch:
        beside: dict[str, Write] = {}
        artifacts = {"weights": WEIGHTS, "config": CONFIG}
        if row_correction is not None:
            beside[ROW_CORRECTION] = partial(write_array, array=row_correction)
            artifacts["row_correction"] = ROW_CORRECTION
        if reranker is not None:
            beside[RERANKER] = reranker.save
            artifacts["reranker"] = RERANKER
        folder = save_model(model, Path(scratch) / ARTIFACT, beside)
        logged = mlflow.pyfunc.log_model(
            name=ARTIFACT if facts.kind == TRAINED else facts.model,
            python_model=str(Path(__file__).parents[1] / "serving" / "logged.py"),
            artifacts={key: str(folder / name) for key, name in artifacts.items()},
            signature=signature,
            input_example=np.eye(2, facts.dim, dtype=tensor)[None],
            pip_requirements=[f"{name}=={_public_version(name)}" for name in REQUIREMENTS],
            metadata=asdict(facts),
            params={"model": facts.model, "ctx": facts.ctx},
            model_type=facts.model,
            step=step,
        )
    return str(logged.model_id)


def register(model_id: str, facts: Facts, figures: Mapping[str, str] | None = None) -> str:
    """Make a version of `lvm` of the logged model; return its number.

    `figures` are the tags of what it reached on val; they stand in its description, too.
    """
    tags = {key: str(value) for key, value in asdict(facts).items()}
    tags |= {f"{VAL}{key}": text for key, text in (figures or {}).items()}
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
    """Return every version of `lvm` that can be read, the oldest first."""
    return [one for one in map(_card, _all_versions()) if isinstance(one, Card)]


def versions() -> dict[str, Facts]:
    """Return version -> facts of every version of `lvm` that can be read, the oldest first."""
    return {str(card.version): card.facts for card in cards()}


def unreadable_versions() -> dict[str, str]:
    """Return version -> reason of those whose tags are not the facts of a predictor."""
    found = {str(one.version): _card(one) for one in _all_versions()}
    return {version: one for version, one in found.items() if isinstance(one, str)}


def version_of(model_id: str) -> str | None:
    """Return the newest version made of a logged model; None where it was never registered."""
    return next((one.version for one in reversed(cards()) if one.model_id == model_id), None)


def read_card(reference: str) -> Card:
    """Read what a predictor is, without its weights.

    `reference` is models:/lvm@<alias>, models:/lvm/<version>, runs:/<id>/model or models:/m-<id>.
    Raises ValueError, in one line, where there is none.
    """
    version = _resolve_version(reference)
    uri = reference if version is None else f"models:/{version.name}/{version.version}"
    try:
        card = Model.load(uri)
        facts = Facts(**(card.metadata or {}))
    except UNREADABLE as error:
        raise _unreadable(reference, error) from None
    is_ours = version is not None and version.name == NAME  # not a namesake's number
    number = str(version.version) if version is not None and is_ours else None
    return Card(reference, facts, str(card.model_id), str(card.run_id), number)


def load(reference: str) -> Predictor:
    """Read a predictor that was logged; `reference` and errors as with `read_card`."""
    card = read_card(reference)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        LoggedFiles(card).fetch(folder)
        try:
            model = load_model(folder)
            correction = folder / ROW_CORRECTION
            row_correction = np.array(map_array(correction)) if correction.is_file() else None
            lanes = folder / RERANKER
            reranker = Reranker.load(lanes) if lanes.is_file() else None
        except UNREADABLE as error:
            raise _unreadable(reference, error) from None
    return Predictor(**vars(card), model=model, row_correction=row_correction, reranker=reranker)


@dataclass(frozen=True)
class LoggedFiles:
    """The files of a logged predictor, fetched when they are asked for."""

    card: Card

    def describe(self, folder: Path) -> None:
        """Fetch what identifies the predictor: its configuration, its row correction.

        Raises ValueError, in one line, where a file cannot be had.
        """
        self._fetch(folder, (CONFIG, ROW_CORRECTION))

    def fetch(self, folder: Path) -> None:
        """Fetch all files of the predictor; raises as `describe` does."""
        self._fetch(folder, (CONFIG, WEIGHTS, *OPTIONAL))

    def _fetch(self, folder: Path, names: tuple[str, ...]) -> None:
        try:
            logged = MlflowClient().get_logged_model(str(self.card.model_id))
            where = f"{logged.artifact_location}/artifacts"
            there = {Path(one.path).name for one in mlflow.artifacts.list_artifacts(where)}
            for name in names:
                if name in there or name not in OPTIONAL:
                    mlflow.artifacts.download_artifacts(f"{where}/{name}", dst_path=str(folder))
        except UNREADABLE as error:
            raise _unreadable(self.card.reference, error) from None


def _unreadable(reference: str, error: Exception) -> Exception:
    """Return what to raise: a full disk or a store that is away says nothing of the predictor."""
    if is_environment_error(error):
        return error
    return ValueError(one_line(f"model: {reference} cannot be read by lvm: {error}"))


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
        if number == "latest" and name != NAME:
            raise ValueError(f"model: {reference} is no version of {NAME}; give its number")
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


def _card(version: ModelVersion) -> Card | str:
    """Return the card of a version; why it has none where its tags are no facts."""
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
    """Return all versions, the oldest first, page by page."""
    client, query = MlflowClient(), f"name = '{NAME}'"
    page = client.search_model_versions(query, max_results=PAGE)
    found = list(page)
    while page.token:
        page = client.search_model_versions(query, max_results=PAGE, page_token=page.token)
        found += page
    return sorted(found, key=lambda version: int(version.version))


def _public_version(package: str) -> str:
    """Return the installed version without a local build label such as +cpu."""
    return installed_version(package).partition("+")[0]
