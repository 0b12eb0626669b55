"""Descriptions of runs for MLflow: the key figures as a small Markdown table."""

from collections.abc import Mapping, Sequence
from typing import Any

from lvm.evaluation.lane_diagnosis import Diagnosis
from lvm.evaluation.metrics import points
from lvm.report.tables import (
    HIT_HEADERS,
    LEAKY,
    MARKDOWN,
    bullets,
    captioned,
    hit_cells,
    interval_cell,
    page_table,
    percent,
    read_difference,
)
from lvm.shadow.comparison import Outcome, ShadowResult
from lvm.shadow.decision import Decision

DRY_RUN = "Dry run: no alias is changed; promote=enabled changes it."
SHOWN = 10  # candidates and reasons at most: MLflow limits the length of a description


def training_note(report: Mapping[str, Any], registered: str) -> str:
    """Return the val figures of a training beside those of the best free predictor.

    `registered` says as which version of which registry.
    """
    last = len(report["history"])
    blocks = [_headline(report), f"Best epoch {report['best_epoch']} of {last}; {registered}."]
    blocks.append(_figures(report))
    if report["warnings"]:
        blocks.append(bullets((f"warning: {warning}" for warning in report["warnings"]), MARKDOWN))
    return "\n\n".join(blocks)


def evaluation_note(report: Mapping[str, Any]) -> str:
    """Return the figures of one predictor beside those of the best free one."""
    blocks = [_headline(report), _figures(report)]
    best = report["best_baseline"]
    if best is not None:
        served = points(read_difference(best["corrected_hit_at_5_difference"]))
        plain = points(read_difference(best["hit_at_5_difference"]))
        blocks.append(
            f"Against {best['name']}: Hit@5 {served} points as served, plain {plain} points, on "
            "the same queries."
        )
    return "\n\n".join(blocks)


def shadow_note(result: ShadowResult, decision: Decision, is_enabled: bool) -> str:
    """Return the decision, the top candidates, the reasons."""
    mode = "" if is_enabled else f"{DRY_RUN} "
    scored = [one for one in result.outcomes if one.is_scored]
    lines = [_outcome_line(one, decision) for one in scored[:SHOWN]]
    headers = ["candidate", "ctx", "Hit@5 % as served", "plain Hit@5 %", ""]
    caption = [_asked(result.num_queries, result.num_documents, result.num_rows)]
    blocks = [
        f"{mode}**Baseline: {decision.winner or 'none'}**",
        captioned(caption, page_table(lines, headers, "lrrrl"), result.leaky),
        bullets(decision.reasons[:SHOWN], MARKDOWN),
    ]
    return "\n\n".join(blocks)


def lanes_note(diagnosis: Diagnosis) -> str:
    """Return the decision and Hit@5 of each lane, from the lowest up."""
    lanes = sorted(diagnosis.lanes, key=lambda lane: lane.figures["hit_at_5"])
    lines = [
        [
            lane.lane,
            f"{lane.num_queries:,}",
            interval_cell(lane.figures["hit_at_5"], lane.ci95["hit_at_5"]),
            "WEAK" if lane.lane in diagnosis.weak else "",
        ]
        for lane in lanes
    ]
    body = page_table(lines, ["lane", "queries", "Hit@5 %", ""], "lrrl")
    return captioned([f"**{diagnosis.sentence}**"], body, diagnosis.leaky)


def pipeline_note(bank: str, ctx: int, shadow: Mapping[str, Any]) -> str:
    """Return how a pipeline ended: its data, the queries of the replay, the decision, reasons."""
    decision = shadow["decision"]
    asked = _asked(shadow["num_queries"], shadow["num_documents"], shadow["num_rows"])
    blocks = [
        f"**Baseline: {decision['winner'] or 'none'}**",
        f"{bank}, ctx {ctx:,}: {asked}",
        bullets(decision["reasons"][:SHOWN], MARKDOWN),
    ]
    return "\n\n".join(blocks)


def counts_note(counts: Mapping[str, object], remarks: Sequence[str] = ()) -> str:
    """Return what a run made, one line a name, numbers with separated thousands."""
    lines = [
        [name, f"{value:,}" if isinstance(value, int) else str(value)]
        for name, value in counts.items()
    ]
    blocks = [page_table(lines, ["", ""], "lr")]
    return "\n\n".join([*blocks, bullets(remarks, MARKDOWN)] if remarks else blocks)


def _best_free(report: Mapping[str, Any]) -> str | None:
    free = report["baselines"]
    return max(free, key=lambda name: _served(free[name])["hit_at_5"], default=None)


def _served(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the figures of the served order: corrected, where a run has these."""
    corrected: Mapping[str, Any] = entry.get("corrected") or entry
    return corrected


def _headline(report: Mapping[str, Any]) -> str:
    """Return the line that MLflow shows of a folded description."""
    served = _served(report)
    hit = interval_cell(served["hit_at_5"], served["ci95"]["hit_at_5"])
    line = f"**Hit@5 {hit} %** as served on {report['split']}"
    best = _best_free(report)
    if best is None:
        return f"{line}."
    rival = percent(_served(report["baselines"][best])["hit_at_5"])
    return f"{line}; {best}, the best free predictor: {rival} %."


def _figures(report: Mapping[str, Any]) -> str:
    """Return plain and corrected Hit@k of the predictor, then of the best free one."""
    rows = {report["model"]: report}
    best = _best_free(report)
    if best is not None:
        rows[f"{best} (best free)"] = report["baselines"][best]
    lines = []
    for name, entry in rows.items():
        lines.append([name, "plain", *hit_cells(entry, entry["ci95"])])
        corrected = entry.get("corrected")
        if corrected:
            lines.append([name, "corrected", *hit_cells(corrected, corrected["ci95"])])
    headers = ["predictor", "score", *HIT_HEADERS]
    asked = _asked(report["queries"], report["documents"], report["bank_rows"])
    caption = [f"{report['split']}, ctx {report['ctx']:,}: {asked}"]
    return captioned(caption, page_table(lines, headers, "llrrr"), bool(report["leaky"]))


def _asked(queries: int, documents: int, rows: int) -> str:
    return (
        f"{queries:,} queries from {documents:,} documents over {rows:,} bank rows "
        "[95 % interval by document]"
    )


def _outcome_line(one: Outcome, decision: Decision) -> list[str]:
    marks = ["baseline"] * (one.name == decision.winner) + [one.kind] + [LEAKY] * bool(one.leak)
    hit = interval_cell(one.served["hit_at_5"], one.served_ci95["hit_at_5"])
    plain = percent(one.figures["hit_at_5"])
    return [one.name, f"{one.ctx:,}", hit, plain, ", ".join(marks)]
