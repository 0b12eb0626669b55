"""Command: retrieve the passages that come next."""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from entrypoints._inputs import BANK_HELP, read_bank
from entrypoints._measuring import MODEL_HELP
from entrypoints._options import EntryPoint, option
from entrypoints._subjects import check_dim, open_subject
from lvm import tracking
from lvm.bank.store import Bank
from lvm.corpus.sentences import split_sentences
from lvm.encoders import load_encoder
from lvm.models.table import FREE_MODELS
from lvm.prediction.contexts import check_contexts
from lvm.prediction.predict import predict_contexts
from lvm.registry import registered
from lvm.registry.registered import BASELINE_URI, Predictor
from lvm.retrieval.index import ServingIndex, ensure_index

WIDTH = 100


@dataclass(frozen=True)
class PredictOptions:
    """Options of `predict`: exactly one of `text` or `context` is given."""

    model: str = option(BASELINE_URI, MODEL_HELP)
    text: str | None = option(None, "Text file that is the context.", unset="none")
    context: str | None = option(None, "Context as .npy, (T, D) float.", unset="none")
    k: int = option(5, "Passages to retrieve.", low=1)
    bank: str | None = option(None, f"{BANK_HELP} auto: the model's own.")
    ctx: int | None = option(None, "Rows of context at most; auto: the model's own.", low=2)

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
    score_name = "cosine" if correction is None else "score"
    lines = [f"search: {index.facts}", *passages(index, bank, prediction_BD, options.k, score_name)]
    tracking.log_text("\n".join(lines) + "\n", "predictions.txt")
    print("\n".join(lines))


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
    index: ServingIndex, bank: Bank, prediction_1D: NDArray[np.float32], k: int, score_name: str
) -> list[str]:
    """Return the table of the best k passages, a line each."""
    row_1K, score_1K = index.search(prediction_1D, k)
    is_found_K = row_1K[0] >= 0
    texts = bank.texts()
    lines = [f"{score_name:>7} {'row':>9}  passage"]
    for row, score in zip(row_1K[0][is_found_K], score_1K[0][is_found_K], strict=True):
        passage = "" if texts is None else " ".join(str(texts[row]).split())
        sequence = bank.sequences[bank.sequence_N[row]]
        lines.append(f"{score:7.3f} {row:9,}  [{sequence}] {passage[:WIDTH]}")
    if not is_found_K.all():
        lines.append(f"{is_found_K.sum()} of {k} found: the lists that were read hold no more")
    return lines


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
