"""The field of a shadow replay: registered versions beside the free predictors."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from entrypoints._inputs import DEFAULT_BANK, DEFAULT_CTX, Inputs, make_inputs, read_bank
from entrypoints._subjects import fit_free
from lvm import registry
from lvm.bank import Bank
from lvm.evaluation import MAX_QUERIES
from lvm.facts import FREE, TRAINED, Facts
from lvm.hubness import fit_hubness
from lvm.models import FREE_MODELS
from lvm.registry import BASELINE, Predictor
from lvm.shadow import Candidate
from lvm.windows import Queries


@dataclass(frozen=True)
class Field:
    """All candidates of one replay by their names; the current baseline is among them."""

    inputs: Inputs
    predictors: dict[str, Predictor]
    baseline_version: str | None

    @property
    def candidates(self) -> list[Candidate]:
        """Return the candidates of the replay."""
        return [
            Candidate(name, one.model, one.facts, one.version, one.row_correction)
            for name, one in self.predictors.items()
        ]

    @property
    def baseline_name(self) -> str | None:
        """Return the name under which the current baseline is replayed; None without one."""
        if self.baseline_version is None:
            return None
        pairs = ((name, one.version) for name, one in self.predictors.items())
        return next(name for name, version in pairs if version == self.baseline_version)


def gather(candidates: str, bank_path: str | None, ctx: int | None, register: bool) -> Field:
    """Load the registered candidates; fit the free predictors that have no version yet.

    With `candidates` all, trained versions of this bank are meant. `register` makes versions of
    the free predictors fitted here. The current baseline is always among them.
    """
    baseline = registry.aliases().get(BASELINE)
    known = registry.versions()
    bank = read_bank(bank_path or _newest_bank(known))
    versions = _chosen(candidates, known, bank)
    if baseline is not None and baseline not in versions:
        versions.append(baseline)
    predictors = [registry.load(f"models:/{registry.NAME}/{version}") for version in versions]
    own = [one.facts for one in predictors if one.facts.bank_sha256 == bank.sha256]
    trained = [facts for facts in own if facts.kind == TRAINED]
    length = ctx or max((facts.ctx for facts in trained), default=DEFAULT_CTX)
    seed = trained[0].seed if trained else 0
    inputs = make_inputs(bank, length, None, "shadow", split="document", seed=seed)
    missing = set(FREE_MODELS) - {one.facts.model for one in predictors if _is_free(one, inputs)}
    predictors += _free_predictors(missing, known, inputs, register)
    named = dict(zip(_names(predictors), predictors, strict=True))
    return Field(inputs, named, baseline)


def choose_queries(source: str, inputs: Inputs, max_queries: int | None) -> Queries:
    """Return the first test queries of the frozen order, or those that a query log names.

    A query log is a table with a column `target_row`, such as the per_query.parquet of an `eval`.
    Raises ValueError where it cannot be read or names rows that are no test queries.
    """
    frozen = inputs.windows.queries["test"]
    if source != "test":
        target_row_Q = read_log(Path(source))
        is_test_Q = np.isin(target_row_Q, frozen.target_row_Q)
        if not is_test_Q.all():
            raise ValueError(
                f"queries: {source} names {(~is_test_Q).sum():,} rows that are no test queries of "
                f"this bank, first {target_row_Q[~is_test_Q][0]}; other rows may be trained on"
            )
        frozen = frozen.take(np.flatnonzero(np.isin(frozen.target_row_Q, target_row_Q)))
    return frozen.head(max_queries or MAX_QUERIES)


def read_log(path: Path) -> np.ndarray:
    """Return the target rows (Q,) that a query log names; raises ValueError for no such table."""
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".parquet": pd.read_parquet,
        ".csv": pd.read_csv,
    }
    if path.suffix not in readers or not path.is_file():
        raise ValueError(f"queries: {path} is neither 'test' nor a .parquet or .csv file")
    table = readers[path.suffix](path)
    if "target_row" not in table or not pd.api.types.is_integer_dtype(table["target_row"]):
        raise ValueError(f"queries: {path} has no whole-number column target_row")
    return table["target_row"].to_numpy()


def _newest_bank(known: dict[str, Facts]) -> str:
    """Return the path of the bank that the newest trained version was made from."""
    newest_first = [facts for facts in reversed(known.values()) if facts.kind == TRAINED]
    return newest_first[0].bank if newest_first else DEFAULT_BANK


def _chosen(candidates: str, known: dict[str, Facts], bank: Bank) -> list[str]:
    """Return the version numbers meant, the newest first."""
    if candidates == "all":
        newest_first = reversed(known.items())
        own = [(v, f) for v, f in newest_first if f.bank_sha256 == bank.sha256]
        return [version for version, facts in own if facts.kind == TRAINED]
    versions = []
    for word in filter(None, (word.strip() for word in candidates.split(","))):
        if word in FREE_MODELS:
            continue
        version = word.removeprefix(f"models:/{registry.NAME}/")
        if version not in known:
            raise ValueError(
                f"candidates: {registry.NAME} has no version {word!r}; "
                f"known: {', '.join(known) or 'none'}"
            )
        versions.append(version)
    return list(dict.fromkeys(versions))


def _is_free(one: Predictor, inputs: Inputs) -> bool:
    """Tell whether it is a free predictor fitted on the very split of this replay."""
    facts, windows = one.facts, inputs.windows
    same = (inputs.bank.sha256, windows.split, windows.seed)
    return facts.kind == FREE and (facts.bank_sha256, facts.split, facts.seed) == same


def _free_predictors(
    names: set[str], known: dict[str, Facts], inputs: Inputs, register: bool
) -> list[Predictor]:
    """Return these free predictors: registered ones of the same bank and split, else fitted."""
    windows = inputs.windows
    same = (inputs.bank.sha256, windows.split, windows.seed)
    versions = {
        facts.model: version
        for version, facts in known.items()
        if facts.kind == FREE and (facts.bank_sha256, facts.split, facts.seed) == same
    }
    predictors = []
    for name in FREE_MODELS:
        if name in names and name in versions:
            predictors.append(registry.load(f"models:/{registry.NAME}/{versions[name]}"))
        elif name in names:
            fitted = _with_correction(fit_free(name, inputs), inputs)
            predictors.append(_registered(fitted) if register else fitted)
    return predictors


def _with_correction(one: Predictor, inputs: Inputs) -> Predictor:
    hubness = fit_hubness(one.model, inputs.bank, inputs.windows, inputs.windows.seed)
    return dataclasses.replace(one, row_correction=hubness.row_correction)


def _registered(one: Predictor) -> Predictor:
    model_id = registry.log_predictor(one.model, one.facts, one.row_correction)
    version = registry.register(model_id, one.facts)
    return dataclasses.replace(one, model_id=model_id, version=version)


def _names(predictors: Sequence[Predictor]) -> list[str]:
    """Return unique names: the model's, with its ctx or else its version where it has rivals."""
    names = []
    for one in predictors:
        rivals = [other for other in predictors if other.facts.model == one.facts.model]
        lengths = {other.facts.ctx for other in rivals}
        if len(rivals) == 1:
            names.append(one.facts.model)
        elif len(lengths) == len(rivals):
            names.append(f"{one.facts.model}-ctx{one.facts.ctx}")
        else:
            names.append(f"{one.facts.model}-v{one.version or 'new'}")
    return names
