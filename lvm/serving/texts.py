"""Contexts that are given as texts: their sentences, embedded by the encoder of a bank.

Shapes: B batch, T time, D vector dim.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvm.corpus.encoders import UNNAMED_ENCODERS, load_encoder
from lvm.corpus.sentences import split_sentences

Context = str | list[str]


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

    def encode(self, sentences: Sequence[str]) -> NDArray[np.float32]:
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


def _is_text(context: Any) -> bool:
    is_list = isinstance(context, list) and bool(context)
    return isinstance(context, str) or (is_list and all(isinstance(one, str) for one in context))
