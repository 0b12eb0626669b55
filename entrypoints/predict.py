"""Command: retrieve the passages that come next."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrypoints._inputs import BANK_HELP, read_bank
from entrypoints._measuring import MODEL_HELP
from entrypoints._options import EntryPoint, option
from entrypoints._reports import plain, publish
from entrypoints._subjects import check_dim, open_subject
from lvm import tracking
from lvm.bank.store import Bank
from lvm.corpus.sentences import split_sentences
from lvm.encoders import load_encoder
from lvm.lanes.figures import lane_codes, lane_names
from lvm.models.table import FREE_MODELS
from lvm.prediction.contexts import check_contexts
from lvm.prediction.predict import predict_contexts
from lvm.registry import registered
from lvm.registry.registered import BASELINE_URI, Predictor
from lvm.report.tables import TEXT, table
from lvm.retrieval.index import ServingIndex, ensure_index

TEXT_WIDTH, SOURCE_WIDTH = 80, 36
TABLE, JSON = "table", "json"


@dataclass(frozen=True)
class PredictOptions:
    """Options of `predict`: exactly one of `text` or `context` is given."""

    model: str = option(BASELINE_URI, MODEL_HELP)
    text: str | None = option(None, "Text file that is the context.", unset="none")
    context: str | None = option(None, "Context as .npy, (T, D) float.", unset="none")
    k: int = option(5, "Passages to retrieve.", low=1)
    bank: str | None = option(None, f"{BANK_HELP} auto: the model's own.")
    ctx: int | None = option(None, "Rows of context at most; auto: the model's own.", low=2)
    format: str = option(TABLE, "What is printed.", choices=(TABLE, JSON))

    def __post_init__(self) -> None:
        if (self.text is None) == (self.context is None):
            raise ValueError("text, context: give exactly one of the two files")


def body(options: PredictOptions) -> None:
    """Retrieve the k passages that most likely follow a context."""
    predictor, bank = open_predictor(options)
    ctx = options.ctx or predictor.facts.ctx
    context_TD = read_context(options, bank)[-ctx:]
    tracking.log_config(asdict(options) | {"bank": str(bank.path), "rows": len(context_TD)})
    facts, correction = predictor.facts, predictor.row_correction
    if facts.bank_sha256 != bank.sha256:
        facts, correction = replace(facts, ctx=ctx), None  # its sequences may be shorter
    index = ensure_index(bank, predictor.model, facts, correction)
    prediction_BD = predict_contexts(predictor.model, context_TD[None])
    found = passages(index, bank, prediction_BD, options.k)
    report = {
        "model": facts.model,
        "bank": str(bank.path),
        "bank_sha256": bank.sha256,
        "context_rows": len(context_TD),
        "search": str(index.facts),
        "score": "cosine" if correction is None else "cosine with row correction",
        "passages": found,
    }
    shown = passages_table(report, options.k)
    tracking.log_text(shown + "\n", "predictions.txt")
    publish(report, None)
    print(json.dumps(plain(report), indent=1) if options.format == JSON else shown)


def open_predictor(options: PredictOptions) -> tuple[Predictor, Bank]:
    """Read the predictor with its bank; a free one that is named is fitted on train rows first."""
    if options.model in FREE_MODELS:
        subject = open_subject(options.model, options.bank, options.ctx)
        return subject.predictor, subject.inputs.bank
    predictor = registered.load(options.model)
    bank = read_bank(options.bank or predictor.facts.bank)
    check_dim(options.model, predictor.facts, bank)
    tracking.log_bank(bank, "prediction")
    return predictor, bank


def passages(
    index: ServingIndex, bank: Bank, prediction_1D: NDArray[np.float32], k: int
) -> list[dict[str, Any]]:
    """Return the best k passages, best first: score, row, lane, sequence, document, text."""
    row_1K, score_1K = index.search(prediction_1D, k)
    row_K, score_K = row_1K[0][row_1K[0] >= 0], score_1K[0][row_1K[0] >= 0]
    texts = bank.texts()
    lanes = None if bank.lane_N is None else [lane_names(bank)[c] for c in lane_codes(bank, row_K)]
    return [
        {
            "score": float(score),
            "row": int(row),
            "lane": None if lanes is None else lanes[place],
            "sequence": bank.sequences[bank.sequence_N[row]],
            "document": bank.documents[bank.document_N[row]],
            "text": None if texts is None else " ".join(str(texts[row]).split()),
        }
        for place, (row, score) in enumerate(zip(row_K, score_K, strict=True))
    ]


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
    """Cut a text to `width` characters, the last of them an ellipsis."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def read_context(options: PredictOptions, bank: Bank) -> NDArray[np.float32]:
    """Return the context as unit rows (T, D); raises ValueError where the file is no context."""
    if options.context is not None:
        return _read_vectors(Path(options.context), bank.dim)
    path = Path(str(options.text))
    try:
        sentences = split_sentences(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text: {path} cannot be read as UTF-8 text: {error}") from None
    if not sentences:
        raise ValueError(f"text: {path} holds no sentence of three words or more")
    vector_TD = load_encoder(bank.encoder).encode(sentences)
    if vector_TD.shape[1] != bank.dim:
        raise ValueError(f"text: {bank.encoder} gives {vector_TD.shape[1]} dims, not {bank.dim}")
    kept_TD = vector_TD[vector_TD.any(axis=1)]
    if not len(kept_TD):
        raise ValueError(f"text: the encoder {bank.encoder} knows no word of {path}")
    return kept_TD


def _read_vectors(path: Path, dim: int) -> NDArray[np.float32]:
    try:
        context_TD = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"context: {path} is not a readable .npy array: {error}") from None
    if not isinstance(context_TD, np.ndarray):
        raise ValueError(f"context: {path} is an archive; a .npy array is needed")
    if context_TD.dtype.kind != "f":
        raise ValueError(f"context: {path} holds {context_TD.dtype}; floats are needed")
    context_TD = context_TD.astype(np.float32)
    check_contexts(context_TD[None], dim)
    return context_TD / np.linalg.norm(context_TD, axis=1, keepdims=True)


main = EntryPoint("predict", PredictOptions, body)

if __name__ == "__main__":
    sys.exit(main())
