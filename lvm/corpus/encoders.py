"""Text encoders: sentences in, unit vectors out.

Shapes: n texts of one call, D vector dim.
"""

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lvm.bank.bank import UNKNOWN_ENCODER

UNNAMED_ENCODERS = ("", UNKNOWN_ENCODER, "none")  # what made the vectors is not recorded
WORDLLAMA = "wordllama"
WORDLLAMA_BATCH = 256  # 32,000 sentences a second on two cores; 1,024 at a time is half as fast
TALKATIVE = ("huggingface_hub", "transformers", "sentence_transformers")  # each retry is a warning


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
