"""The phases as they were compared: rows, figures, pairs, their JSON form."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lvm.evaluation.intervals import Difference
from lvm.retrieval.rerank import NONE
from lvm.studies.phases.published import published_report
from lvm.studies.phases.table import Phase


@dataclass(frozen=True)
class Trained:
    """One phase under one recipe, trained: by which run, as which candidate of the replay.

    `label` is the phase's name, of a grown model with the model's behind it; `name` has the recipe,
    too, where the table has several.
    `report` is that of the training (history, plan, warnings, ...).
    """

    name: str
    label: str
    phase: Phase
    recipe: str
    run_id: str
    version: str
    candidate: str
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """Figures of one predictor over the whole bank, with intervals by document.

    `pools` holds the expected Hit@1/5/10 in a pool of so many candidates, from the same raw ranks;
    it lacks pools that exceed the bank, and is empty for ranks that were ordered anew.
    """

    figures: dict[str, float]
    ci95: dict[str, list[float]]
    pools: dict[int, dict[str, float]]


@dataclass(frozen=True)
class Row:
    """One phase of the table; `same_as` names an earlier row with the very same answers.

    `before` names the row that it is compared with: the phase that the table calls `after`, where
    that is shown above it, else the row above of its recipe.
    """

    trained: Trained
    measured: Measured
    order: str
    same_as: str | None
    before: str | None
    latency_ms: dict[str, float]

    @property
    def name(self) -> str:
        return self.trained.name


@dataclass(frozen=True)
class Free:
    """The free predictor of the best Hit@5 in one order of the answers."""

    name: str
    measured: Measured


@dataclass(frozen=True)
class Pair:
    """Paired Hit@5, Hit@10 of `later` - `earlier` on the same queries.

    `p_holm` is the p-value of Hit@5 after Holm over the pairs of one family, `detectable` the
    smallest true difference that these queries find in four of five cases; NaN where the two answer
    alike throughout.
    """

    later: str
    earlier: str
    hit_at_5: Difference
    hit_at_10: Difference
    detectable: float
    p_holm: float


@dataclass(frozen=True)
class PhaseComparison:
    """The table: its rows, each against the one before, each against the best free predictor.

    Rows ordered by lane meet the free predictor that is best when ordered so, `free_by_lane`.
    """

    rows: tuple[Row, ...]
    free: Free
    free_by_lane: Free | None
    successive: tuple[Pair, ...]
    leads: tuple[Pair, ...]
    num_queries: int
    num_documents: int
    num_answers: int
    num_rows: int

    @property
    def distinct(self) -> list[Row]:
        """Return the rows whose answers no earlier row has."""
        return [row for row in self.rows if row.same_as is None]

    @property
    def best(self) -> Row:
        """Return the row of the best Hit@5, the first of equals."""
        return max(self.rows, key=lambda row: row.measured.figures["hit_at_5"])

    @property
    def as_ranked(self) -> Row | None:
        """Return the first row that is not ordered anew, so that it has equivalents in pools."""
        return next((row for row in self.rows if row.order == NONE), None)

    def row(self, name: str) -> Row:
        """Return a row by its name."""
        return next(row for row in self.rows if row.name == name)

    def report(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return {
            "phases": [_row_report(row) for row in self.rows],
            "free": _free_report(self.free),
            "free_by_lane": None if self.free_by_lane is None else _free_report(self.free_by_lane),
            "successive": [asdict(pair) for pair in self.successive],
            "against_free": [asdict(pair) for pair in self.leads],
            "best": self.best.name,
            "queries": self.num_queries,
            "documents": self.num_documents,
            "answers": self.num_answers,
            "bank_rows": self.num_rows,
        }


def _free_report(one: Free) -> dict[str, Any]:
    return {"name": one.name, **asdict(one.measured)}


def _row_report(row: Row) -> dict[str, Any]:
    one, told = row.trained, row.trained.report
    published = one.phase.published
    return {
        "name": row.name,
        "phase": one.phase.name,
        "label": one.label,
        "recipe": one.recipe,
        "ctx": one.phase.ctx,
        "order": row.order,
        "same_as": row.same_as,
        "before": row.before,
        "run": one.run_id,
        "version": one.version,
        "published": None if published is None else published_report(published),
        **asdict(row.measured),
        "latency_ms": row.latency_ms,
        "plan": told["plan"],
        "optimiser_steps": told["optimiser_steps"],
        "epochs": len(told["history"]),
        "best_epoch": told["best_epoch"],
        "warnings": told["warnings"],
    }
