"""The words that a bank's rows share with the last rows of a context, scored by BM25.

The scores are those of bm25s (Lù, arXiv 2407.03618; the variant of Lucene): a row scores the sum
over the words of the context of the word's BM25 weight in the row. The index of a bank is a folder
of memory-mapped arrays. Shapes: N bank rows, V words, Q queries, C candidates, R rows, W words of a
context.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_matrix, csr_matrix

from lvm.bank.bank import Bank, FloatArray
from lvm.bank.files import file_sha256, map_array
from lvm.retrieval.index import FOLDER, UNREADABLE
from lvm.system.atomic import (
    atomic_replace,
    cache_key,
    is_damaged,
    locked,
    with_checksum,
    write_array,
    write_errors_name,
)
from lvm.system.errors import one_line
from lvm.system.progress import part
from lvm.windows.planning import ContextQueries, IntArray, Queries

# Chosen on val of docstrings and of novels (docs/LOG.md, 2026-12-01).
RECENT_ROWS = 32
DECAY = 0.9
STOP_WORDS = "english"  # what other languages repeat weighs little by its frequency
FORMAT = 1
ARRAYS = ("data", "indices", "indptr")
WORDS, CONTENTS = "words.json", "contents.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecentWords:
    """The words of a context as columns of an index, (W,), each with its weight.

    A word that last occurred k rows before the end of the context weighs DECAY ** k.
    """

    column_W: IntArray
    weight_W: FloatArray


@dataclass(frozen=True, eq=False)
class WordIndex:
    """The BM25 weight of each word in each row of a bank, (N, V).

    `path` is its folder, None for an index that is held in memory; a pickled one is opened again.
    """

    key: str
    columns: dict[str, int]
    score_NV: csr_matrix
    path: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is None:
            return WordIndex, (self.key, self.columns, self.score_NV)
        return open_word_index, (self.path, self.key)

    def after_queries(self, queries: Queries) -> list[RecentWords]:
        """Return the words of the last rows of each query's context, rows of the bank."""
        starts, columns = self.score_NV.indptr, self.score_NV.indices
        found = []
        for rows in _recent_rows(queries):
            found.append(recent_words(columns[starts[row] : starts[row + 1]] for row in rows))
        return found

    def after_texts(self, texts: Sequence[str]) -> RecentWords:
        """Return the words of the last of the `texts` of a context, one text a row."""
        known = [
            [self.columns[word] for word in words if word in self.columns]
            for words in _tokens(texts[-RECENT_ROWS:])
        ]
        return recent_words(np.array(columns, np.int64) for columns in known)

    def scores(self, recent: Sequence[RecentWords], row_QC: IntArray) -> FloatArray:
        """Return the score of each candidate after the words of its query, (Q, C); 0 for row -1."""
        score_QC = np.zeros(row_QC.shape, np.float32)
        weight_V = np.zeros(self.score_NV.shape[1], np.float32)
        for words, row_C, score_C in zip(recent, row_QC, score_QC, strict=True):
            weight_V[words.column_W] = words.weight_W
            is_row_C = row_C >= 0
            score_C[is_row_C] = self.score_NV[row_C[is_row_C]] @ weight_V
            weight_V[words.column_W] = 0
        return score_QC


def recent_words(columns_R: Iterable[NDArray[np.integer]]) -> RecentWords:
    """Return the words of rows in reading order, given as the columns of each row's words."""
    rows = list(columns_R)
    columns = np.concatenate([np.zeros(0, np.int64), *rows])
    ages = np.repeat(np.arange(len(rows))[::-1], [len(row) for row in rows])
    column_W, last = np.unique(columns[::-1], return_index=True)
    return RecentWords(column_W, (DECAY ** ages[::-1][last]).astype(np.float32))


def _recent_rows(queries: Queries) -> list[IntArray]:
    """Return the last rows of each context, in reading order."""
    if isinstance(queries, ContextQueries):
        return [rows[-RECENT_ROWS:] for rows in queries.context_row_Q]
    first_Q = np.maximum(queries.first_row_Q, queries.target_row_Q - RECENT_ROWS)
    pairs = zip(first_Q.tolist(), queries.target_row_Q.tolist(), strict=True)
    return [np.arange(first, end) for first, end in pairs]


def _tokens(texts: Sequence[str], return_ids: bool = False) -> Any:
    """Return the words of each text, in lower case: runs of two letters or digits or more."""
    import bm25s  # takes a quarter of a second to import

    return bm25s.tokenize(
        list(texts), stopwords=STOP_WORDS, return_ids=return_ids, show_progress=False
    )


@part("word index")
def ensure_word_index(bank: Bank, folder: str | Path = FOLDER) -> WordIndex:
    """Open the word index of a bank; build it in `folder` if it is missing or damaged.

    One process at a time builds. If the folder cannot be written, the index is held in memory, and
    a line is logged. Raises ValueError for a bank without texts.
    """
    key = cache_key(FORMAT, installed_version("bm25s"), STOP_WORDS, bank.sha256)
    path = Path(folder).resolve() / f"words-{key[:16]}"
    with locked(path):
        try:
            return open_word_index(path, key)
        except UNREADABLE:
            built = build_word_index(bank, key)
        try:
            _write(built, path)
        except OSError as error:
            reason = one_line(str(error))
            _log.warning("word index %s cannot be written (%s); it is in memory", path, reason)
            return built
    return open_word_index(path, key)


def build_word_index(bank: Bank, key: str = "") -> WordIndex:
    """Build the word index of a bank in memory; raises ValueError for a bank without texts."""
    import bm25s

    text_N = bank.texts()
    found = None if text_N is None else _tokens(text_N.tolist(), return_ids=True)
    if found is None or not found.vocab:
        raise ValueError(f"bank {bank.path}: has no texts; add a column 'text' to its row table")
    model = bm25s.BM25(method="lucene")
    model.index(found, create_empty_token=False, show_progress=False)
    arrays = tuple(model.scores[name] for name in ARRAYS)
    score_NV = csc_matrix(arrays, shape=(bank.num_rows, len(found.vocab))).tocsr()
    return WordIndex(key, found.vocab, score_NV)


def _write(built: WordIndex, path: Path) -> None:
    """Write an index to the folder `path` atomically, replacing an older one."""
    with atomic_replace(path) as folder, write_errors_name(path):
        folder.mkdir()
        for name in ARRAYS:
            write_array(folder / f"{name}.npy", getattr(built.score_NV, name))
        (folder / WORDS).write_text(json.dumps(list(built.columns)), "utf-8")
        names = (WORDS, *(f"{name}.npy" for name in ARRAYS))
        files = {name: file_sha256(folder / name) for name in names}
        contents = {"key": built.key, "rows": built.score_NV.shape[0], "files": files}
        (folder / CONTENTS).write_text(json.dumps(with_checksum(contents), indent=1) + "\n")


def open_word_index(path: Path, key: str) -> WordIndex:
    """Open an index folder, after checking the files' hashes; its arrays are memory-mapped.

    Raises ValueError if a file is missing or damaged, or if it is the index of another `key`.
    """
    try:
        contents = json.loads((path / CONTENTS).read_text())
        if is_damaged(contents) or contents["key"] != key:
            raise ValueError(f"{CONTENTS} is damaged, or of another index")
        files = contents["files"]
        damaged = [name for name, sha256 in files.items() if file_sha256(path / name) != sha256]
        words = json.loads((path / WORDS).read_text("utf-8"))
        arrays = tuple(map_array(path / f"{name}.npy") for name in ARRAYS)
        score_NV = csr_matrix(arrays, shape=(contents["rows"], len(words)), copy=False)
    except UNREADABLE as error:
        raise ValueError(f"word index {path}: cannot be read ({error}); delete it") from None
    if damaged:
        raise ValueError(f"word index {path}: {', '.join(damaged)} is damaged; delete it")
    return WordIndex(key, {word: column for column, word in enumerate(words)}, score_NV, path)
