"""The predictor that a command is asked to look at."""

from dataclasses import dataclass

from entrypoints._inputs import DEFAULT_BANK, DEFAULT_CTX, Inputs, make_inputs, read_bank
from lvm.bank.store import Bank
from lvm.evaluation.free_predictors import fit_free_predictors
from lvm.models.facts import Facts, facts_of
from lvm.models.table import FREE_MODELS
from lvm.tracking import versions as registered
from lvm.tracking.versions import Predictor

MODEL_HELP = (
    "models:/lvm@baseline, models:/lvm/<version>, models:/lvm/latest, runs:/<id>/model or a free "
    f"predictor: {', '.join(FREE_MODELS)}."
)
UNFITTED = ("copy-last", "context-mean")


@dataclass(frozen=True)
class Subject:
    """The predictor that a command looks at, together with its inputs."""

    name: str
    predictor: Predictor
    inputs: Inputs

    def tags(self) -> dict[str, str]:
        """Return what the run list tells of the predictor, beside the tags of its inputs."""
        facts = self.predictor.facts
        tags = {"model": self.name, "phase": facts.phase, "recipe": facts.recipe}
        return tags | {"leaky": str(self.is_leaky()).lower()}

    def is_leaky(self) -> bool:
        """Tell whether the predictor may have been trained on the answers.

        What was trained or fitted on another bank counts: nothing tells whether the two share
        texts. Only the predictors without anything fitted are the same for every bank.
        """
        facts, bank = self.predictor.facts, self.inputs.bank
        is_own = facts.bank_sha256 in (bank.sha256, *bank.bases)
        is_foreign = facts.model not in UNFITTED and not is_own
        return facts.leaky or self.inputs.windows.leaky or is_foreign


def open_subject(reference: str, bank_path: str | None, ctx: int | None) -> Subject:
    """Read or fit the predictor `reference`; bank or ctx None means its own.

    Windows follow the split that a trained predictor was made with, so that no row it was trained
    on becomes a query.
    """
    if reference in FREE_MODELS:
        bank = read_bank(bank_path or DEFAULT_BANK)
        inputs = make_inputs(bank, ctx or DEFAULT_CTX, None, "evaluation")
        return Subject(reference, fit_free(reference, inputs), inputs)
    predictor = registered.load(reference)
    facts = predictor.facts
    bank = read_bank(bank_path or facts.bank)
    check_dim(reference, facts, bank)
    plan = {"split": facts.split, "seed": facts.seed}
    inputs = make_inputs(bank, ctx or facts.ctx, None, "evaluation", **plan)
    return Subject(facts.model, predictor, inputs)


def fit_free(name: str, inputs: Inputs) -> Predictor:
    """Fit one free predictor on the train rows."""
    model = fit_free_predictors(inputs.bank, inputs.windows, (name,), seed=inputs.windows.seed)[
        name
    ]
    facts = facts_of(name, "none", inputs.bank, inputs.windows)
    return Predictor(name, facts, model=model)


def check_dim(reference: str, facts: Facts, bank: Bank) -> None:
    """Raise ValueError where the predictor reads vectors of another width than the bank's."""
    if facts.dim != bank.dim:
        raise ValueError(
            f"model: {reference} reads vectors of {facts.dim} dims, bank {bank.path} has "
            f"{bank.dim}; give the bank that it was trained on ({facts.bank})"
        )
