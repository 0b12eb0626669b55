"""Predictors as MLflow logs them: written, read back whole or in part, chosen by a reference."""

import tempfile
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from numpy.typing import NDArray
from torch import nn

from lvm.bank.bank import Bank
from lvm.bank.files import map_array
from lvm.corpus.encoders import WORDLLAMA
from lvm.evaluation.free_predictors import fit_free_predictors
from lvm.models.facts import TRAINED, Facts, facts_of
from lvm.models.table import FREE_MODELS
from lvm.models.weights import CONFIG, WEIGHTS, Write, load_model, save_model
from lvm.retrieval.rerank import NONE, Reranker
from lvm.system.atomic import write_array
from lvm.system.errors import is_environment_error, one_line
from lvm.system.progress import part
from lvm.system.settings import SERVER_SETTINGS
from lvm.tracking.datasets import DEFAULT_BANK, Inputs, default_ctx, make_inputs, read_bank
from lvm.tracking.registry import (
    ARTIFACT,
    BASELINE,
    BASELINE_URI,
    DEFAULT,
    NAME,
    UNKNOWN_CODES,
    Card,
    Registry,
)
from lvm.tracking.store import configure, link_to_moved, missing_folder
from lvm.windows.planning import IntArray

ROW_CORRECTION = "row_correction.npy"
RERANKER = "lane_reranker.safetensors"
INIT_TWINS = "init_twins.npy"
OPTIONAL = (ROW_CORRECTION, RERANKER, INIT_TWINS)
PACKAGE = Path(__file__).parents[1]
# What the modules that `lvm.serving` imports need; a test compares. Texts need the encoder, too.
REQUIREMENTS = (
    *(
        "bm25s",
        "faiss-cpu",
        "filelock",
        "mlflow",
        "numpy",
        "pandas",
        "psutil",
        "pyarrow",
        "pydantic",
    ),
    *("pyyaml", "regex", "safetensors", "scipy", "sentencex", "torch", "tqdm"),
)
# The code that MLflow runs to load a model. It names one class: moves of others leave old models
# loadable.
SERVED_BY = """from mlflow.models import set_model

from lvm.serving.predictor import ServedPredictor

set_model(ServedPredictor())
"""
READ_ERRORS = (MlflowException, OSError, TypeError, EOFError, ValueError)
UNFITTED = ("copy-last", "context-mean")


@dataclass(frozen=True)
class Predictor(Card):
    """A predictor with its facts; what it lacks (not logged, not registered) is None.

    `twin_row` (M,) are the val and test rows of its bank with a twin among the train rows of the
    banks that it began from.
    """

    model: nn.Module = field(kw_only=True)
    row_correction: NDArray[np.float32] | None = None
    reranker: Reranker | None = None
    twin_row: IntArray | None = None


@dataclass(frozen=True)
class Subject:
    """The predictor that a command measures, with the inputs that it is measured on."""

    name: str
    predictor: Predictor
    inputs: Inputs

    def title(self) -> str:
        """Return the name with the version, where it has one, and ctx: `skip v2 ctx 1000`."""
        version = self.predictor.version
        name = self.name if version is None else f"{self.name} v{version}"
        return f"{name} ctx {self.inputs.windows.ctx}"

    def tags(self) -> dict[str, str]:
        """Return the tags of the predictor for the run list, beside those of its inputs."""
        facts = self.predictor.facts
        tags = {"model": self.name, "phase": facts.phase, "recipe": facts.recipe}
        return tags | {"leaky": str(self.is_leaky()).lower()}

    def is_leaky(self) -> bool:
        """Tell whether the predictor may have been trained on the answers.

        So may one that was trained or fitted on another bank: the two banks may share texts. Only
        predictors without fitted parameters are the same for every bank.
        """
        facts, bank = self.predictor.facts, self.inputs.bank
        is_own = facts.bank_sha256 in (bank.sha256, *bank.bases)
        is_foreign = facts.model not in UNFITTED and not is_own
        return facts.leaky or self.inputs.windows.leaky or is_foreign


@part("log model")
def log_predictor(
    model: nn.Module,
    facts: Facts,
    row_correction: NDArray[np.float32] | None = None,
    step: int = 0,
    reranker: Reranker | None = None,
    log_bank: bool = False,
    twin_row: IntArray | None = None,
) -> str:
    """Log a predictor to the active run as safetensors without pickle; return its model id.

    The package lvm is logged with it, so that it can be loaded where lvm is not installed;
    `log_bank` logs a copy of its bank, too.
    """
    with tempfile.TemporaryDirectory() as scratch:
        optional: dict[str, Write] = {}
        artifacts = {"weights": WEIGHTS, "config": CONFIG}
        if row_correction is not None:
            optional[ROW_CORRECTION] = partial(write_array, array=row_correction)
            artifacts["row_correction"] = ROW_CORRECTION
        if reranker is not None:
            optional[RERANKER] = reranker.save
            artifacts["reranker"] = RERANKER
        if twin_row is not None:
            optional[INIT_TWINS] = partial(write_array, array=twin_row)
            artifacts["init_twins"] = INIT_TWINS
        folder = save_model(model, Path(scratch) / ARTIFACT, optional)
        places = {key: str(folder / name) for key, name in artifacts.items()}
        if log_bank:
            places["bank"] = facts.bank
        code = Path(scratch) / "logged.py"
        code.write_text(SERVED_BY)
        needed = REQUIREMENTS + (WORDLLAMA,) * (facts.encoder == WORDLLAMA)
        logged = Model.log(
            artifact_path=None,
            flavor=Flavor,
            name=ARTIFACT if facts.kind == TRAINED else facts.model,
            python_model=str(code),
            code_paths=[str(PACKAGE)],
            artifacts=places,
            signature=_signature(facts.dim),
            input_example=np.eye(2, facts.dim, dtype=np.float32)[None],
            pip_requirements=[f"{name}=={_public_version(name)}" for name in needed],
            metadata=asdict(facts),
            params={"model": facts.model, "ctx": facts.ctx},
            model_type=facts.model,
            step=step,
        )
    return str(logged.model_id)


class Flavor:
    """MLflow's pyfunc with a `model_config`: the settings of a server, which loading may give.

    `pyfunc.log_model` would log them as parameters of the run, whose `bank` is another.
    """

    @staticmethod
    def save_model(**more: Any) -> None:
        """Write the model's folder."""
        mlflow.pyfunc.save_model(model_config=dict.fromkeys(SERVER_SETTINGS), **more)


def _signature(dim: int) -> ModelSignature:
    """Return what MLflow checks: not the inputs, which are vectors or texts and checked by lvm."""
    return ModelSignature(
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, dim))]),
        params=ParamSchema(
            [
                ParamSpec("k", DataType.long, 0),
                ParamSpec("rerank", DataType.string, NONE),
                ParamSpec("keep_context", DataType.boolean, False),
                ParamSpec("vectors", DataType.boolean, True),
                ParamSpec("packed", DataType.string, ""),
                ParamSpec("session", DataType.string, ""),
                ParamSpec("position", DataType.long, -1),
            ]
        ),
    )


def read_card(reference: str) -> Card:
    """Read the facts of a logged predictor without its weights.

    `reference` is models:/lvm@<alias>, models:/lvm/<version>, runs:/<id>/model or models:/m-<id>;
    lvm may be another registry.
    Raises ValueError, in one line, if there is none.
    """
    version = _resolve_version(reference)
    uri = reference if version is None else f"models:/{version.name}/{version.version}"
    try:
        card = Model.load(uri)
        facts = Facts(**(card.metadata or {}))
    except READ_ERRORS as error:
        source = reference if version is None else str(version.source)
        raise _unreadable(reference, error, source) from None
    found = Card(reference, facts, str(card.model_id), str(card.run_id))
    if version is None:
        return found
    return replace(found, version=str(version.version), registry=version.name)


def load(reference: str) -> Predictor:
    """Read a logged predictor; `reference` and errors as for `read_card`."""
    card = read_card(reference)
    with tempfile.TemporaryDirectory() as scratch:
        LoggedFiles(card).fetch(Path(scratch))
        try:
            return _read(card, Path(scratch))
        except READ_ERRORS as error:
            raise _unreadable(reference, error, f"models:/{card.model_id}") from None


def load_folder(folder: str) -> Predictor:
    """Read a predictor from its folder, as MLflow stores or downloads it.

    Raises ValueError, in one line, if there is none.
    """
    try:
        facts = Facts(**(Model.load(folder).metadata or {}))
        return _read(Card(folder, facts), Path(folder) / "artifacts")
    except READ_ERRORS as error:
        raise _unreadable(folder, error, folder) from None


def _read(card: Card, folder: Path) -> Predictor:
    """Read the files of a predictor."""
    correction, twins, lanes = (folder / name for name in (ROW_CORRECTION, INIT_TWINS, RERANKER))
    return Predictor(
        **vars(card),
        model=load_model(folder),
        row_correction=np.array(map_array(correction)) if correction.is_file() else None,
        reranker=Reranker.load(lanes) if lanes.is_file() else None,
        twin_row=np.array(map_array(twins)) if twins.is_file() else None,
    )


def check_previous(registry: Registry, version: str | None) -> None:
    """Raise ValueError if there is a previous baseline and its model cannot be loaded."""
    try:
        if version is not None:
            load(registry.uri(version))
    except ValueError as error:
        raise ValueError(
            f"rollback: the previous baseline, version {version}, cannot be restored; give the "
            f"alias to another with the entry point promote: {error}"
        ) from None


@dataclass(frozen=True)
class LoggedFiles:
    """The files of a logged predictor, downloaded on request."""

    card: Card

    def describe(self, folder: Path) -> None:
        """Download the files that identify the predictor: its configuration, its row correction.

        Raises ValueError, in one line, if a file cannot be read.
        """
        self._fetch(folder, (CONFIG, ROW_CORRECTION))

    def fetch(self, folder: Path) -> None:
        """Download all files of the predictor; raises as `describe` does."""
        self._fetch(folder, (CONFIG, WEIGHTS, *OPTIONAL))

    def _fetch(self, folder: Path, names: tuple[str, ...]) -> None:
        try:
            logged = MlflowClient().get_logged_model(str(self.card.model_id))
            where = f"{logged.artifact_location}/artifacts"
            there = {Path(one.path).name for one in mlflow.artifacts.list_artifacts(where)}
            for name in names:
                if name in there or name not in OPTIONAL:
                    mlflow.artifacts.download_artifacts(f"{where}/{name}", dst_path=str(folder))
        except READ_ERRORS as error:
            source = f"models:/{self.card.model_id}"
            raise _unreadable(self.card.reference, error, source) from None


def reference_in(registry: Registry, reference: str) -> str:
    """Return the URI of a command's `model`: default and numbers mean versions of `registry`."""
    if reference == BASELINE_URI:
        return registry.baseline_uri
    return registry.uri(reference) if reference.isdecimal() else reference


def check_subject(reference: str, registry: Registry) -> None:
    """Raise ValueError if `open_subject` would find no predictor of this name."""
    configure()
    if reference not in FREE_MODELS:
        read_card(reference_in(registry, reference))


def open_subject(
    reference: str, bank_path: str | None, ctx: int | None, registry: Registry = DEFAULT
) -> Subject:
    """Read or fit the predictor `reference`; bank or ctx None means its own.

    The baseline of another bank than the one given is refused. Windows follow the split that a
    trained predictor was made with, so that no row that it was trained on becomes a query.
    """
    if reference in FREE_MODELS:
        bank = read_bank(bank_path or DEFAULT_BANK)
        inputs = make_inputs(bank, ctx or default_ctx(bank), None, "evaluation")
        return Subject(reference, fit_free(reference, inputs), inputs)
    predictor, bank = open_logged(reference, bank_path, registry)
    facts = predictor.facts
    plan = {"split": facts.split, "seed": facts.seed}
    inputs = make_inputs(bank, ctx or default_ctx(bank, facts.ctx), None, "evaluation", **plan)
    return Subject(facts.model, predictor, inputs)


def open_logged(
    reference: str, bank_path: str | None, registry: Registry
) -> tuple[Predictor, Bank]:
    """Read a logged predictor and a bank (None: its own); refuse a bank that does not fit."""
    predictor = load(reference_in(registry, reference))
    bank = read_bank(bank_path or predictor.facts.bank)
    if reference == BASELINE_URI:
        registry.check_bank(bank)
    check_dim(reference, predictor.facts, bank)
    return predictor, bank


def fit_free(name: str, inputs: Inputs) -> Predictor:
    """Fit one free predictor on the train rows."""
    bank, windows = inputs.bank, inputs.windows
    model = fit_free_predictors(bank, windows, (name,), seed=windows.seed)[name]
    return Predictor(name, facts_of(name, "none", bank, windows), model=model)


def check_dim(reference: str, facts: Facts, bank: Bank) -> None:
    """Raise ValueError if the predictor reads vectors of another width than the bank's."""
    if facts.dim != bank.dim:
        raise ValueError(
            f"model: {reference} reads vectors of {facts.dim} dims, bank {bank.path} has "
            f"{bank.dim}; give the bank that it was trained on ({facts.bank})"
        )


def _unreadable(reference: str, error: Exception, source: str) -> Exception:
    """Return the error to raise for a predictor that cannot be read from `source`.

    A full disk or an unreachable store says nothing about the predictor. A missing folder is
    named, with where its store was moved to.
    """
    if is_environment_error(error):
        return error
    why = str(error)
    missing = missing_folder(_location(source))
    if missing is not None:
        why = f"its folder {missing} does not exist{link_to_moved(missing) or ''}"
    return ValueError(one_line(f"model: {reference} cannot be read by lvm: {why}"))


def _location(source: str) -> str:
    """Return where the store has the files of models:/m-<id> or runs:/<id>/model; "" if unknown."""
    scheme, _, rest = source.partition(":/")
    try:
        if scheme == "runs":
            outputs = mlflow.get_run(rest.partition("/")[0]).outputs
            models = outputs.model_outputs if outputs is not None else []
            rest = models[0].model_id if models else ""
        return str(MlflowClient().get_logged_model(rest).artifact_location)
    except MlflowException:
        return ""


def _resolve_version(reference: str) -> ModelVersion | None:
    """Return the registered version that `reference` names; None for a logged model's own URI."""
    name, _, alias = reference.removeprefix("models:/").partition("@")
    client = MlflowClient()
    try:
        if not reference.startswith("models:/"):
            if not reference.startswith("runs:/"):
                raise ValueError(
                    f"model: unknown '{reference}'; give {', '.join(FREE_MODELS)}, a version's "
                    f"number, {BASELINE_URI}, models:/{NAME}/<version> or runs:/<run id>/{ARTIFACT}"
                )
            return None
        if alias:
            return client.get_model_version_by_alias(name, alias)
        name, _, number = name.partition("/")
        if number == "latest":
            number = max(Registry(name).versions(), key=int, default="")
            if not number:
                raise ValueError(f"model: {reference} does not exist; run train first")
        return client.get_model_version(name, number) if number else None
    except MlflowException as error:
        if error.error_code not in UNKNOWN_CODES:
            raise
        registry = Registry(name.partition("/")[0])
        there = ", ".join([*registry.aliases(), *registry.versions()])
        there = there or "nothing yet; run train, then shadow-eval"
        if alias == BASELINE and registry.versions():
            there += "; give model=<version>, or run shadow-eval with promote=enabled"
        raise ValueError(f"model: {reference} does not exist; registered: {there}") from None


def _public_version(package: str) -> str:
    """Return the installed version without a local build label such as +cpu."""
    return installed_version(package).partition("+")[0]
