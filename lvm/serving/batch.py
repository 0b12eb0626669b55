"""Passages after contexts: open them and the index; answer many in cached blocks, as one table.

Shapes: B contexts of a block, T time, D vector dim, K passages, Q contexts in all.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import nn

from lvm.bank.bank import Bank, FloatArray
from lvm.bank.files import file_sha256, map_array
from lvm.corpus.encoders import TextEncoder
from lvm.corpus.reading import read_text_file
from lvm.models.facts import OWN_COUNTED, Facts, omits_own_document
from lvm.models.predict import predict_contexts, unit_contexts
from lvm.models.table import FREE_MODELS
from lvm.models.weights import model_digest
from lvm.retrieval.index import ensure_index
from lvm.retrieval.lexical import RECENT_ROWS
from lvm.retrieval.rerank import NONE
from lvm.serving.predictor import Retriever, Wanted
from lvm.shadow.query_log import log_queries, read_query_log
from lvm.shadow.replay import predict, query_parts
from lvm.system.atomic import (
    Entry,
    atomic_replace,
    cache_key,
    read_entry,
    write_entry,
    write_errors_name,
)
from lvm.system.progress import steps
from lvm.tracking.datasets import default_ctx, log_bank, make_inputs
from lvm.tracking.logged_models import Predictor, open_logged, open_subject
from lvm.tracking.registry import Registry
from lvm.windows.planning import SPLITS, ContextQueries, IntArray, Queries

BLOCK_VALUES = 2**25  # of the contexts of a block: 128 MB
MAX_BLOCK = 2000
TABLE_CONTEXTS = 10_000  # written at a time
Group = tuple[IntArray, FloatArray, FloatArray, list[list[str]] | None]


class Contexts(Protocol):
    """Many contexts; `target_row_Q` are the known answers, if they are known."""

    target_row_Q: IntArray | None

    def __len__(self) -> int: ...

    @property
    def num_rows(self) -> int:
        """Return the rows of the longest context."""

    def order(self) -> IntArray:
        """Return the contexts in the order in which they are answered, (Q,)."""

    def parts(self) -> list[Any]:
        """Return what tells these contexts apart from others, for `cache_key`."""

    def groups(self, place_B: IntArray) -> Iterator[Group]:
        """Yield contexts of equal length: places, unit vectors (B, T, D), predictions (B, D).

        Then the texts of the last rows of each, None if they are not known.
        """


def map_contexts(path: Path) -> NDArray[np.floating]:
    """Map the contexts (Q, T, D) of an .npy file, or its one context (T, D) as (1, T, D)."""
    try:
        array = map_array(path)
    except ValueError as error:
        raise ValueError(f"context: {path} is not a readable .npy array: {error}") from None
    if array.dtype.kind != "f":
        raise ValueError(f"context: {path} holds {array.dtype}; floats are needed")
    return array[None] if array.ndim == 2 else array


def read_contexts(
    text: str | None, context: str | None, bank: Bank
) -> tuple[FloatArray, list[list[str]] | None]:
    """Return the contexts of a text file, or else of an .npy file, as unit rows (B, T, D).

    Beside them stand their sentences, None for an .npy file. Raises ValueError if the file holds
    none.
    """
    if text is None:
        return unit_contexts(map_contexts(Path(str(context))), bank.dim), None
    path = Path(text)
    try:
        sentences = read_text_file(path)
    except OSError as error:
        raise ValueError(f"text: {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"text: {error}") from None
    if not sentences:
        raise ValueError(f"text: {path} holds no sentence of three words or more")
    encoder = TextEncoder(bank.path, bank.encoder, bank.dim, instead="context=<.npy>")
    return encoder.encode(sentences)[None], [sentences]


class ArrayContexts:
    """The contexts of an .npy file, (Q, T, D) or one of (T, D), read block by block."""

    target_row_Q: IntArray | None = None

    def __init__(self, path: Path, model: nn.Module, dim: int, ctx: int) -> None:
        self.path, self.model, self.dim, self.ctx = path, model, dim, ctx
        self.array_QTD = map_contexts(path)
        unit_contexts(self.array_QTD[:1], dim)  # a wrong shape is refused before any work

    def __len__(self) -> int:
        return len(self.array_QTD)

    @property
    def num_rows(self) -> int:
        """Return the rows of each context."""
        return int(self.array_QTD.shape[1])

    def order(self) -> IntArray:
        """Return the contexts as they are in the file."""
        return np.arange(len(self))

    def parts(self) -> list[Any]:
        """Return the hash of the file, and how much of each context is read."""
        return [file_sha256(self.path), self.ctx]

    def groups(self, place_B: IntArray) -> Iterator[Group]:
        """Yield one group; raises ValueError for zero and non-finite vectors."""
        unit_BTD = unit_contexts(self.array_QTD[place_B], self.dim)
        yield place_B, unit_BTD, predict_contexts(self.model, unit_BTD, self.ctx), None


class QueryContexts:
    """The contexts of queries of a bank, frozen or logged; the last `ctx` rows of each are read."""

    def __init__(self, queries: Queries, model: nn.Module, bank: Bank, ctx: int) -> None:
        self.queries, self.read, self.model, self.bank = queries, queries.as_read(ctx), model, bank
        self.target_row_Q: IntArray | None = queries.target_row_Q

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def num_rows(self) -> int:
        """Return the rows of the longest context."""
        return self.queries.ctx

    def order(self) -> IntArray:
        """Return the queries by their rows: neighbours share a forward pass."""
        return np.argsort(self.queries.target_row_Q, kind="stable")

    def parts(self) -> list[Any]:
        """Return the rows of the queries and of their contexts, as they are given and read."""
        return [*query_parts(self.queries), self.read.ctx]

    def groups(self, place_B: IntArray) -> Iterator[Group]:
        """Yield a group for each length of context."""
        vector_BD = predict(self.model, self.bank, self.read.take(place_B))
        rows = _context_rows(self.queries.take(place_B))
        num_rows_B = np.array([len(one) for one in rows])
        for length in np.unique(num_rows_B):
            chosen = np.flatnonzero(num_rows_B == length)
            unit_BTD = self.bank.unit(np.stack([rows[one] for one in chosen]))
            yield place_B[chosen], unit_BTD, vector_BD[chosen], self._texts_of(rows, chosen)

    def _texts_of(self, rows: list[IntArray], chosen: IntArray) -> list[list[str]] | None:
        text_N = self._text_N
        if text_N is None:
            return None
        return [text_N[rows[one][-RECENT_ROWS:]].tolist() for one in chosen]

    @cached_property
    def _text_N(self) -> NDArray[np.object_] | None:
        return self.bank.texts()


def open_predictor(
    reference: str, bank_path: str | None, ctx: int | None, registry: Registry
) -> tuple[Predictor, Bank]:
    """Read a logged predictor, or fit a free one; return it with its bank, a dataset of the run."""
    if reference in FREE_MODELS:
        subject = open_subject(reference, bank_path, ctx)
        return subject.predictor, subject.inputs.bank
    predictor, bank = open_logged(reference, bank_path, registry)
    log_bank(bank, "prediction")
    return predictor, bank


def open_contexts(
    context: str | None, queries: str | None, predictor: Predictor, bank: Bank, ctx: int
) -> ArrayContexts | QueryContexts:
    """Open the contexts of an .npy file, or else of a split of the bank or of a query log."""
    model, facts = predictor.model, predictor.facts
    if context is not None:
        return ArrayContexts(Path(context), model, bank.dim, ctx)
    asked = str(queries)
    if asked not in SPLITS[1:]:
        return QueryContexts(log_queries(read_query_log(Path(asked)), bank, ctx), model, bank, ctx)
    plan = {"split": facts.split, "seed": facts.seed}
    inputs = make_inputs(bank, default_ctx(bank, ctx), None, "prediction", **plan)
    return QueryContexts(inputs.windows.queries[asked], model, bank, ctx)


def open_retriever(predictor: Predictor, bank: Bank, ctx: int, rerank: str) -> Retriever:
    """Open the index over the bank; raises ValueError if it cannot be re-ranked by `rerank`."""
    facts, correction, reranker = predictor.facts, predictor.row_correction, predictor.reranker
    name, is_own = predictor.reference, facts.bank_sha256 == bank.sha256
    if not is_own:
        facts, correction = replace(facts, ctx=ctx), None  # its sequences may be shorter
    if rerank != NONE and not is_own:
        raise ValueError(f"rerank: {name} knows lanes and words of {facts.bank}, not {bank.path}")
    if rerank != NONE and name in FREE_MODELS:
        raise ValueError(
            f"rerank: {name} is fitted here without lanes; name a registered version of it"
        )
    index = ensure_index(bank, predictor.model, facts, correction)
    return Retriever(index, min(ctx, predictor.facts.ctx), reranker)


def search_facts(predictor: Predictor, retriever: Retriever, rerank: str) -> dict[str, Any]:
    """Return what answers: the predictor, the bank, the kind of search and of score."""
    return {
        "model": predictor.facts.model,
        "bank_sha256": retriever.index.bank.sha256,
        "search": str(retriever.index.facts),
        "score": score_name(retriever, rerank, predictor.facts),
    }


def score_name(retriever: Retriever, rerank: str, facts: Facts) -> str:
    """Return what the scores are, with the definition of an older row correction."""
    name = retriever.score_name(rerank)
    is_older = retriever.index.pair_N2 is not None and not omits_own_document(facts.fit_version)
    return f"{name} ({OWN_COUNTED})" if is_older else name


def _context_rows(queries: Queries) -> list[IntArray]:
    """Return the bank rows of each context, in reading order."""
    if isinstance(queries, ContextQueries):
        return list(queries.context_row_Q)
    pairs = zip(queries.first_row_Q.tolist(), queries.target_row_Q.tolist(), strict=True)
    return [np.arange(first, target) for first, target in pairs]


@dataclass(frozen=True)
class Batch:
    """Contexts to answer, with what answers them; blocks are cached in `store` until the end."""

    contexts: Contexts
    retriever: Retriever
    model: nn.Module
    wanted: Wanted
    store: Path

    def write(self, path: Path) -> int:
        """Write the passages of all contexts to `path`, whole or not at all; return their number.

        One line a passage: `context` (counted from 0), `target_row` if it is known, `place` (from
        1), and the columns of `Retriever.describe`. Blocks that an interrupted run answered are
        read back; what they depend on is in their key.
        """
        key = self._key()
        row_QK = np.full((len(self.contexts), self.wanted.k), -1, np.int64)
        score_QK = np.full(row_QK.shape, -np.inf, np.float32)
        used = []
        with steps(None, "contexts", "contexts", len(self.contexts)) as bar:
            for number, place_B in enumerate(self._blocks()):
                entry = self.store / f"{key[:16]}-{number:06d}.safetensors"
                found = read_entry(entry, f"{key} {number}")
                if found is None:
                    found = self._answer(place_B)
                    write_entry(entry, f"{key} {number}", found)
                row_QK[place_B], score_QK[place_B] = found.arrays["rows"], found.arrays["scores"]
                used.append(entry)
                bar.update(len(place_B))
        num_passages = self._write_table(path, row_QK, score_QK)
        for entry in used:
            entry.unlink(missing_ok=True)
        return num_passages

    def _key(self) -> str:
        index = self.retriever.index
        asked = [self.wanted.k, self.wanted.rerank, self.wanted.keep_context]
        served: list[Any] = [model_digest(self.model), index.bank.sha256, str(index.facts)]
        if index.pair_N2 is not None:
            served.append(index.pair_N2)
        reranker = self.retriever.reranker
        if self.wanted.rerank != NONE and reranker is not None:
            served.append(asdict(reranker))
        sizes = [MAX_BLOCK, BLOCK_VALUES]
        return cache_key(served, asked, self.contexts.parts(), sizes, torch.__version__)

    def _blocks(self) -> list[IntArray]:
        order_Q, dim = self.contexts.order(), self.retriever.index.bank.dim
        size = max(1, min(MAX_BLOCK, BLOCK_VALUES // (self.contexts.num_rows * dim)))
        return [order_Q[begin : begin + size] for begin in range(0, len(order_Q), size)]

    def _answer(self, place_B: IntArray) -> Entry:
        position = {int(place): number for number, place in enumerate(place_B)}
        row_BK = np.full((len(place_B), self.wanted.k), -1, np.int64)
        score_BK = np.full(row_BK.shape, -np.inf, np.float32)
        for places, unit_BTD, vector_BD, texts in self.contexts.groups(place_B):
            at = [position[int(place)] for place in places]
            found = self.retriever.best(unit_BTD, vector_BD, self.wanted, texts)
            row_BK[at], score_BK[at] = found
        return Entry({"rows": row_BK, "scores": score_BK})

    def _write_table(self, path: Path, row_QK: IntArray, score_QK: FloatArray) -> int:
        num_passages = 0
        with write_errors_name(path), atomic_replace(path) as made:
            writer = None
            for begin in range(0, len(row_QK), TABLE_CONTEXTS):
                places = range(begin, min(begin + TABLE_CONTEXTS, len(row_QK)))
                table = pa.Table.from_pandas(
                    self._table(places, row_QK, score_QK), _schema(self.contexts), False
                )
                writer = writer or pq.ParquetWriter(made, table.schema, compression="zstd")
                writer.write_table(table)
                num_passages += table.num_rows
            assert writer is not None, "no context"
            writer.close()
        return num_passages

    def _table(self, places: range, row_QK: IntArray, score_QK: FloatArray) -> pd.DataFrame:
        lines, targets = [], self.contexts.target_row_Q
        for place in places:
            head = {"context": place}
            if targets is not None:
                head["target_row"] = int(targets[place])
            found = self.retriever.describe(row_QK[place], score_QK[place])
            lines += [head | {"place": n} | one for n, one in enumerate(found, start=1)]
        return pd.DataFrame(lines)


def _schema(contexts: Contexts) -> pa.Schema:
    """Return the columns of the table, of one type in every file."""
    known = [] if contexts.target_row_Q is None else [("target_row", pa.int64())]
    texts = [(name, pa.string()) for name in ("lane", "sequence", "document", "text")]
    columns = [("context", pa.int64()), *known, ("place", pa.int32())]
    return pa.schema([*columns, ("score", pa.float32()), ("row", pa.int64()), *texts])
