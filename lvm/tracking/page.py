"""What the page of a version shows: figures as tags, the description made of its tags."""

import re
from collections.abc import Mapping, Sequence

from lvm.report.tables import LEAKY_NOTE, page_table

HITS = {"hit_at_1": "Hit@1", "hit_at_5": "Hit@5", "hit_at_10": "Hit@10", "mrr_at_10": "MRR@10"}
CORRECTED = "corrected_hit_at_5"
# Prefix of the tags of a measurement: what it was.
VAL, SHADOW, LOG, DECIDED = "val_", "shadow_", "log_", "decision_"
MEASUREMENTS = {
    VAL: "val queries, end of training",
    SHADOW: "test queries, latest shadow-eval",
    LOG: "query log, latest shadow-eval",
    DECIDED: "the decision that gave it the alias",
}
Intervals = Mapping[str, Sequence[float | None]]


def figure_tags(
    figures: Mapping[str, float],
    ci95: Intervals,
    corrected: Mapping[str, float],
    corrected_ci95: Intervals,
) -> dict[str, str]:
    """Return the figures of one measurement as tags without a prefix: fraction [low, high]."""
    hit = {key: _cell(figures, ci95, key) for key in HITS}
    return hit | {CORRECTED: _cell(corrected, corrected_ci95, "hit_at_5")}


def description(tags: Mapping[str, str]) -> str:
    """Return the Markdown description of the version that has these tags."""
    named = {name: tags.get(name, "none") for name in ("phase", "recipe", "ctx", "bank", "split")}
    bank = f"{named['bank']} ({tags.get('bank_sha256', '')[:12]})"
    head = f"{tags.get('model')} ({tags.get('kind')}), ctx {named['ctx']}, recipe {named['recipe']}"
    blocks = [f"{head}, phase {named['phase']}; bank {bank}, split by {named['split']}"]
    if tags.get("leaky") == "True":
        blocks.append(f"**{LEAKY_NOTE}**")
    measured = {p: what for p, what in MEASUREMENTS.items() if f"{p}hit_at_5" in tags}
    if measured:
        lines = [
            [what, *(_percent(tags[prefix + key]) for key in (*HITS, CORRECTED))]
            for prefix, what in measured.items()
        ]
        headers = ["", *HITS.values(), "corrected Hit@5"]
        body = page_table(lines, headers, "l" + "r" * (len(headers) - 1))
        blocks.append(f"% of the queries [95 % interval by document]\n\n{body}")
    blocks += [_told(tags, prefix) for prefix in (SHADOW, LOG, DECIDED) if f"{prefix}run" in tags]
    return "\n\n".join(blocks)


def _told(tags: Mapping[str, str], prefix: str) -> str:
    run = tags[f"{prefix}run"]
    if prefix == DECIDED and "reason" in tags:
        return f"Took the alias by {_run_link(run)}: {tags['reason']}"
    keys = ("place", "queries", "documents", "source")
    place, queries, documents, source = (tags.get(prefix + key, "unknown") for key in keys)
    return (
        f"{MEASUREMENTS[prefix].capitalize()}: place {place} on {queries} queries from "
        f"{documents} documents ({source}), {_run_link(run)}"
    )


def _percent(cell: str) -> str:
    return re.sub(r"\d\.\d+", lambda number: f"{100 * float(number[0]):.1f}", cell)


def _run_link(run_id: str) -> str:
    return f"[run {run_id[:8]}](#/runs/{run_id})"


def _cell(figures: Mapping[str, float], ci95: Intervals, key: str) -> str:
    if key not in figures:
        return "none"
    low, high = ci95[key]
    if low is None or high is None:
        return f"{figures[key]:.4f} [unknown]"
    return f"{figures[key]:.4f} [{low:.4f}, {high:.4f}]"
