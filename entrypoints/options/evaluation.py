"""Options of the commands that ask predictors, and of those that move the alias."""

from dataclasses import dataclass, fields

from entrypoints.options.fields import (
    BANK_HELP,
    REGISTRY,
    REGISTRY_HELP,
    REPORT_HELP,
    Checked,
    option,
)

BASELINE_URI = "models:/lvm@baseline"
MODEL_HELP = (
    "A version's number, models:/lvm@baseline, models:/lvm/latest, runs:/<id>/model or a free "
    "predictor: copy-last, ema, context-mean, ridge, nn-successor, context-ridge."
)
RERANKS = ("none", "lane")
PROTOTYPES = "prototypes"


@dataclass(frozen=True)
class MeasureOptions(Checked):
    """What `eval` and `lane-diagnostics` measure."""

    model: str = option(BASELINE_URI, MODEL_HELP)
    bank: str | None = option(None, f"{BANK_HELP} auto: the model's own.")
    ctx: int | None = option(None, "Rows of context; auto: the model's own.", low=2)
    split: str = option("test", "Split whose queries are asked.", choices=("test", "val"))
    max_queries: int | None = option(None, "Queries at most; auto: 10,000.", low=1)
    registry: str = option(REGISTRY, REGISTRY_HELP)
    report: str | None = option(None, REPORT_HELP, unset="none")


@dataclass(frozen=True)
class EvalOptions(MeasureOptions):
    """Rank the true next passage among all rows of a bank.

    For a predictor and for the free ones, with intervals; controls, the serving index.
    """

    baselines: bool = option(True, "Measure the free predictors too.")
    controls: bool = option(
        True, "Ask with shorter, shuffled, reversed contexts, without parts of the model too."
    )
    rerank: str = option("none", "Order the best 200 again by the lane to come.", choices=RERANKS)


@dataclass(frozen=True)
class LaneOptions(MeasureOptions):
    """Judge a predictor lane by lane: proceed, or ingest."""

    eval_run: str | None = option(
        None, "Run of an eval whose answers are judged (none: measure here).", unset="none"
    )
    lanes: str = option(
        "bank",
        "The bank's labels, written domains, clusters.",
        choices=("bank", PROTOTYPES, "kmeans"),
    )
    encoder: str | None = option(
        None, "Encoder of the prototypes, wordllama or a local folder; auto: the bank's own."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_run is not None:
            _refuse_measuring(self)
        if self.encoder is not None and self.lanes != PROTOTYPES:
            raise ValueError(
                f"encoder: {self.encoder} would not be used with lanes={self.lanes}; give "
                f"lanes={PROTOTYPES}, or leave it at auto"
            )


def _refuse_measuring(options: LaneOptions) -> None:
    """Raise ValueError where an option says how to measure if a finished run is judged."""
    for field in fields(MeasureOptions):
        if field.name != "report" and getattr(options, field.name) != field.default:
            raise ValueError(
                f"{field.name}: would not be used, eval_run measured with its own; leave it out"
            )


@dataclass(frozen=True)
class ShadowOptions(Checked):
    """Replay all candidates, decide who is the baseline.

    All answer the same queries; the gates decide.
    """

    candidates: str = option(
        "all", "all, or versions, models:/lvm@<alias>, runs:/<id>/model, models:/m-<id>, by commas."
    )
    queries: str = option(
        "test",
        "test, or a log of target_row and sequence (csv too) or context_rows: .parquet, .jsonl.",
    )
    promote: str = option(
        "dry_run", "Whether the winner takes the alias.", choices=("dry_run", "enabled")
    )
    bank: str | None = option(
        None, f"{BANK_HELP} auto: of the first candidate named, or the newest trained."
    )
    ctx: int | None = option(None, "Context of the free predictors; auto: the longest.", low=2)
    max_queries: int | None = option(None, "Queries at most; auto: 10,000.", low=1)
    rerank: str = option("none", "Show every candidate re-ranked by lane, too.", choices=RERANKS)
    registry: str = option(REGISTRY, REGISTRY_HELP)
    report: str | None = option(None, REPORT_HELP, unset="none")


@dataclass(frozen=True)
class PredictOptions(Checked):
    """Retrieve the passages that most likely come next."""

    model: str = option(BASELINE_URI, MODEL_HELP)
    text: str | None = option(
        None, "File that is the context: .txt, .md, .rst or .html.", unset="none"
    )
    context: str | None = option(None, "Contexts as .npy, (T, D) or (B, T, D) float.", unset="none")
    k: int = option(5, "Passages to retrieve.", low=1, high=1000)
    rerank: str = option("none", "Re-rank the best 200 by the predicted lane.", choices=RERANKS)
    keep_context: bool = option(False, "Also show passages that the context holds.")
    bank: str | None = option(None, f"{BANK_HELP} auto: the model's own.")
    ctx: int | None = option(None, "Rows of context at most; auto: the model's own.", low=2)
    format: str = option("table", "What is printed.", choices=("table", "json"))
    registry: str = option(REGISTRY, REGISTRY_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.text is None) == (self.context is None):
            raise ValueError("text, context: give exactly one of the two files")


@dataclass(frozen=True)
class PromoteOptions:
    """Make a version the baseline by hand, with a reason.

    The gates are passed over; the reason is logged.
    """

    version: str | None = option(None, "Version of lvm to promote; needed.", unset="none")
    reason: str | None = option(None, "Why, in a few words; needed.", unset="none")
    registry: str = option(REGISTRY, REGISTRY_HELP)

    def __post_init__(self) -> None:
        if self.version is None:
            raise ValueError("version: none was given; name the version of lvm to promote")
        if self.reason is None:
            raise ValueError("reason: none was given; say why the gates are passed over")


@dataclass(frozen=True)
class RollbackOptions:
    """Restore the previous baseline."""

    registry: str = option(REGISTRY, REGISTRY_HELP)
