"""The served predictor.

Shapes: B batch, T time, D vector dim, K passages.
"""

from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import Model
from mlflow.pyfunc import PythonModel, PythonModelContext
from numpy.typing import NDArray

from lvm.bank.store import open_bank
from lvm.checkpoint.facts import Facts
from lvm.checkpoint.weights import load_model
from lvm.lanes.classifier import means_of
from lvm.lanes.reranking import LANE, NONE, RERANKS, Reranker, all_codes, lane_scores
from lvm.prediction.contexts import check_contexts
from lvm.prediction.predict import predict_contexts
from lvm.prediction.streaming import Stream, laid_out_for_steps, open_stream
from lvm.retrieval.index import ServingIndex, ensure_index
from lvm.retrieval.shortlist import SIZE, Shortlist


class ServedPredictor(PythonModel):
    """Maps contexts (B, T, D) float32 to predicted unit vectors (B, D) float32.

    Where the model's bank is at hand, the parameter k asks for the best k passages too. In one
    process, `stream` with `retrieve` answer after each new vector without its context being sent.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights that were logged with the model."""
        folder = Path(context.artifacts["config"]).parent
        self.model = load_model(folder)
        self.facts = Facts(**(Model.load(str(folder.parent)).metadata or {}))
        correction = context.artifacts.get("row_correction")
        self.row_correction = None if correction is None else np.load(correction)
        reranker = context.artifacts.get("reranker")
        self.reranker = None if reranker is None else Reranker.load(Path(reranker))
        self._stepping = self.model
        self._index: ServingIndex | None = None
        self._code_N: NDArray[np.int64] | None = None

    def predict(
        self,
        context: PythonModelContext,
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,
    ) -> NDArray[np.float32] | dict[str, NDArray[Any]]:
        """Return the predicted next vectors (B, D), unit length, for contexts (B, T, D).

        With k in `params`: a dict of `vectors` (B, D), `rows` (B, k) of the bank, best first, and
        `scores` (B, k), cosines with the model's row correction. With rerank=lane beside k the best
        200 are ordered anew by score + tau beta log p(lane | context), which the scores then are.
        Raises ValueError on an empty batch or context, another D, zero or non-finite vectors, an
        impossible k; where k is asked for, also without the model's bank; for rerank=lane, where
        the model was logged without lanes.
        """
        contexts_BTD = np.asarray(model_input, dtype=np.float32)
        check_contexts(contexts_BTD, self.facts.dim)
        unit_BTD = contexts_BTD / np.linalg.norm(contexts_BTD, axis=-1, keepdims=True)
        k, order = int((params or {}).get("k", 0)), (params or {}).get("rerank", NONE)
        self._check_order(order, k)
        if k == 0:
            return predict_contexts(self.model, unit_BTD)
        index = self.index()
        vector_BD = predict_contexts(self.model, unit_BTD)
        if order == LANE:
            row_BK, score_BK = self._by_lane(unit_BTD, vector_BD, k)
        else:
            row_BK, score_BK = index.search(vector_BD, k)
        return {"vectors": vector_BD, "rows": row_BK, "scores": score_BK}

    def _check_order(self, order: str, k: int) -> None:
        if order not in RERANKS:
            raise ValueError(f"rerank: unknown {order!r}; choose one of {', '.join(RERANKS)}")
        if order == LANE and k == 0:
            raise ValueError("rerank: orders passages, of which k = 0 are asked for; give k too")
        if order == LANE and self.reranker is None:
            raise ValueError("rerank: the model was logged without lanes; ask with rerank=none")

    def _by_lane(
        self, unit_BTD: NDArray[np.float32], vector_BD: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the best k of the best 200 with their new scores, (B, k)."""
        assert self.reranker is not None
        index = self.index()
        row_BC, score_BC = index.search(vector_BD, max(k, min(SIZE, index.facts.num_passages)))
        feature_BF = means_of(unit_BTD[:, -self.facts.ctx :])
        log_p_BL = self.reranker.classifier.log_probability(feature_BF)
        listed = Shortlist(row_BC, score_BC, np.zeros(row_BC.shape, bool))
        weights = self.reranker.plain if self.row_correction is None else self.reranker.corrected
        if self._code_N is None:
            self._code_N = all_codes(index.bank)
        new_BC = lane_scores(listed, log_p_BL, self._code_N, weights.tau * weights.beta)
        best_BK = np.argsort(-new_BC, axis=1, kind="stable")[:, :k]
        return (
            np.take_along_axis(row_BC, best_BK, axis=1),
            np.take_along_axis(new_BC, best_BK, axis=1),
        )

    def stream(self) -> Stream:
        """Return an empty stream of the model, bounded by the ctx that it was trained with."""
        self._stepping = laid_out_for_steps(self._stepping)
        return open_stream(self._stepping, self.facts.ctx)

    def retrieve(
        self, vector_BD: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the best k passages of predicted vectors as bank rows with scores, (B, k)."""
        return self.index().search(vector_BD, k)

    def index(self) -> ServingIndex:
        """Open the index over the model's bank, once; it is built under data/index if missing.

        Raises ValueError where the bank is no longer at its path, or is another one by now.
        """
        if self._index is None:
            bank = open_bank(self.facts.bank)
            if bank.sha256 != self.facts.bank_sha256:
                raise ValueError(
                    f"k: bank {bank.path} is another one (sha256 {bank.sha256[:12]}) than the "
                    f"model's ({self.facts.bank_sha256[:12]}); ask without k for vectors"
                )
            self._index = ensure_index(bank, self.model, self.facts, self.row_correction)
        return self._index
