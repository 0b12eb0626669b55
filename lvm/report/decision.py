"""Report of a promotion decision: which gate let whom pass."""

import textwrap

from lvm.report.tables import MARKDOWN, TEXT, bullet, table
from lvm.shadow.decision import Decision

WIDTH = 100


def gates_table(decision: Decision, style: str = TEXT) -> str:
    """Return candidates by gates: pass, FAIL, or - where a gate before it left it out."""
    gates = list(dict.fromkeys(check.gate for check in decision.checks))
    names = list(dict.fromkeys(check.candidate for check in decision.checks))
    verdicts = {(check.candidate, check.gate): check.passed for check in decision.checks}
    words = {True: "pass", False: "FAIL", None: "-"}
    lines = [[name, *(words[verdicts.get((name, gate))] for gate in gates)] for name in names]
    headers = ["gate", *(gate.replace(" ", "\n") for gate in gates)]
    if style == MARKDOWN:
        headers = ["gate", *gates]
    return table(lines, headers, "l" + "c" * len(gates), style)


def decision_text(decision: Decision, style: str = TEXT) -> str:
    """Return the gates with the reasons, the outcome first."""
    lines = [_wrapped(reason, style) for reason in decision.reasons]
    winner = decision.winner or "none yet"
    head = f"Decision: baseline is {winner}"
    if decision.promote:
        before = decision.baseline or "none"
        head += f" (promoted: {', then '.join(decision.promote)}; before: {before})"
    blocks = [head + "\n" * (style == MARKDOWN) + "\n" + "\n".join(lines)]
    if decision.checks:  # a terminal shows its end, a page its beginning
        blocks.insert(len(blocks) if style == MARKDOWN else 0, gates_table(decision, style))
    return "\n\n".join(blocks)


def checks_markdown(decision: Decision) -> str:
    """Return every gate of every candidate with the numbers it was decided by."""
    lines = [
        [check.candidate, check.gate, "pass" if check.passed else "**FAIL**", check.detail]
        for check in decision.checks
    ]
    return table(lines, ["candidate", "gate", "", "numbers"], "llll", MARKDOWN)


def _wrapped(line: str, style: str) -> str:
    """Make a list item of a line, broken for the terminal."""
    if style == MARKDOWN:
        return bullet(style) + line
    return textwrap.fill(
        line, WIDTH, initial_indent=bullet(style), subsequent_indent="    ", break_on_hyphens=False
    )
