"""Command: paired replay of all candidates, gates, promotion."""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from entrypoints._candidates import Field, Wanted, choose_queries, gather
from entrypoints._inputs import BANK_HELP, Inputs
from entrypoints._options import EntryPoint, option
from entrypoints._reports import HITS, REPORT_HELP, check_report, publish
from lvm.report.notes import shadow_note
from lvm.report.shadow import (
    comparison_table,
    decision_text,
    forest_figure,
    origin_note,
    rank_figure,
    reranked_table,
    shadow_lane_figure,
    shadow_markdown,
    shadow_table,
)
from lvm.retrieval.rerank import LANE, NONE, RERANKS, LanePrediction, predict_lanes
from lvm.shadow.comparison import ShadowResult
from lvm.shadow.decision import Decision
from lvm.shadow.process import Replayer
from lvm.shadow.query_log import read_query_log
from lvm.shadow.replay import replay
from lvm.shadow.reranked import reranked_outcomes
from lvm.system.thresholds import read_gate_rules
from lvm.tracking import alias
from lvm.tracking import runs as tracking
from lvm.tracking.alias import BASELINE
from lvm.tracking.promotion import settle, tag_measured
from lvm.windows.queries import Queries

FIGURES = {"forest.png": forest_figure, "hits.png": rank_figure, "lanes.png": shadow_lane_figure}


@dataclass(frozen=True)
class ShadowOptions:
    """Options of `shadow-eval`."""

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
    rerank: str = option(NONE, "Show every candidate re-ranked by lane, too.", choices=RERANKS)
    report: str | None = option(None, REPORT_HELP, unset="none")

    def __post_init__(self) -> None:
        check_report(self.report)


def body(options: ShadowOptions) -> None:
    """Replay the same queries through every candidate, decide by the gates who is baseline."""
    is_enabled = options.promote == "enabled"
    log = None if options.queries == "test" else read_query_log(Path(options.queries))
    wanted = Wanted(options.candidates, options.bank, options.ctx, options.rerank == LANE)
    field = gather(wanted, is_enabled, log)
    inputs = field.inputs
    queries, source = choose_queries(log, inputs, options.max_queries)
    shown = {"bank": str(inputs.bank.path), "ctx": inputs.windows.ctx}
    tracking.log_config(asdict(options) | shown)
    tracking.name_run(f"{len(field.entrants)} candidates ctx {inputs.windows.ctx}")
    rules = read_gate_rules()
    by_lane = foretelling(inputs) if options.rerank == LANE else None
    limit_ms = rules.latency_p95_ms
    with Replayer(note=tqdm.write, limit_ms=limit_ms, foretell=by_lane) as measure:
        result = replay(
            field.candidates,
            inputs.bank,
            inputs.windows,
            queries,
            field.baseline_name,
            measure=measure,
        )
    result = replace(result, source=source, is_log=log is not None)
    log_figures(field, result)
    reranked = [] if by_lane is None else reranked_outcomes(result, inputs.bank)
    run_id = tracking.active_run_id()
    tag_measured(result, field.versions, run_id)

    def publish_decision(decision: Decision, failure: str | None = None) -> None:
        log_artifacts(result, decision, failure)
        text = summary(result, decision, is_enabled, failure)
        tracking.log_text(text + "\n", "shadow.txt")
        note = shadow_note(result, decision, is_enabled)
        tracking.describe_run(note if failure is None else f"**{failure}**\n\n{note}")
        print(text if failure is None else failure, flush=True)
        told = {"decision": decision.report() | {"failure": failure}, "rules": asdict(rules)}
        if reranked:
            shown = reranked_table(reranked, result.leaky)
            tracking.log_text(shown + "\n", "reranked.txt")
            print(f"\n{shown}", flush=True)
            told["reranked"] = {one.name: one.report() for one in reranked}
        publish(result.report() | told, options.report)

    def tell_failure(decision: Decision, moved: tuple[str, ...], reason: str) -> None:
        tracking.set_tags({"decision": "promotion failed"})
        publish_decision(decision, failure_line(decision, moved, reason))

    settled = tell_failure if is_enabled else None
    decision = settle(result, field.versions, rules, run_id, publish_decision, settled)
    tracking.log_report({"moves": alias.history()}, "history.json")
    if is_enabled:
        outcome = "promoted" if decision.promote else "kept"
        tracking.set_tags({"decision": outcome, BASELINE: str(decision.winner)})


def foretelling(inputs: Inputs) -> Callable[[Queries], LanePrediction]:
    """Return what foretells the lanes of queries, once for each length of context."""
    known: dict[int, LanePrediction] = {}

    def ask(queries: Queries) -> LanePrediction:
        if queries.ctx not in known:
            seed = inputs.windows.seed
            known[queries.ctx] = predict_lanes(inputs.bank, inputs.windows, queries, seed)
        return known[queries.ctx]

    return ask


def failure_line(decision: Decision, moved: tuple[str, ...], reason: str) -> str:
    """Say how far a promotion came before it failed."""
    holder = moved[-1] if moved else decision.baseline or "none"
    missed = ", then ".join(decision.promote[len(moved) :])
    return f"NOT CARRIED OUT: {missed} did not take the alias ({reason}); baseline is {holder}"


def summary(result: ShadowResult, decision: Decision, is_enabled: bool, failure: str | None) -> str:
    """Return what the terminal shows; a promotion that failed is told at its end."""
    blocks = [
        shadow_table(result, decision),
        comparison_table(result),
        origin_note(result),
        decision_text(decision),
    ]
    if failure is not None:
        blocks.append(failure)
    if not is_enabled:
        blocks.append("dry run: no alias was changed; promote=enabled changes it")
    return "\n\n".join(blocks)


def log_figures(field: Field, result: ShadowResult) -> None:
    """Log each candidate's figures with its model, the best last, so that the run shows it.

    Those on a query log have names of their own: they are no figures on the frozen test split.
    """
    prefix = "shadow_log" if result.is_log else "shadow"
    for outcome in reversed(result.outcomes):
        if not outcome.is_scored:
            continue
        model_id = field.entrants[outcome.name].card.model_id
        figures = {f"{prefix}/{key}": outcome.figures[key] for key in HITS}
        figures |= {f"{prefix}/{outcome.name}/{key}": outcome.figures[key] for key in HITS}
        tracking.log_metrics(figures, step=1, model_id=model_id, dataset=field.inputs.dataset)


def log_artifacts(result: ShadowResult, decision: Decision, failure: str | None) -> None:
    """Log the report as Markdown, its figures, the per-query table.

    Where the promotion failed afterwards, the text and the decision are replaced.
    """
    text = shadow_markdown(result, decision, tuple(FIGURES), alias.history())
    tracking.log_text(text if failure is None else f"**{failure}**\n\n{text}", "report.md")
    tracking.log_report(decision.report() | {"failure": failure}, "decision.json")
    if failure is None:
        for name, draw in FIGURES.items():
            tracking.log_figure(draw(result), name)
        tracking.log_file("per_query.parquet", result.per_query.to_parquet)


main = EntryPoint("shadow-eval", ShadowOptions, body)

if __name__ == "__main__":
    sys.exit(main())
