"""Command: paired replay of all candidates, gates, promotion."""

if __name__ == "__main__":
    from entrypoints.cli import start

    start("shadow-eval")

from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from entrypoints.cli import EntryPoint
from entrypoints.options import ShadowOptions
from lvm.report.shadow import reranked_table
from lvm.shadow.comparison import reranked_outcomes
from lvm.shadow.promotion_gates import Decision
from lvm.shadow.query_log import Requests, choose_queries, read_query_log
from lvm.shadow.replay import replay, stage_opener
from lvm.shadow.workers import Replayer
from lvm.system.settings import read_gate_rules
from lvm.tracking import runs
from lvm.tracking.candidates import (
    Wanted,
    gather,
    log_artifacts,
    log_figures,
    promote_winner,
    tag_measured,
)
from lvm.tracking.initial import without_twins
from lvm.tracking.registry import BASELINE, Registry
from lvm.tracking.runs import publish_report


def body(options: ShadowOptions) -> None:
    """Replay the same queries through every candidate; decide by the gates who is baseline."""
    is_enabled = options.promote == "enabled"
    log = None if options.queries == "test" else read_query_log(Path(options.queries))
    chosen = (options.candidates, options.bank, options.ctx)
    wanted = Wanted(*chosen, options.rerank, is_enabled, Registry(options.registry))
    field = gather(wanted, log)
    bank, windows, registry = field.bank, field.windows, field.registry
    queries, source = choose_queries(log, bank, windows, options.max_queries)
    queries, omitted = without_twins(queries, field.candidates)
    if omitted:
        source += f"; {omitted}"
    runs.log_config(asdict(options) | {"bank": str(bank.path), "ctx": windows.ctx})
    if isinstance(log, Requests):
        runs.log_artifact(log.in_bank(bank).table(), "queries.parquet")
    runs.name_run(f"{len(field.candidates)} candidates ctx {windows.ctx}")
    rules = read_gate_rules()
    open_stage = stage_opener(wanted.rerank, bank, windows)
    limit_ms = rules.latency_p95_ms
    with Replayer(note=tqdm.write, limit_ms=limit_ms, open_stage=open_stage) as measure:
        result = replay(
            field.candidates, bank, windows, queries, field.baseline_name, measure=measure
        )
    num_earlier = runs.count_decisions(result.queries_sha256)
    runs.set_tags({"queries_sha256": result.queries_sha256})
    result = replace(result, source=source, is_log=log is not None, num_earlier=num_earlier)
    log_figures(field.candidates, result, field.dataset)
    reranked = [] if open_stage is None else reranked_outcomes(result, bank)
    run_id = runs.active_run_id()

    def publish_decision(decision: Decision, failure: str | None = None) -> None:
        text = log_artifacts(result, decision, registry.history(), is_enabled, failure)
        print(text if failure is None else failure, flush=True)
        report = {"decision": decision.report() | {"failure": failure}, "rules": asdict(rules)}
        if reranked:
            shown = reranked_table(reranked, wanted.rerank, result.leaky)
            runs.log_artifact(shown + "\n", "reranked.txt")
            print(f"\n{shown}", flush=True)
            report["reranked"] = {one.name: one.report() for one in reranked}
        publish_report(result.report() | report, options.report)
        verdicts = decision.verdicts_of(is_enabled, failure)
        tag_measured(registry, result, field.versions, run_id, verdicts)

    def tell_failure(decision: Decision, moved: tuple[str, ...], reason: str) -> None:
        runs.set_tags({"decision": "promotion failed"})
        publish_decision(decision, decision.not_carried_out(moved, reason))

    settled = tell_failure if is_enabled else None
    decision = promote_winner(
        registry, result, field.versions, rules, run_id, publish_decision, settled
    )
    runs.log_artifact({"moves": registry.history()}, "history.json")
    if is_enabled:
        outcome = "promoted" if decision.promote else "kept"
        runs.set_tags({"decision": outcome, BASELINE: str(decision.winner)})


main = EntryPoint("shadow-eval", ShadowOptions, body)
