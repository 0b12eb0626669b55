"""Command: paired replay of all candidates, gates, promotion."""

if __name__ == "__main__":
    from entrypoints import start_command

    start_command()

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from entrypoints.options import BANK_HELP, REPORT_HELP, EntryPoint, check_report, option
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
from lvm.report.tables import HITS
from lvm.retrieval.rerank import LANE, NONE, RERANKS
from lvm.shadow.comparison import ShadowResult, reranked_outcomes
from lvm.shadow.decision import Decision
from lvm.shadow.processes import Replayer
from lvm.shadow.query_log import choose_queries, read_query_log
from lvm.shadow.replay import lane_predictor, replay
from lvm.system.thresholds import read_gate_rules
from lvm.tracking import alias
from lvm.tracking import runs as tracking
from lvm.tracking.alias import BASELINE
from lvm.tracking.candidates import Field, Wanted, gather
from lvm.tracking.datasets import DEFAULT_BANK, read_bank
from lvm.tracking.promotion import promote_winner, tag_measured
from lvm.tracking.runs import publish_report

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
    wanted = Wanted(
        candidates=options.candidates,
        bank=options.bank,
        ctx=options.ctx,
        by_lane=options.rerank == LANE,
        register=is_enabled,
    )
    field = gather(wanted, lambda path: read_bank(path or DEFAULT_BANK), log)
    bank, windows = field.bank, field.windows
    queries, source = choose_queries(log, bank, windows, options.max_queries)
    tracking.log_config(asdict(options) | {"bank": str(bank.path), "ctx": windows.ctx})
    tracking.name_run(f"{len(field.candidates)} candidates ctx {windows.ctx}")
    rules = read_gate_rules()
    by_lane = lane_predictor(bank, windows) if wanted.by_lane else None
    limit_ms = rules.latency_p95_ms
    with Replayer(note=tqdm.write, limit_ms=limit_ms, predict_lanes=by_lane) as measure:
        result = replay(
            field.candidates, bank, windows, queries, field.baseline_name, measure=measure
        )
    result = replace(result, source=source, is_log=log is not None)
    log_figures(field, result)
    reranked = [] if by_lane is None else reranked_outcomes(result, bank)
    run_id = tracking.active_run_id()
    tag_measured(result, field.versions, run_id)

    def publish_decision(decision: Decision, failure: str | None = None) -> None:
        log_artifacts(result, decision, failure)
        text = summary(result, decision, is_enabled, failure)
        tracking.log_artifact(text + "\n", "shadow.txt")
        note = shadow_note(result, decision, is_enabled)
        tracking.describe_run(note if failure is None else f"**{failure}**\n\n{note}")
        print(text if failure is None else failure, flush=True)
        told = {"decision": decision.report() | {"failure": failure}, "rules": asdict(rules)}
        if reranked:
            shown = reranked_table(reranked, result.leaky)
            tracking.log_artifact(shown + "\n", "reranked.txt")
            print(f"\n{shown}", flush=True)
            told["reranked"] = {one.name: one.report() for one in reranked}
        publish_report(result.report() | told, options.report)

    def tell_failure(decision: Decision, moved: tuple[str, ...], reason: str) -> None:
        tracking.set_tags({"decision": "promotion failed"})
        publish_decision(decision, decision.not_carried_out(moved, reason))

    settled = tell_failure if is_enabled else None
    decision = promote_winner(result, field.versions, rules, run_id, publish_decision, settled)
    tracking.log_artifact({"moves": alias.history()}, "history.json")
    if is_enabled:
        outcome = "promoted" if decision.promote else "kept"
        tracking.set_tags({"decision": outcome, BASELINE: str(decision.winner)})


def summary(result: ShadowResult, decision: Decision, is_enabled: bool, failure: str | None) -> str:
    """Return the text for the terminal; a failed promotion is reported at its end."""
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
    """Log each candidate's figures with its model; the best comes last, so that the run shows it.

    Figures on a query log have their own names, since they are not those of the test split.
    """
    prefix = "shadow_log" if result.is_log else "shadow"
    model_ids = {one.name: one.model_id for one in field.candidates}
    for outcome in reversed(result.outcomes):
        if outcome.is_scored:
            figures = {f"{prefix}/{key}": outcome.figures[key] for key in HITS}
            figures |= {f"{prefix}/{outcome.name}/{key}": outcome.figures[key] for key in HITS}
            model_id = model_ids[outcome.name]
            tracking.log_metrics(figures, step=1, model_id=model_id, dataset=field.dataset)


def log_artifacts(result: ShadowResult, decision: Decision, failure: str | None) -> None:
    """Log the report as Markdown, its figures and the per-query table.

    If the promotion failed afterwards, replace the report and the decision.
    """
    text = shadow_markdown(result, decision, tuple(FIGURES), alias.history())
    tracking.log_artifact(text if failure is None else f"**{failure}**\n\n{text}", "report.md")
    tracking.log_artifact(decision.report() | {"failure": failure}, "decision.json")
    if failure is None:
        for name, draw in FIGURES.items():
            tracking.log_artifact(draw(result), name)
        tracking.log_artifact(result.per_query, "per_query.parquet")


main = EntryPoint("shadow-eval", ShadowOptions, body)

if __name__ == "__main__":
    sys.exit(main())
