"""The model that a training starts from, and the audit of the banks that it was trained on before.

Shapes: Q queries, M marked rows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lvm.bank.duplicates import SAME_SCORE
from lvm.evaluation.metrics import hit_at
from lvm.models.facts import FREE, TRAINED, Facts
from lvm.shadow.replay import Candidate
from lvm.tracking import runs
from lvm.tracking.datasets import Inputs
from lvm.tracking.logged_models import Predictor, Subject, load, load_folder, reference_in
from lvm.tracking.registry import ARTIFACT, DEFAULT, Registry
from lvm.windows.origins import Origin, as_text, from_text, marked_rows
from lvm.windows.planning import SPLITS, TRAIN, IntArray, Queries, Windows


@dataclass(frozen=True)
class Start:
    """The model that a training starts from; `twin_row` (M,) are the rows that its audit marked.

    `origins` are the banks that it was trained on before, without the bank of the training.
    """

    model: nn.Module
    origins: tuple[Origin, ...] = ()
    twin_row: IntArray | None = None

    def told_by(self, facts: Facts) -> Facts:
        """Return the facts of the trained model with the banks it began from and their twins."""
        num_twins = 0 if self.twin_row is None else len(self.twin_row)
        return replace(facts, init_banks=as_text(self.origins), init_twins=num_twins)

    def counts(self, windows: Windows) -> dict[str, Any]:
        """Return the banks and the counts of the audit; empty if there was none."""
        if self.twin_row is None:
            return {}
        found: dict[str, Any] = {"banks": [vars(one) for one in self.origins]}
        for code, name in enumerate(SPLITS):
            if code != TRAIN:
                found[f"{name}_twins"] = int((windows.split_N[self.twin_row] == code).sum())
                found[f"{name}_rows"] = int((windows.split_N == code).sum())
        return found

    def log(self, windows: Windows) -> None:
        """Print and log the counts of the audit, if there was one."""
        found = self.counts(windows)
        if not found:
            return
        runs.log_metrics({f"init/{name}_twins": found[f"{name}_twins"] for name in SPLITS[1:]})
        counts = [f"{found[f'{n}_twins']:,} of {found[f'{n}_rows']:,} {n} rows" for n in SPLITS[1:]]
        names = ", ".join(f"{Path(one.bank).name} {one.sha256[:12]}" for one in self.origins)
        print(
            f"init was trained on {names}: {' and '.join(counts)} have a twin (cosine "
            f"{SAME_SCORE} or more) among its train rows; eval tells the figures without them",
            flush=True,
        )


def read_initial(
    reference: str | None, inputs: Inputs, registry: Registry = DEFAULT
) -> Start | None:
    """Read the model that a training starts from; None for None.

    `reference` may be the number of a version, or a folder. A model of another bank is audited:
    val and test rows with a twin among its train rows are marked. Raises ValueError if the model
    cannot be read or is a free predictor, if it is of this bank (or one that this bank extends) but
    of another split, so that it may have seen val and test rows, or if it cannot be audited.
    """
    if reference is None:
        return None
    full = reference_in(registry, reference)
    is_folder = Path(full).is_dir()
    if not is_folder and not full.startswith(("models:/", "runs:/")):
        raise ValueError(
            f"init: unknown '{reference}'; give a version's number, {registry.uri('<version>')}, "
            f"models:/m-<id>, runs:/<run id>/{ARTIFACT} or the folder of a model"
        )
    try:
        found = load_folder(full) if is_folder else load(full)
    except ValueError as error:
        raise ValueError(f"init: {str(error).removeprefix('model: ')}") from None
    facts, windows = found.facts, inputs.windows
    if facts.kind == FREE:
        raise ValueError(
            f"init: {full} is a free predictor ({facts.model}), from which no training can start"
        )
    if not _is_own(facts, inputs):
        try:
            origins = _origins(facts)
            return Start(found.model, origins, marked_rows(inputs.bank, windows, origins))
        except ValueError as error:
            raise ValueError(f"init: {reference}: {error}") from None
    if (facts.split, facts.seed) != (windows.split, windows.seed):
        raise ValueError(
            f"init: {reference} was trained on split {facts.split} of seed {facts.seed} of this "
            f"bank; it may have seen val rows of split {windows.split} of seed {windows.seed}; "
            "give one of the same split and seed"
        )
    return Start(found.model, from_text(facts.init_banks), found.twin_row)


def _is_own(facts: Facts, inputs: Inputs) -> bool:
    return facts.bank_sha256 in (inputs.bank.sha256, *inputs.bank.bases)


def _origins(facts: Facts) -> tuple[Origin, ...]:
    """Return all banks that a model was trained on, its own last."""
    own = Origin(facts.bank, facts.bank_sha256, facts.seed, facts.leaky)
    return (*from_text(facts.init_banks), own)


def twins_of(subject: Subject) -> IntArray | None:
    """Return the marked rows (M,) of the bank that a trained model is measured on; None for none.

    A model of another bank is audited now; where that cannot be done, the reason is printed.
    """
    facts, inputs = subject.predictor.facts, subject.inputs
    if facts.kind != TRAINED or _is_own(facts, inputs):
        return subject.predictor.twin_row
    try:
        return marked_rows(inputs.bank, inputs.windows, _origins(facts))
    except ValueError as error:
        print(f"answers are not compared with the train rows of {subject.name}: {error}")
        return None


def twin_figures(
    twin_row: IntArray, target_row_Q: IntArray, rank_of: Mapping[str, Any]
) -> dict[str, Any]:
    """Return how many queries are marked, and Hit@5 of each order on the others.

    `rank_of` has the ranks (Q,) of each order by its name.
    """
    is_clean_Q = ~np.isin(target_row_Q, twin_row)
    hits = {
        name: float(hit_at(np.asarray(rank_Q)[is_clean_Q], 5).mean()) if is_clean_Q.any() else None
        for name, rank_Q in rank_of.items()
    }
    return {"queries": int((~is_clean_Q).sum()), "hit_at_5_without": hits}


def twin_line(found: Mapping[str, Any], num_queries: int) -> str:
    """Return the line of `eval` on the marked queries."""
    hits = found["hit_at_5_without"].items()
    words = ", ".join(f"{name} {100 * hit:.1f} %" for name, hit in hits if hit is not None)
    return (
        f"Twins: {found['queries']:,} of {num_queries:,} answers have one among the train rows of "
        f"other banks that the model was trained on; Hit@5 without them: {words or 'no query left'}"
    )


def without_twins(queries: Queries, candidates: Iterable[Candidate]) -> tuple[Queries, str]:
    """Return the queries of a replay that no candidate's audit marked, and a line on the others.

    All candidates answer the same queries. Raises ValueError if none is left.
    """
    marking = {one.name: one.model_id for one in candidates if one.facts.init_twins}
    if not marking:
        return queries, ""
    rows = [_marked(load(f"models:/{model_id}")) for model_id in marking.values()]
    left = queries.take(np.flatnonzero(~np.isin(queries.target_row_Q, np.concatenate(rows))))
    if not len(left):
        raise ValueError(
            f"queries: all answers have a twin in the banks that {', '.join(marking)} began from; "
            "name other candidates"
        )
    line = (
        f"{len(queries) - len(left):,} of {len(queries):,} queries omitted: their answers have a "
        f"twin in the banks that {', '.join(marking)} began from"
    )
    return left, line


def _marked(predictor: Predictor) -> IntArray:
    if predictor.twin_row is None:
        raise ValueError(f"candidates: {predictor.reference} lacks the rows of its audit for twins")
    return predictor.twin_row
