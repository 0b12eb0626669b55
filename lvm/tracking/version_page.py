"""The page of a version in MLflow: its measurements as tags, told in Markdown."""

import re
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from lvm.models.facts import OWN_COUNTED, omits_own_document

METRICS = {"hit_at_1": "Hit@1", "hit_at_5": "Hit@5", "hit_at_10": "Hit@10", "mrr_at_10": "MRR@10"}
CORRECTED = "corrected_hit_at_5"
# Prefixes of a version's tags, each of one kind of measurement.
VAL, SHADOW, LOG, DECIDED = "val_", "shadow_", "log_", "decision_"
MEASUREMENTS = {
    VAL: "val queries, end of training",
    SHADOW: "test queries, latest shadow-eval",
    LOG: "query log, latest shadow-eval",
    DECIDED: "the decision that gave it the alias",
}
LEAKY_NOTE = "LEAKY: training saw rows of these queries; no figure here is evidence."
SPACE = "&ensp;"  # the tables of MLflow's pages have no space between their cells
Intervals = Mapping[str, Sequence[float | None]]


def metric_tags(
    metrics: Mapping[str, float],
    ci95: Intervals,
    corrected: Mapping[str, float],
    corrected_ci95: Intervals,
) -> dict[str, str]:
    """Return one measurement as tags without a prefix: `fraction [low, high]`.

    They have nine digits, so that a page that rounds them shows what other tables show.
    """
    plain = {key: _interval(metrics, ci95, key) for key in METRICS}
    return plain | {CORRECTED: _interval(corrected, corrected_ci95, "hit_at_5")}


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
            [what, *(SPACE + _percent(tags[prefix + key]) for key in (*METRICS, CORRECTED))]
            for prefix, what in measured.items()
        ]
        headers = ["", *(SPACE + name for name in (*METRICS.values(), "corrected Hit@5"))]
        columns = ["left"] + ["right"] * (len(headers) - 1)
        body = tabulate(lines, headers, "pipe", colalign=columns, disable_numparse=True)
        blocks.append(f"% of the queries [95 % interval by document]\n\n{body}")
        if not omits_own_document(int(tags.get("fit_version", 0))):
            blocks.append(f"Corrected as logged, by the older definition: {OWN_COUNTED}.")
    blocks += [_origin(tags, prefix) for prefix in (SHADOW, LOG, DECIDED) if f"{prefix}run" in tags]
    return "\n\n".join(blocks)


def _origin(tags: Mapping[str, str], prefix: str) -> str:
    """Return the sentence that says which run measured or decided."""
    run = tags[f"{prefix}run"]
    link = f"[run {run[:8]}](#/runs/{run})"
    if prefix == DECIDED and "reason" in tags:
        return f"Took the alias by {link}: {tags['reason']}"
    keys = ("place", "queries", "documents", "source")
    place, queries, documents, source = (tags.get(prefix + key, "unknown") for key in keys)
    verdict = tags.get(f"{prefix}verdict")
    return (
        f"{MEASUREMENTS[prefix].capitalize()}: place {place} on {queries} queries from "
        f"{documents} documents ({source}), {link}" + (f"; {verdict}" if verdict else "")
    )


def _percent(text: str) -> str:
    """Write each fraction of a tag in percent with one digit."""
    return re.sub(r"\d[\d.]*(?:e-\d+)?", lambda number: f"{100 * float(number[0]):.1f}", text)


def _interval(metrics: Mapping[str, float], ci95: Intervals, key: str) -> str:
    if key not in metrics:
        return "none"
    low, high = ci95[key]
    value = f"{metrics[key]:.9g}"
    return (
        f"{value} [unknown]" if low is None or high is None else f"{value} [{low:.9g}, {high:.9g}]"
    )
