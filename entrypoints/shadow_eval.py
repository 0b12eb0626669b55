"""Command: paired replay of all candidates, gates, promotion."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from entrypoints._candidates import Field, choose_queries, gather, read_log
from entrypoints._inputs import BANK_HELP
from entrypoints._options import EntryPoint, option
from entrypoints._reports import HITS, REPORT_HELP, check_report, publish
from lvm import registry, tracking
from lvm.comparison import ShadowResult
from lvm.figures import forest_figure, rank_figure
from lvm.promotion import Decision, decide
from lvm.registry import BASELINE
from lvm.report import comparison_table, decision_text, shadow_markdown, shadow_table
from lvm.rules import read_gate_rules
from lvm.shadow import replay

FIGURES = {"forest.png": forest_figure, "ranks.png": rank_figure}


@dataclass(frozen=True)
class ShadowOptions:
    """Options of `shadow-eval`."""

    candidates: str = option("all", "all, or versions and URIs, separated by commas.")
    queries: str = option("test", "test, or a table (.parquet, .csv) with a column target_row.")
    promote: str = option(
        "dry_run", "Whether the winner takes the alias.", choices=("dry_run", "enabled")
    )
    bank: str | None = option(None, f"{BANK_HELP} auto: that of the newest candidate.")
    ctx: int | None = option(None, "Context of the free predictors; auto: the longest.", low=2)
    max_queries: int | None = option(None, "Queries at most; auto: 10,000.", low=1)
    report: str | None = option(None, REPORT_HELP, unset="none")

    def __post_init__(self) -> None:
        check_report(self.report)


def body(options: ShadowOptions) -> None:
    """Replay the same queries through every candidate, decide by the gates who is baseline."""
    is_enabled = options.promote == "enabled"
    if options.queries != "test":
        read_log(Path(options.queries))  # refused before anything is fitted or registered
    field = gather(options.candidates, options.bank, options.ctx, register=is_enabled)
    inputs = field.inputs
    queries = choose_queries(options.queries, inputs, options.max_queries)
    shown = {"bank": str(inputs.bank.path), "ctx": inputs.windows.ctx}
    tracking.log_config(asdict(options) | shown)
    result = replay(field.candidates, inputs.bank, inputs.windows, queries, field.baseline_name)
    rules = read_gate_rules()
    decision = decide(result, field.baseline_name, rules)
    log_figures(field, result)
    log_artifacts(result, decision)
    text = "\n\n".join(
        [shadow_table(result, decision), comparison_table(result), decision_text(decision)]
    )
    if is_enabled:
        apply(field, result, decision)
    else:
        text += "\n\ndry run: no alias was changed; promote=enabled changes it"
    tracking.log_text(text + "\n", "shadow.txt")
    print(text)
    publish(
        result.report() | {"decision": decision.report(), "rules": asdict(rules)}, options.report
    )


def apply(field: Field, result: ShadowResult, decision: Decision) -> None:
    """Move the alias as decided; raises ValueError where it has moved since the replay."""
    expected = field.baseline_version
    for name in decision.promote:
        version = field.predictors[name].version
        outcome = result.outcome(name)
        assert outcome is not None and version is not None
        low, high = outcome.ci95["hit_at_5"]
        evidence = {
            "decision_run": tracking.active_run_id(),
            "shadow_hit_at_5": f"{outcome.figures['hit_at_5']:.4f} [{low:.4f}, {high:.4f}]",
            "shadow_queries": str(result.num_queries),
            "shadow_bank_rows": str(result.num_rows),
            "replaced_version": str(expected).lower(),
            "reason": decision.reasons[decision.promote.index(name)],
        }
        registry.promote(version, expected, evidence)
        expected = version
    tracking.set_tags(
        {"decision": "promoted" if decision.promote else "kept", BASELINE: str(decision.winner)}
    )


def log_figures(field: Field, result: ShadowResult) -> None:
    """Log each candidate's figures with its model, the best last, so that the run shows it."""
    for outcome in reversed(result.outcomes):
        if not outcome.is_scored:
            continue
        model_id = field.predictors[outcome.name].model_id
        figures = {f"shadow/{key}": outcome.figures[key] for key in HITS}
        figures |= {f"shadow/{outcome.name}/{key}": outcome.figures[key] for key in HITS}
        tracking.log_metrics(figures, step=1, model_id=model_id, dataset=field.inputs.dataset)


def log_artifacts(result: ShadowResult, decision: Decision) -> None:
    """Log the report as Markdown, its figures, the per-query table."""
    for name, draw in FIGURES.items():
        tracking.log_figure(draw(result), name)
    tracking.log_text(shadow_markdown(result, decision, tuple(FIGURES)), "shadow.md")
    tracking.log_report(decision.report(), "decision.json")
    tracking.log_file("per_query.parquet", result.per_query.to_parquet)


main = EntryPoint("shadow-eval", ShadowOptions, body)

if __name__ == "__main__":
    sys.exit(main())
