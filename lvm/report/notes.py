"""Descriptions of runs for MLflow: the key figures as a small Markdown table."""

from collections.abc import Mapping, Sequence
from typing import Any

from lvm.evaluation.intervals import points
from lvm.evaluation.lane_diagnosis import Diagnosis
from lvm.report.tables import (
    HITS,
    LEAKY,
    MARKDOWN,
    bullet,
    captioned,
    interval_cell,
    percent,
    read_difference,
    table,
)
from lvm.shadow.comparison import Outcome, ShadowResult
from lvm.shadow.decision import Decision

SPACE = "&ensp;"  # the tables of MLflow's pages have no space between their cells
SHOWN = 10  # lines of a table that grows with its candidates: a description has little room


def training_note(report: Mapping[str, Any], version: str | None) -> str:
    """Return what a training reached on val, beside the best free predictor."""
    registered = "not registered" if version is None else f"version {version} of lvm"
    last = len(report["history"])
    blocks = [_headline(report), f"Best epoch {report['best_epoch']} of {last}; {registered}."]
    blocks.append(_figures(report))
    if report["warnings"]:
        blocks.append(_bullets(f"warning: {warning}" for warning in report["warnings"]))
    return "\n\n".join(blocks)


def evaluation_note(report: Mapping[str, Any]) -> str:
    """Return the figures of one predictor, beside the best free one."""
    blocks = [_headline(report), _figures(report)]
    best = report["best_baseline"]
    if best is not None:
        difference = points(read_difference(best["hit_at_5_difference"]))
        blocks.append(f"Against {best['name']}: Hit@5 {difference} points on the same queries.")
    return "\n\n".join(blocks)


def shadow_note(result: ShadowResult, decision: Decision, is_enabled: bool) -> str:
    """Return the decision, the first of the ranking, the reasons."""
    mode = "" if is_enabled else " (dry run: no alias was changed)"
    scored = [one for one in result.outcomes if one.is_scored]
    lines = [_outcome_line(one, decision) for one in scored[:SHOWN]]
    headers = ["candidate", "ctx", "Hit@5 %", "corrected Hit@5 %", ""]
    caption = [_asked(result.num_queries, result.num_documents, result.num_rows)]
    blocks = [
        f"**Baseline: {decision.winner or 'none'}**{mode}",
        captioned(caption, page_table(lines, headers, "lrrrl"), result.leaky),
        _bullets(decision.reasons[:SHOWN]),
    ]
    return "\n\n".join(blocks)


def lanes_note(diagnosis: Diagnosis) -> str:
    """Return the decision, Hit@5 of each lane from the lowest up."""
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
    """Return how a whole pipeline ended: data, what the replay asked, the decision, its reasons."""
    decision = shadow["decision"]
    asked = _asked(shadow["num_queries"], shadow["num_documents"], shadow["num_rows"])
    blocks = [
        f"**Baseline: {decision['winner'] or 'none'}**",
        f"{bank}, ctx {ctx:,}: {asked}",
        _bullets(decision["reasons"][:SHOWN]),
    ]
    return "\n\n".join(blocks)


def counts_note(counts: Mapping[str, object], remarks: Sequence[str] = ()) -> str:
    """Return what a run made, a line a name; numbers have thousands separated."""
    lines = [
        [name, f"{value:,}" if isinstance(value, int) else str(value)]
        for name, value in counts.items()
    ]
    blocks = [page_table(lines, ["", ""], "lr")]
    return "\n\n".join([*blocks, _bullets(remarks)] if remarks else blocks)


def page_table(lines: Sequence[Sequence[str]], headers: Sequence[str], alignment: str) -> str:
    """Return a Markdown table for MLflow's pages."""
    spaced = [[first, *(SPACE + cell for cell in others)] for first, *others in lines]
    names = [headers[0], *(SPACE + name for name in headers[1:])]
    return table(spaced, names, alignment, MARKDOWN)


def _best_free(report: Mapping[str, Any]) -> str | None:
    free = report["baselines"]
    return max(free, key=lambda name: free[name]["hit_at_5"], default=None)


def _headline(report: Mapping[str, Any]) -> str:
    """Return what a folded description still shows."""
    told = interval_cell(report["hit_at_5"], report["ci95"]["hit_at_5"])
    line = f"**Hit@5 {told} %** on {report['split']}"
    best = _best_free(report)
    if best is None:
        return f"{line}."
    rival = percent(report["baselines"][best]["hit_at_5"])
    return f"{line}; {best}, the best free predictor: {rival} %."


def _figures(report: Mapping[str, Any]) -> str:
    """Return the predictor's plain and corrected Hit@k, those of the best free one below."""
    rows = {report["model"]: report}
    best = _best_free(report)
    if best is not None:
        rows[f"{best} (best free)"] = report["baselines"][best]
    lines = []
    for name, entry in rows.items():
        lines.append([name, "plain", *_hit_cells(entry)])
        if entry.get("corrected"):
            lines.append([name, "corrected", *_hit_cells(entry["corrected"])])
    headers = ["predictor", "score", "Hit@1 %", "Hit@5 %", "Hit@10 %"]
    asked = _asked(report["queries"], report["documents"], report["bank_rows"])
    caption = [f"{report['split']}, ctx {report['ctx']:,}: {asked}"]
    return captioned(caption, page_table(lines, headers, "llrrr"), bool(report["leaky"]))


def _asked(queries: int, documents: int, rows: int) -> str:
    return (
        f"{queries:,} queries from {documents:,} documents over {rows:,} bank rows "
        "[95 % interval by document]"
    )


def _hit_cells(entry: Mapping[str, Any]) -> list[str]:
    return [interval_cell(entry[key], entry["ci95"][key]) for key in HITS]


def _outcome_line(one: Outcome, decision: Decision) -> list[str]:
    marks = ["baseline"] * (one.name == decision.winner) + [one.kind] + [LEAKY] * bool(one.leak)
    corrected = "" if not one.corrected else percent(one.corrected["hit_at_5"])
    hit = interval_cell(one.figures["hit_at_5"], one.ci95["hit_at_5"])
    return [one.name, f"{one.ctx:,}", hit, corrected, ", ".join(marks)]


def _bullets(lines: Any) -> str:
    return "\n".join(bullet(MARKDOWN) + line for line in lines)
