"""Report of `predict`: the retrieved passages as a table."""

from collections.abc import Mapping
from typing import Any

from lvm.report.tables import TEXT, table

TEXT_WIDTH, SOURCE_WIDTH = 80, 36


def passages_table(report: Mapping[str, Any], k: int) -> str:
    """Return the passages as a table, long cells cut, with a note where fewer than k were found."""
    found = report["passages"]
    lines = [
        [
            f"{one['score']:.3f}",
            f"{one['row']:,}",
            one["lane"] or "",
            shorten(f"{one['sequence']}: {one['document']}", SOURCE_WIDTH),
            shorten(one["text"] or "", TEXT_WIDTH),
        ]
        for one in found
    ]
    body = table(lines, ["score", "row", "lane", "source", "passage"], "rrlll", TEXT)
    head = f"{report['model']} after {report['context_rows']:,} rows; score: {report['score']}"
    blocks = [head, f"search: {report['search']}", "", body]
    if len(found) < k:
        blocks.append(f"{len(found)} of {k} found: the lists that were read hold no more")
    return "\n".join(blocks)


def shorten(text: str, width: int) -> str:
    """Put a text on one line of `width` characters at most, the last of them an ellipsis."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1]}…"
