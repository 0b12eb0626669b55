"""Text encoders: sentences in, unit vectors out; contexts that are given as texts.

Shapes: n texts of one call, T sentences of a context, D vector dim.
"""

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lvm.bank.bank import UNKNOWN_ENCODER
from lvm.corpus.sentences import split_sentences

UNNAMED_ENCODERS = ("", UNKNOWN_ENCODER, "none")  # what made the vectors is not recorded
WORDLLAMA = "wordllama"
WORDLLAMA_BATCH = 256  # 32,000 sentences a second on two cores; 1,024 at a time is half as fast
TALKATIVE = ("huggingface_hub", "transformers", "sentence_transformers")  # each retry is a warning

Context = str | list[str]


class Encoder(Protocol):
    """The interface of an encoder; a bank records its `name` for `load_encoder`."""

    name: str
    dim: int

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return unit rows (n, D); a text without any token gives a zero row."""


class WordLlamaEncoder:
    """The static WordLlama model, whose weights ship inside its wheel."""

    name = WORDLLAMA

    def __init__(self) -> None:
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        import wordllama  # calls logging.basicConfig, which is undone below

        root.handlers[:], root.level = handlers, level
        folder = Path(wordllama.__file__).parent
        self._model = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)
        self.dim = int(self._model.embedding.shape[1])

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return the normalised mean token vectors (n, D)."""
        return _unit_or_zero(self._model.embed(list(texts), batch_size=WORDLLAMA_BATCH))


class SentenceTransformerEncoder:
    """A sentence-transformers model, by hub name or local folder."""

    def __init__(self, name: str, download: bool = True) -> None:
        if not Path(name).exists() and difflib.get_close_matches(name.lower(), [WORDLLAMA]):
            raise ValueError(f"encoder {name!r}: is not known; did you mean {WORDLLAMA}?")
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ValueError(
                f"encoder {name!r}: needs sentence-transformers; install it with "
                f"`pip install -e .[encoders]`, or use encoder={WORDLLAMA}"
            ) from error
        try:
            with _quiet(TALKATIVE):
                self._model = SentenceTransformer(name, local_files_only=not download)
        except (OSError, ValueError) as error:
            reason = "cannot be loaded" if download else "is not on this machine"
            wanted = "hub name or its local folder" if download else "local folder"
            raise ValueError(
                f"encoder {name!r}: {reason}; give {WORDLLAMA} or a sentence-transformers model's "
                f"{wanted}"
            ) from error
        self.name = name
        self.dim = len(self.encode(["dimension"])[0])

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return the model's sentence vectors (n, D), normalised."""
        vectors = self._model.encode(list(texts), show_progress_bar=False, convert_to_numpy=True)
        return _unit_or_zero(vectors)


def load_encoder(name: str, download: bool = True) -> Encoder:
    """Load `wordllama`, or a sentence-transformers model (hub name or folder).

    Without `download`, or with HF_HUB_OFFLINE=1, a hub name is only looked up in the local cache.
    Raises ValueError if the extra lvm[encoders] is missing, if the model cannot be loaded, or if
    the name is a misspelling of `wordllama`.
    """
    return WordLlamaEncoder() if name == WORDLLAMA else SentenceTransformerEncoder(name, download)


def texts_in(model_input: Any) -> list[Context] | None:
    """Return the contexts of a batch if they are texts, each one string or a list of sentences.

    One string alone is a batch of one. None if they are not texts.
    """
    if isinstance(model_input, np.ndarray) and model_input.dtype.kind in "biuf":
        return None  # a list of many numbers takes long to make
    contexts = model_input.tolist() if isinstance(model_input, np.ndarray) else model_input
    contexts = [contexts] if isinstance(contexts, str) else contexts
    is_text = isinstance(contexts, list) and bool(contexts) and all(map(_is_text, contexts))
    return contexts if is_text else None


def sentences_of(context: Context) -> list[str]:
    """Return the sentences of a context; a list of sentences is taken as it is.

    Raises ValueError if there is none.
    """
    sentences = split_sentences(context) if isinstance(context, str) else context
    if not sentences:
        raise ValueError("text: holds no sentence of three words or more")
    return sentences


class TextEncoder:
    """The encoder `name` of the vectors of a bank, which has `dim` dims.

    Raises ValueError where the bank does not record it, naming what to give `instead` of texts.
    """

    def __init__(
        self,
        bank: str | Path,
        name: str,
        dim: int,
        download: bool = True,
        instead: str = "vectors",
    ) -> None:
        if name in UNNAMED_ENCODERS:
            raise ValueError(
                f"text: bank {bank} does not record what made its vectors; give {instead}, or "
                "ingest it with encoder=<name>"
            )
        try:
            self.encoder, self.dim = load_encoder(name, download), dim
        except ValueError as error:
            raise ValueError(f"text: {error}") from error

    def encode(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return unit vectors (T, D); a sentence of which the encoder knows no word is left out.

        Raises ValueError if none is left, or if the encoder is not the bank's after all.
        """
        vector_TD = self.encoder.encode(sentences)
        if vector_TD.shape[1] != self.dim:
            raise ValueError(
                f"text: {self.encoder.name} gives {vector_TD.shape[1]} dims, not {self.dim}"
            )
        known_TD = vector_TD[vector_TD.any(axis=1)]
        if not len(known_TD):
            raise ValueError(f"text: the encoder {self.encoder.name} knows no word of it")
        return known_TD


@contextmanager
def _quiet(names: Sequence[str]) -> Iterator[None]:
    """Show only errors of these loggers: the caller reports a failure in one line."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _unit_or_zero(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    vectors = np.asarray(vectors, dtype=np.float32)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    length[length == 0] = 1
    return vectors / length


def _is_text(context: Any) -> bool:
    is_list = isinstance(context, list) and bool(context)
    return isinstance(context, str) or (is_list and all(isinstance(one, str) for one in context))
