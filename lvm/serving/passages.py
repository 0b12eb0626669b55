"""Passages for predicted vectors: retrieved, without those of the context, ordered, described.

Shapes: B batch, T time, D vector dim, K passages, C candidates.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvm.bank.store import SAME_SCORE
from lvm.retrieval.index import ServingIndex
from lvm.retrieval.lanes import lane_codes, lane_names, means_of
from lvm.retrieval.rerank import (
    LANE,
    NONE,
    RERANKS,
    SIZE,
    Reranker,
    Shortlist,
    lane_scores,
)

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
MAX_PASSAGES = 1000
MAX_IN_ALL = 100_000  # passages of one request, each a dict of some 500 bytes
COSINES = 2**24  # compared at a time: 64 MB
SPARE = 32  # candidates beyond those asked for, of which the context may hold some


@dataclass(frozen=True)
class Wanted:
    """A request for `k` passages (0: none) in the order `rerank`.

    Passages equal to a row of the context are omitted unless `keep_context`. Raises ValueError for
    an impossible request.
    """

    k: int
    rerank: str = NONE
    keep_context: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.k <= MAX_PASSAGES:
            raise ValueError(f"k: {self.k} is outside 0 ... {MAX_PASSAGES:,}")
        if self.rerank not in RERANKS:
            raise ValueError(f"rerank: unknown {self.rerank!r}; choose one of {', '.join(RERANKS)}")
        if self.rerank == LANE and self.k == 0:
            raise ValueError("rerank: orders passages, of which k = 0 are asked for; give k too")

    def check_batch(self, num_contexts: int) -> None:
        """Raise ValueError if so many contexts would return too many passages.

        Re-ranking holds its whole shortlist in memory, even for a small k.
        """
        held = max(self.k, SIZE) if self.rerank == LANE else self.k
        if held * num_contexts > MAX_IN_ALL:
            raise ValueError(
                f"k: {held:,} passages for each of {num_contexts:,} contexts are more than "
                f"{MAX_IN_ALL:,} in all; send at most {MAX_IN_ALL // held:,} contexts together"
            )


@dataclass(frozen=True)
class Retriever:
    """An index with the optional re-ranker of its results; `ctx` is the model's."""

    index: ServingIndex
    ctx: int
    reranker: Reranker | None

    def best(
        self, unit_BTD: FloatArray, vector_BD: FloatArray, wanted: Wanted
    ) -> tuple[IntArray, FloatArray]:
        """Return the k best passages after contexts of unit vectors: bank rows, scores, (B, K).

        Best first; row -1 with score -inf where there are no more. Scores are those of the index;
        with rerank=lane the best 200 are ordered anew by score + tau beta log p(lane | context),
        which the scores then are. Raises ValueError for k above the number of passages, for
        rerank=lane without a re-ranker.
        """
        if wanted.rerank == NONE:
            return self._candidates(unit_BTD, vector_BD, wanted.k, wanted.keep_context)
        if self.reranker is None:
            raise ValueError("rerank: the model was logged without lanes; ask with rerank=none")
        num_listed = max(wanted.k, min(SIZE, self.index.facts.num_passages))
        listed = self._candidates(unit_BTD, vector_BD, num_listed, wanted.keep_context)
        return _ordered(listed[0], self._lane_scores(unit_BTD, *listed), wanted.k)

    def describe(self, row_K: IntArray, score_K: FloatArray) -> list[dict[str, Any]]:
        """Return the passages of one context: score, row, lane, sequence, document, text.

        Lane or text is None if the bank has none; rows -1 are omitted.
        """
        bank, texts = self.index.bank, self._texts
        is_found_K = row_K >= 0
        row_K, score_K = row_K[is_found_K], score_K[is_found_K]
        lanes: list[str | None] = [None] * len(row_K)
        if bank.lane_N is not None:
            lanes = [lane_names(bank)[code] for code in lane_codes(bank, row_K)]
        return [
            {
                "score": float(score),
                "row": int(row),
                "lane": lane,
                "sequence": bank.sequences[bank.sequence_N[row]],
                "document": bank.documents[bank.document_N[row]],
                "text": None if texts is None else " ".join(str(texts[row]).split()),
            }
            for row, score, lane in zip(row_K, score_K, lanes, strict=True)
        ]

    def score_name(self, rerank: str) -> str:
        """Return what the scores are."""
        name = "cosine" if self.index.pair_N2 is None else "cosine with row correction"
        return f"{name}, re-ranked by lane" if rerank == LANE else name

    def _candidates(
        self, unit_BTD: FloatArray, vector_BD: FloatArray, size: int, keep_context: bool
    ) -> tuple[IntArray, FloatArray]:
        """Return the `size` best passages, (B, `size`); doubles the search depth as needed."""
        if keep_context:
            return self.index.search(vector_BD, size)
        num_passages = self.index.facts.num_passages
        depth = max(size, min(size + SPARE, num_passages))
        while True:
            row_BC, score_BC = self.index.search(vector_BD, depth)
            is_last_B = row_BC[:, -1] < 0  # the lists that were read hold no more
            for row_C, score_C, unit_TD in zip(row_BC, score_BC, unit_BTD, strict=True):
                is_held_C = _is_held(self.index.bank.unit(row_C), unit_TD)
                row_C[is_held_C], score_C[is_held_C] = -1, -np.inf
            is_enough_B = is_last_B | ((row_BC >= 0).sum(axis=1) >= size)
            if depth == num_passages or is_enough_B.all():
                return _ordered(row_BC, score_BC, size)
            depth = min(2 * depth, num_passages)

    def _lane_scores(
        self, unit_BTD: FloatArray, row_BC: IntArray, score_BC: FloatArray
    ) -> FloatArray:
        assert self.reranker is not None
        log_p_BL = self.reranker.classifier.log_probability(means_of(unit_BTD[:, -self.ctx :]))
        listed = Shortlist(row_BC, score_BC, np.zeros(row_BC.shape, bool))
        is_plain = self.index.pair_N2 is None
        weights = self.reranker.plain if is_plain else self.reranker.corrected
        return lane_scores(listed, log_p_BL, self._code_N, weights.tau * weights.beta)

    @cached_property
    def _code_N(self) -> IntArray:
        return lane_codes(self.index.bank)

    @cached_property
    def _texts(self) -> NDArray[np.object_] | None:
        return self.index.bank.texts()


def _is_held(unit_CD: FloatArray, unit_TD: FloatArray) -> NDArray[np.bool_]:
    """Tell which candidates equal a row of the context, in bounded memory."""
    block = max(1, COSINES // len(unit_TD))
    starts = range(0, len(unit_CD), block)
    cosines = (unit_CD[start : start + block] @ unit_TD.T for start in starts)
    return np.concatenate([(cosine_CT >= SAME_SCORE).any(axis=1) for cosine_CT in cosines])


def _ordered(row_BC: IntArray, score_BC: FloatArray, size: int) -> tuple[IntArray, FloatArray]:
    """Return the `size` best candidates; ties keep their order."""
    best_BK = np.argsort(-score_BC, axis=1, kind="stable")[:, :size]
    return (
        np.take_along_axis(row_BC, best_BK, axis=1),
        np.take_along_axis(score_BC, best_BK, axis=1),
    )
