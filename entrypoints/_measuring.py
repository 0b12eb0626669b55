"""What eval shares with lane-diagnostics: their options, one measurement of a predictor."""

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from entrypoints.options import BANK_HELP, REPORT_HELP, check_report, option
from lvm.evaluation.evaluate import Evaluation, evaluate
from lvm.models.table import FREE_MODELS
from lvm.report.tables import HITS
from lvm.tracking import runs as tracking
from lvm.tracking.alias import BASELINE_URI
from lvm.tracking.logged_models import Subject

MODEL_HELP = (
    "models:/lvm@baseline, models:/lvm/<version>, models:/lvm/latest, runs:/<id>/model or a free "
    f"predictor: {', '.join(FREE_MODELS)}."
)
MEASURED = "measured.parquet"


@dataclass(frozen=True)
class MeasureOptions:
    """Options of `eval`, shared by `lane-diagnostics`."""

    model: str = option(BASELINE_URI, MODEL_HELP)
    bank: str | None = option(None, f"{BANK_HELP} auto: the model's own.")
    ctx: int | None = option(None, "Rows of context; auto: the model's own.", low=2)
    split: str = option("test", "Split whose queries are asked.", choices=("test", "val"))
    max_queries: int | None = option(None, "Queries at most; auto: 10,000.", low=1)
    report: str | None = option(None, REPORT_HELP, unset="none")

    def __post_init__(self) -> None:
        check_report(self.report)


@dataclass(frozen=True)
class Measurement:
    """The report of one predictor; `evaluations` holds its own first, the free ones after it."""

    subject: Subject
    report: dict[str, Any]
    evaluations: list[Evaluation]

    def long_table(self) -> pd.DataFrame:
        """Return the per-query tables of all predictors below each other, named by `predictor`."""
        tables = [one.per_query.assign(predictor=one.name) for one in self.evaluations]
        return pd.concat(tables, ignore_index=True)


def measure_subject(subject: Subject, options: MeasureOptions) -> Measurement:
    """Evaluate the predictor beside the free ones; log the figures with it.

    The per-query tables say in `split` which queries they hold.
    """
    bank, windows = subject.inputs.bank, subject.inputs.windows
    plan = {"split_kind": windows.split, "split_seed": windows.seed}
    shown = vars(options) | {"ctx": windows.ctx, "bank": str(bank.path)}
    tracking.log_config(shown | plan)
    tracking.name_run(f"{subject.name} ctx {windows.ctx} {options.split}")
    tracking.set_tags(subject.tags())
    report, evaluations = evaluate(
        subject.name, subject.predictor.model, bank, windows, options.split, options.max_queries
    )
    evaluations = [
        replace(one, per_query=one.per_query.assign(split=options.split)) for one in evaluations
    ]
    report["leaky"] = subject.is_leaky()
    figures = {f"{options.split}/{key}": report[key] for key in HITS}
    figures[f"{options.split}/corrected_hit_at_5"] = report["corrected"]["hit_at_5"]
    tracking.log_metrics(
        figures, model_id=subject.predictor.model_id, dataset=subject.inputs.dataset
    )
    return Measurement(subject, report, evaluations)
