"""Text corpora in reading order: installed libraries' docstrings, or a folder of files."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from lvm.corpus.documents import Document
from lvm.corpus.files import read_files
from lvm.corpus.python_docs import read_python_docs
from lvm.system.errors import one_line_errors

PYTHON_DOCS = "python-docs"


@one_line_errors
def read_corpus(source: str, max_rows: int | None = None) -> pd.DataFrame:
    """Return the rows of `source` in reading order: sequence, document, text, lane where it has.

    `source` is "python-docs", a folder of .md, .rst, .txt or .jsonl files, or one such file. With
    `max_rows` the corpus ends before the first document that would exceed it. Raises ValueError
    where the source is not there, or has no sentence.
    """
    table: dict[str, list[str]] = {"sequence": [], "document": [], "lane": [], "text": []}
    with tqdm(desc=f"read {source}", unit=" rows", disable=None) as progress:
        for document in _until(_documents(source), max_rows):
            size = len(document.texts)
            table["sequence"] += [document.sequence] * size
            table["document"] += [document.name] * size
            table["lane"] += [document.lane] * size
            table["text"] += document.texts
            progress.update(size)
    if not table["text"]:
        raise ValueError(f"source {source}: no sentence of three words or more in it")
    rows = pd.DataFrame(table)
    return rows if any(table["lane"]) else rows.drop(columns="lane")


def _documents(source: str) -> Iterator[Document]:
    if source == PYTHON_DOCS:
        return read_python_docs()
    if not Path(source).exists():
        raise ValueError(
            f"source {source}: no such folder or file; use {PYTHON_DOCS}, a folder of .md, .rst, "
            ".txt or .jsonl files, a bank folder or an .npz"
        )
    return read_files(Path(source))


def _until(documents: Iterator[Document], max_rows: int | None) -> Iterator[Document]:
    """Whole documents up to `max_rows` rows; part of the first where even that is longer."""
    num_rows = 0
    for document in documents:
        if max_rows is not None and num_rows + len(document.texts) > max_rows:
            if num_rows == 0:
                first = document.texts[:max_rows]
                yield Document(document.sequence, document.name, first, document.lane)
            return
        num_rows += len(document.texts)
        yield document
