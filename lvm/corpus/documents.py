"""The unit that every reader of a corpus yields."""

from collections.abc import Iterator
from dataclasses import dataclass

from lvm.bank.row_table import BLOCK_ROWS


@dataclass(frozen=True)
class Document:
    """Consecutive rows of one sequence; `lane` is "" where the source names none."""

    sequence: str
    name: str
    texts: list[str]
    lane: str = ""


def block_documents(sequence: str, texts: list[str], lane: str = "") -> Iterator[Document]:
    """Cut a sequence without inner borders into documents of 100 rows."""
    for block, start in enumerate(range(0, len(texts), BLOCK_ROWS)):
        yield Document(sequence, f"block-{block:06d}", texts[start : start + BLOCK_ROWS], lane)
