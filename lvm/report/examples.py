"""Page of answered queries with their texts, as HTML that MLflow shows whole."""

from html import escape

import pandas as pd

from lvm.report.tables import LEAKY_NOTE

STYLE = (
    "body { font: 14px sans-serif } table { border-collapse: collapse } "
    "th, td { border: 1px solid #ddd; padding: 4px 8px; text-align: left; vertical-align: top } "
    "th { position: sticky; top: 0; background: #f4f4f4 }"
)


def examples_page(title: str, examples: pd.DataFrame, leaky: bool) -> str:
    """Return the table of `example_table` as a page whose texts are not cut off."""
    counts = examples["outcome"].value_counts()
    drawn = ", ".join(f"{outcome}: {count}" for outcome, count in counts.items())
    mark = f"<p><b>{escape(LEAKY_NOTE)}</b></p>\n" if leaky else ""
    with pd.option_context("display.max_colwidth", None):
        body = examples.to_html(index=False, border=0, float_format="{:,g}".format)
    return (
        f'<!DOCTYPE html><meta charset="utf-8"><style>{STYLE}</style>\n<h2>{escape(title)}</h2>\n'
        f"{mark}<p>{drawn}, drawn by seed; the rank is exact over the whole bank.</p>\n{body}\n"
    )
