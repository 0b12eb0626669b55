"""The field of a shadow replay: registered versions beside the free predictors."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from entrypoints._inputs import DEFAULT_BANK, DEFAULT_CTX, Inputs, make_inputs, read_bank
from entrypoints._subjects import fit_free
from lvm import registry
from lvm.bank import Bank
from lvm.context_rows import ContextQueries
from lvm.evaluation import MAX_QUERIES
from lvm.facts import FREE, TRAINED, Facts
from lvm.hubness import fit_hubness
from lvm.models import FREE_MODELS
from lvm.query_log import QueryLog, log_queries
from lvm.registry import BASELINE, Predictor
from lvm.shadow import Candidate
from lvm.splits import SPLITS
from lvm.windows import Queries


@dataclass(frozen=True)
class Field:
    """All candidates of one replay by their names; the current baseline is among them.

    `failures` say why a registered version could not be read; it takes part unscored.
    """

    inputs: Inputs
    predictors: dict[str, Predictor]
    baseline_version: str | None
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def candidates(self) -> list[Candidate]:
        """Return the candidates of the replay."""
        return [
            Candidate(
                name,
                one.model,
                one.facts,
                one.version,
                one.row_correction,
                self.failures.get(one.reference),
            )
            for name, one in self.predictors.items()
        ]

    @property
    def versions(self) -> dict[str, str | None]:
        """Return the version of each candidate by its name."""
        return {name: one.version for name, one in self.predictors.items()}

    @property
    def baseline_name(self) -> str | None:
        """Return the name under which the current baseline is replayed; None without one."""
        if self.baseline_version is None:
            return None
        pairs = ((name, one.version) for name, one in self.predictors.items())
        return next(name for name, version in pairs if version == self.baseline_version)


def gather(
    candidates: str,
    bank_path: str | None,
    ctx: int | None,
    register: bool,
    log: QueryLog | None = None,
) -> Field:
    """Load the candidates; fit the free predictors that have no version yet.

    With `candidates` all, trained versions of this bank are meant. `register` makes versions of
    what has none. The current baseline is always among them. `log` is checked against the bank
    before anything is fitted or registered.
    """
    baseline = registry.aliases().get(BASELINE)
    known = registry.versions()
    named = None if candidates == "all" else _named(candidates, known)
    bank = read_bank(bank_path or _bank_of(named, known))
    if log is not None:
        log_queries(log, bank, DEFAULT_CTX)
    failures: dict[str, str] = {}
    predictors = _registered_ones(known, bank, failures) if named is None else named
    if baseline is not None and baseline not in {one.version for one in predictors}:
        predictors.append(_load(baseline, known[baseline], failures))
    own = [one.facts for one in predictors if one.facts.bank_sha256 == bank.sha256]
    trained = [facts for facts in own if facts.kind == TRAINED]
    length = ctx or max((facts.ctx for facts in trained), default=DEFAULT_CTX)
    seed = trained[0].seed if trained else 0
    inputs = make_inputs(bank, length, None, "shadow", split="document", seed=seed)
    if register:
        predictors = [_with_version(one) for one in predictors]
    missing = set(FREE_MODELS) - {one.facts.model for one in predictors if _is_free(one, inputs)}
    predictors += _free_predictors(missing, inputs, register)
    by_name = dict(zip(_names(predictors), predictors, strict=True))
    return Field(inputs, by_name, baseline, failures)


def choose_queries(
    log: QueryLog | None, inputs: Inputs, max_queries: int | None
) -> tuple[Queries, str]:
    """Return the first test queries of the frozen order, or those of a log; say what they are."""
    most = max_queries or MAX_QUERIES
    if log is None:
        return inputs.windows.queries["test"].head(most), "the frozen test split"
    queries = log_queries(log, inputs.bank, inputs.windows.ctx)
    asked = queries.head(most)
    split_Q = inputs.windows.split_N[asked.target_row_Q]
    counts = np.bincount(split_Q, minlength=len(SPLITS))
    shares = ", ".join(f"{num:,} {name}" for name, num in zip(SPLITS, counts, strict=True))
    served = isinstance(asked, ContextQueries)
    contexts = "its recorded context" if served else "the rows before it"
    part = f"the first {len(asked):,} of " if len(asked) < len(queries) else ""
    return asked, (
        f"{part}the log {log.path.name}, each asked from {contexts}; rows by split: {shares}"
    )


def _bank_of(named: list[Predictor] | None, known: dict[str, Facts]) -> str:
    """Return the path of the bank that the first named or the newest trained model is from."""
    facts = [one.facts for one in named] if named else list(reversed(known.values()))
    return next((one.bank for one in facts if one.kind == TRAINED), DEFAULT_BANK)


def _named(candidates: str, known: dict[str, Facts]) -> list[Predictor]:
    """Load what the words name: versions, URIs; free predictors, named or not, take part anyway."""
    predictors: dict[str, Predictor] = {}
    for word in filter(None, (word.strip() for word in candidates.split(","))):
        if word in FREE_MODELS:
            continue
        if "/" not in word and word not in known:
            raise ValueError(
                f"candidates: {registry.NAME} has no version {word!r}; known: "
                f"{', '.join(known) or 'none'}; or give models:/{registry.NAME}@<alias>, "
                f"runs:/<run id>/{registry.ARTIFACT} or models:/m-<id>"
            )
        one = registry.load(word if "/" in word else f"models:/{registry.NAME}/{word}")
        assert one.model_id is not None
        version = one.version or registry.version_of(one.model_id)
        predictors.setdefault(one.model_id, dataclasses.replace(one, version=version))
    return list(predictors.values())


def _registered_ones(
    known: dict[str, Facts], bank: Bank, failures: dict[str, str]
) -> list[Predictor]:
    """Load every trained version of this bank, the newest first."""
    newest_first = reversed(known.items())
    own = [(v, f) for v, f in newest_first if f.bank_sha256 == bank.sha256 and f.kind == TRAINED]
    return [_load(version, facts, failures) for version, facts in own]


def _load(version: str, facts: Facts, failures: dict[str, str]) -> Predictor:
    """Load a version; one that cannot be read is noted and takes part without a model."""
    reference = f"models:/{registry.NAME}/{version}"
    try:
        return registry.load(reference)
    except ValueError as error:
        failures[reference] = str(error)
        return Predictor(reference, nn.Identity(), facts, version=version)


def _with_version(one: Predictor) -> Predictor:
    """Register a model that has no version yet, for only a version can take the alias."""
    if one.version is not None:
        return one
    assert one.model_id is not None
    return dataclasses.replace(one, version=registry.register(one.model_id, one.facts))


def _is_free(one: Predictor, inputs: Inputs) -> bool:
    """Tell whether it is a free predictor fitted on the very split of this replay."""
    facts, windows = one.facts, inputs.windows
    same = (inputs.bank.sha256, windows.split, windows.seed)
    return facts.kind == FREE and (facts.bank_sha256, facts.split, facts.seed) == same


def _free_predictors(names: set[str], inputs: Inputs, register: bool) -> list[Predictor]:
    """Return these free predictors: registered ones of the same bank and split, else fitted."""
    predictors = []
    for name in (name for name in FREE_MODELS if name in names):
        one = _registered_free(name, inputs)
        if one is None:
            one = _with_correction(fit_free(name, inputs), inputs)
            if register:
                one = _registered(one, inputs)
        predictors.append(one)
    return predictors


def _registered_free(name: str, inputs: Inputs) -> Predictor | None:
    """Return the newest version of a free predictor of the same bank and split."""
    windows = inputs.windows
    same = (name, FREE, inputs.bank.sha256, windows.split, windows.seed)
    for version, facts in reversed(registry.versions().items()):
        if (facts.model, facts.kind, facts.bank_sha256, facts.split, facts.seed) == same:
            return registry.load(f"models:/{registry.NAME}/{version}")
    return None


def _with_correction(one: Predictor, inputs: Inputs) -> Predictor:
    hubness = fit_hubness(one.model, inputs.bank, inputs.windows, inputs.windows.seed)
    return dataclasses.replace(one, row_correction=hubness.row_correction)


def _registered(one: Predictor, inputs: Inputs) -> Predictor:
    """Register a fitted predictor, or return the version that another process made meanwhile."""
    with registry.locked():
        there = _registered_free(one.facts.model, inputs)
        if there is not None:
            return there
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
            names.append(f"{one.facts.model}-{_number(one)}")
    return names


def _number(one: Predictor) -> str:
    """Return what tells a predictor from its namesakes: its version, else its model's id."""
    if one.version is not None:
        return f"v{one.version}"
    return "new" if one.model_id is None else one.model_id[:10]
