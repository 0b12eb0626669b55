"""Tables of lanes: what search allows in them, how they agree with labels."""

from lvm.evaluation.lane_assignment import Agreement, Assignment
from lvm.evaluation.lane_ceilings import Ceilings, LaneCeiling
from lvm.evaluation.lane_diagnosis import Diagnosis
from lvm.report.tables import (
    HITS,
    TEXT,
    captioned,
    difference_cell,
    interval_cell,
    percent,
    table,
)
from lvm.retrieval.lanes import UNASSIGNED_LANE


def ceilings_table(ceilings: Ceilings, leaky: bool, style: str = TEXT) -> str:
    """Return the ceilings of each lane, Hit@k of a larger k, what limits."""
    entries = [*ceilings.lanes, ceilings.all_lanes]
    lines = [
        [
            lane.lane,
            percent(lane.oracle_hit_at_5),
            percent(lane.oracle_exact_hit_at_10),
            percent(lane.oracle_index_hit_at_10),
            percent(lane.agreement),
            percent(lane.hits_corrected["10"]),
            percent(lane.hits_served["10"]),
            difference_cell(lane.served_difference),
            lane.limited_by,
        ]
        for lane in entries
    ]
    headers = ["lane", "truth\n@5", "truth\n@10*", "by index\n@10*", "agreement", "exact\n@10*"]
    headers += ["served\n@10*", "served - exact", "limited\nby"]
    caption = [
        "Ceilings, %: search with the truth itself, exactly or through the index; Hit@10 of the",
        "model, exactly or served. *: corrected, nothing removed. Serving:",
        ceilings.index,
    ]
    first = captioned(caption, table(lines, headers, "lrrrrrrrl", style), leaky)
    return "\n\n".join([first, _larger_k_table(entries, leaky, style), ceilings.sentence()])


def _larger_k_table(entries: list[LaneCeiling], leaky: bool, style: str) -> str:
    lines = []
    for lane in entries:
        shown = [percent(hit) for hit in lane.hits.values()]
        served = [
            f"{100 * (lane.hits_served[k] - hit):+.1f}" for k, hit in lane.hits_corrected.items()
        ]
        lines.append([lane.lane, *shown, " ".join(f"{value:>5}" for value in served)])
    headers = ["lane", *(f"@{int(k):,}" for k in entries[0].hits)]
    headers.append("served - exact @" + ", ".join(entries[0].hits_corrected))
    caption = ["Hit@k of a larger k, percent: exact, plain, filtered; points by serving"]
    body = table(lines, headers, "l" + "r" * (len(headers) - 1), style)
    return captioned(caption, body, leaky)


def hits_table(diagnosis: Diagnosis, style: str = TEXT) -> str:
    """Return Hit@1/5/10 of each lane with intervals, from the lowest Hit@5 up."""
    lanes = sorted(diagnosis.lanes, key=lambda lane: lane.figures["hit_at_5"])
    lines = [
        [lane.lane, *(interval_cell(lane.figures[key], lane.ci95[key]) for key in HITS)]
        for lane in lanes
    ]
    caption = [f"Hit@k of {diagnosis.model} in each lane [95 % interval by document]"]
    headers = ["lane", "Hit@1 %", "Hit@5 %", "Hit@10 %"]
    return captioned(caption, table(lines, headers, "lrrr", style), diagnosis.leaky)


def supply_line(diagnosis: Diagnosis) -> str:
    """Say which lanes have few chains."""
    few, least = diagnosis.small_supply, diagnosis.rules.min_chains
    if not few:
        return f"Supply: every lane has {least:,} chains or more."
    if len(few) == len(diagnosis.supply):
        return f"Supply: all {len(few)} lanes have fewer than {least:,} chains."
    return f"Supply: fewer than {least:,} chains in {', '.join(few)}."


def assignment_table(assignment: Assignment, agreement: Agreement | None, style: str = TEXT) -> str:
    """Return the rows of each assigned lane; beside the bank's own labels where it has any."""
    facts = assignment.facts
    num_assigned = sum(facts["rows"].values())
    total = num_assigned + facts["unassigned_rows"]
    caption = [f"Lanes by {assignment.method}: {num_assigned:,} of {total:,} rows assigned"]
    if facts.get("checked_rows") == 0:
        caption.append("No row has a text: nothing shows that this encoder made the bank.")
    if agreement is None:
        lines = [[lane, f"{num:,}"] for lane, num in facts["rows"].items()]
        lines.append([UNASSIGNED_LANE, f"{facts['unassigned_rows']:,}"])
        return captioned(caption, table(lines, ["lane", "rows"], "lr", style), leaky=False)
    caption.append(
        f"Against the bank's labels: adjusted Rand {agreement.adjusted_rand:.3f}, NMI "
        f"{agreement.nmi:.3f}; best match one to one {percent(agreement.best_match_accuracy)} % of"
    )
    words = f"the assigned rows, {percent(agreement.best_match_of_labelled)} % of the labelled ones"
    if agreement.same_name_accuracy is not None:
        words += f"; same name {percent(agreement.same_name_accuracy)} %"
    caption.append(words)
    names = [*agreement.lanes, UNASSIGNED_LANE]
    lines = []
    for label, count_L in zip(agreement.labels, agreement.count_AL, strict=True):
        shares = count_L / max(1, count_L.sum())
        order = (-shares).argsort(kind="stable")[:3]
        found = ", ".join(f"{names[c]} {percent(shares[c])}" for c in order if count_L[c])
        lines.append([label, f"{count_L.sum():,}", agreement.best_match.get(label, ""), found])
    headers = ["label", "rows", "best match", "lanes of its rows, %"]
    return captioned(caption, table(lines, headers, "lrll", style), leaky=False)
