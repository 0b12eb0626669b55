"""The predictor that MLflow serves: contexts of vectors or texts in, vectors or passages out.

Shapes: B batch, T time, D vector dim, K passages, C candidates.
"""

import base64
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext
from numpy.typing import NDArray

from lvm.bank.bank import Bank, FloatArray, open_bank
from lvm.bank.duplicates import SAME_SCORE
from lvm.bank.files import map_array
from lvm.corpus.encoders import TextEncoder, sentences_of, texts_in
from lvm.models.facts import Facts
from lvm.models.predict import (
    Stream,
    laid_out_for_steps,
    open_stream,
    predict_contexts,
    unit_contexts,
)
from lvm.models.weights import load_model
from lvm.retrieval.index import ServingIndex, ensure_index
from lvm.retrieval.lanes import lane_codes, lane_names
from lvm.retrieval.rerank import (
    CORRECTED,
    HYBRID,
    LANE,
    LEXICAL,
    NONE,
    PLAIN,
    RERANKS,
    SIZE,
    Reranker,
    SecondStage,
    Shortlist,
)
from lvm.serving.sessions import Memory, cache_bytes
from lvm.shadow.request_log import Request, RequestLog
from lvm.system.errors import one_line
from lvm.system.settings import server_settings
from lvm.windows.planning import IntArray

Answer = NDArray[np.float32] | dict[str, Any]
MAX_BYTES = 64 * 2**20  # 43,690 vectors of 384 dims
VALUE = np.dtype("<f4")
WAYS = (
    "give its folder as LVM_BANK or in load_model(..., model_config={'bank': ...}), or ask without "
    "k for vectors"
)
MAX_PASSAGES = 1000
MAX_IN_ALL = 100_000  # passages of one request, each a dict of some 500 bytes
COSINES = 2**24  # compared at a time: 64 MB
BY = {LANE: "lane", LEXICAL: "words", HYBRID: "lane and words"}
# Candidates beyond those asked for, of which the context may hold some: 95 % of 60 contexts of
# 1,000 docstring rows held at most 12 of the best 17. Each costs 0.04 ms at 768 dims.
SPARE = 12


@dataclass(frozen=True)
class Wanted:
    """A request for `k` passages (0: none) in the order `rerank`.

    Passages equal to a row of the context are omitted unless `keep_context`. The answer has the
    predicted vectors, too, unless `vectors` is False. Raises ValueError for an impossible request.
    """

    k: int
    rerank: str = NONE
    keep_context: bool = False
    vectors: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.k <= MAX_PASSAGES:
            raise ValueError(f"k: {self.k} is outside 0 ... {MAX_PASSAGES:,}")
        if self.rerank not in RERANKS:
            raise ValueError(f"rerank: unknown {self.rerank!r}; choose one of {', '.join(RERANKS)}")
        if self.rerank != NONE and self.k == 0:
            raise ValueError("rerank: orders passages, of which k = 0 are asked for; give k too")
        if not (self.vectors or self.k):
            raise ValueError("vectors: false leaves no answer where k = 0; give k too")

    def answer(self, found: dict[str, Any]) -> dict[str, Any]:
        """Return the parts of what was found that were asked for."""
        return {name: value for name, value in found.items() if self.vectors or name != "vectors"}

    def check_batch(self, num_contexts: int) -> None:
        """Raise ValueError if so many contexts would return too many passages.

        Re-ranking holds its whole shortlist in memory, even for a small k.
        """
        held = max(self.k, SIZE) if self.rerank != NONE else self.k
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
        self,
        unit_BTD: FloatArray,
        vector_BD: FloatArray,
        wanted: Wanted,
        text_BT: Sequence[Sequence[str]] | None = None,
    ) -> tuple[IntArray, FloatArray]:
        """Return the k best passages after contexts of unit vectors: bank rows, scores, (B, K).

        Best first; row -1 with score -inf where there are no more. Scores are those of the index,
        or with a second stage those of `SecondStage.scores`, which orders the best 200; for words
        it reads the texts of the contexts, `text_BT`. Raises ValueError for k above the number of
        passages, for a stage that was not logged with the model, and for words without texts.
        """
        if wanted.rerank == NONE:
            return self._candidates(unit_BTD, vector_BD, wanted.k, wanted.keep_context)
        stage = self._stage(wanted.rerank)
        if stage.index is not None and text_BT is None:
            raise ValueError(
                f"rerank: {wanted.rerank} reads texts, which neither vectors nor sessions have; "
                "give whole contexts as texts, or ask with rerank=none or lane"
            )
        num_listed = max(wanted.k, min(SIZE, self.index.facts.num_passages))
        listed = self._candidates(unit_BTD, vector_BD, num_listed, wanted.keep_context)
        clues = stage.after_contexts(
            unit_BTD[:, -self.ctx :], [t[-self.ctx :] for t in text_BT or []]
        )
        shortlist = Shortlist(*listed, np.zeros(listed[0].shape, bool))
        is_plain = self.index.pair_N2 is None
        assert self.reranker is not None
        weights = self.reranker.weights[wanted.rerank][PLAIN if is_plain else CORRECTED]
        return _ordered(listed[0], stage.scores(shortlist, clues, weights), wanted.k)

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
        return name if rerank == NONE else f"{name}, re-ranked by {BY[rerank]}"

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

    def _stage(self, rerank: str) -> SecondStage:
        """Open a second stage, once; its word index is built under data/index if missing."""
        if rerank not in self._stages:
            known = Reranker(None, {}) if self.reranker is None else self.reranker
            self._stages[rerank] = known.stage(rerank, self.index.bank)
        return self._stages[rerank]

    @cached_property
    def _stages(self) -> dict[str, SecondStage]:
        return {}

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


class ServedPredictor(PythonModel):
    """Maps contexts (B, T, D) float32 to predicted unit vectors (B, D) float32.

    With the model's bank on this machine, the parameter k returns the best k passages, too. With
    the bank's encoder, contexts may be texts. In one process, `stream` and `retrieve` answer after
    each new vector without the context being sent.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights that were logged with the model; read the settings of the server."""
        folder = Path(context.artifacts["config"]).parent
        self.model = load_model(folder)
        self.facts = Facts(**(Model.load(str(folder.parent)).metadata or {}))
        settings = server_settings(context.model_config or {})
        self._bank_path = settings["bank"] or context.artifacts.get("bank") or self.facts.bank
        correction = context.artifacts.get("row_correction")
        self.row_correction = None if correction is None else np.array(map_array(Path(correction)))
        reranker = context.artifacts.get("reranker")
        self.reranker = None if reranker is None else Reranker.load(Path(reranker))
        max_bytes = cache_bytes(settings["cache_bytes"])
        self._stepping = laid_out_for_steps(self.model) if max_bytes else self.model
        self._memory = Memory(self._stepping, self.facts.ctx, max_bytes) if max_bytes else None
        requests = settings["request_log"]
        self._requests = RequestLog(Path(requests)) if requests else None
        self._opening = threading.RLock()  # a server answers in several threads
        self._bank: Bank | None = None
        self._retriever: Retriever | None = None
        self._encoder: TextEncoder | None = None

    def predict(
        self,
        context: PythonModelContext,
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,
    ) -> Answer:
        """Return the predicted next vectors (B, D), unit length, for contexts (B, T, D).

        A context may also be a text, as one string, which is split as a corpus is, or as a list of
        sentences; the encoder of the model's bank embeds them.

        At least the last 0.8 ctx rows of each context are read, and at most ctx, as in evaluation;
        ctx is that of the training. With k in `params`, return a dict of `vectors` (B, D), `rows`
        (B, k) of the bank, best first, `scores` (B, k) and `passages`, one list per context, see
        `Retriever.describe`. Scores are cosines with the model's row correction; rerank
        changes order and scores, see `Retriever.best`; lexical and hybrid need contexts that are
        texts. Passages equal to a row of the context are omitted unless keep_context=True; if fewer
        than k are left, the rest have row -1 and the lowest float32 as score. vectors=False omits
        `vectors`. `packed` holds the contexts as text, see `unpack`. With the name of a
        `session`, the one context of the input follows what the session sent before, or its first
        `position` rows; the answer is a dict with `context_rows`, the rows of the session.

        Raises Refusal, a ValueError, for an empty batch or context, another D, zero or non-finite
        vectors, an impossible k or one too large for B; with k, if the model's bank is missing or
        cannot be read; for a second stage that the model was logged without; for a session that
        has fewer rows than `position`, or on a server that holds none.
        """
        try:
            return self._answer(model_input, params or {})
        except ValueError as error:
            raise Refusal(str(error)) from error
        except OSError as error:  # only passages and encoders are read from files
            reason = (
                f"k: the bank cannot be read ({error}); mend that, or ask without k for vectors"
            )
            raise Refusal(reason) from error

    def _answer(self, model_input: Any, params: Mapping[str, Any]) -> Answer:
        wanted = Wanted(
            int(params.get("k", 0)),
            params.get("rerank", NONE),
            bool(params.get("keep_context", False)),
            bool(params.get("vectors", True)),
        )
        batches, texts = self._contexts(model_input, params.get("packed", ""))
        wanted.check_batch(sum(map(len, batches)))
        retriever = None if wanted.k == 0 else self._opened()
        name = params.get("session", "")
        if not name:
            predicted = [self._predict(one) for one in batches]
            found = self._found(retriever, batches, predicted, wanted, texts)
            self._record("", 0, batches, found)
            return wanted.answer(found) if retriever else found["vectors"]
        with self._session(name, params.get("position", -1), batches) as (context_TD, vector_D):
            found = self._found(retriever, [context_TD[None]], [vector_D[None]], wanted)
            self._record(name, len(context_TD) - batches[0].shape[1], batches, found)
            return wanted.answer(found) | {"context_rows": len(context_TD)}

    def _predict(self, unit_BTD: FloatArray) -> FloatArray:
        """Return the predictions (B, D); a context by itself may continue an earlier one."""
        if self._memory is not None and len(unit_BTD) == 1:
            return self._memory.predict(unit_BTD[0])[None]
        return predict_contexts(self.model, unit_BTD, self.facts.ctx)

    def _session(
        self, name: str, position: int, batches: list[FloatArray]
    ) -> AbstractContextManager[tuple[FloatArray, FloatArray]]:
        if self._memory is None:
            raise ValueError(
                "session: this server holds none, because LVM_CACHE_BYTES is 0; send whole contexts"
            )
        if [len(one) for one in batches] != [1]:
            raise ValueError("session: takes one context; send the others in requests of their own")
        return self._memory.session(name, batches[0][0], None if position < 0 else position)

    def _found(
        self,
        retriever: Retriever | None,
        batches: list[FloatArray],
        predicted: list[FloatArray],
        wanted: Wanted,
        texts: Sequence[Sequence[Sequence[str]] | None] = (None,),
    ) -> dict[str, Any]:
        """Return the predictions, with their passages if there is a retriever."""
        vector_BD = np.concatenate(predicted)
        if retriever is None:
            return {"vectors": vector_BD}
        parts = zip(batches, predicted, texts, strict=True)
        found = [retriever.best(unit, vector, wanted, own) for unit, vector, own in parts]
        rows, scores = zip(*found, strict=True)
        row_BK, score_BK = np.concatenate(rows), np.concatenate(scores)
        passages = [retriever.describe(*one) for one in zip(row_BK, score_BK, strict=True)]
        lowest = np.finfo(np.float32).min  # JSON has no infinity
        score_BK = np.maximum(score_BK, lowest)
        return {"passages": passages, "rows": row_BK, "scores": score_BK, "vectors": vector_BD}

    def _record(
        self, session: str, position: int, batches: list[FloatArray], found: dict[str, Any]
    ) -> None:
        """Hand the contexts of an answered request to the request log, if there is one."""
        if self._requests is None:
            return
        nothing: list[list[int]] = [[]] * len(found["vectors"])
        answers = found["vectors"], found.get("rows", nothing), found.get("scores", nothing)
        sent = (sent_TD for batch_BTD in batches for sent_TD in batch_BTD)
        for sent_TD, *answer in zip(sent, *answers, strict=True):
            self._requests.append(Request(session, position, sent_TD, *answer))

    def _contexts(
        self, model_input: Any, packed: str
    ) -> tuple[list[FloatArray], Sequence[Sequence[Sequence[str]] | None]]:
        """Return the contexts in batches (B, T, D) of one length each: a text is one by itself.

        Beside each batch stand the sentences of its contexts, None for vectors.
        """
        texts = texts_in(model_input)
        if texts is not None:
            sentences = [sentences_of(one) for one in texts]
            encoder = self._own_encoder()
            return [encoder.encode(one)[None] for one in sentences], [[one] for one in sentences]
        try:
            contexts_BTD = np.asarray(model_input)
        except ValueError:  # lists of several lengths
            contexts_BTD = np.asarray(None)
        if packed:
            contexts_BTD = unpack(packed, contexts_BTD)
        return [unit_contexts(contexts_BTD, self.facts.dim)], [None]

    def stream(self) -> Stream:
        """Return an empty stream of the model, bounded by the ctx that it was trained with."""
        self._stepping = laid_out_for_steps(self._stepping)
        return open_stream(self._stepping, self.facts.ctx)

    def retrieve(
        self, vector_BD: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the best k passages of predicted vectors as bank rows with scores, (B, k).

        No passage is omitted: the contexts are not known here.
        """
        return self.index().search(vector_BD, k)

    def index(self) -> ServingIndex:
        """Open the index over the model's bank, once; it is built under data/index if missing.

        Raises ValueError if the bank is missing or has another hash than the model's.
        """
        return self._opened().index

    def _opened(self) -> Retriever:
        with self._opening:
            if self._retriever is None:
                bank = self._own_bank("k")
                index = ensure_index(bank, self.model, self.facts, self.row_correction)
                self._retriever = Retriever(index, self.facts.ctx, self.reranker)
            return self._retriever

    def _own_encoder(self) -> TextEncoder:
        """Load the encoder of the model's bank, once; facts recorded before do not name it."""
        with self._opening:
            if self._encoder is None:
                name = self.facts.encoder or self._own_bank("text").encoder
                self._encoder = TextEncoder(self._bank_path, name, self.facts.dim, download=False)
            return self._encoder

    def _own_bank(self, asked: str) -> Bank:
        """Open the model's bank, once; `asked` names what needs it."""
        with self._opening:
            if self._bank is None:
                digest = self.facts.bank_sha256[:12]
                try:
                    bank = open_bank(self._bank_path, verify=True)
                except (OSError, ValueError) as error:
                    reason = f"the model's bank {digest} cannot be read ({error})"
                    raise ValueError(f"{asked}: {reason}; {WAYS}") from error
                if bank.sha256 != self.facts.bank_sha256:
                    raise ValueError(
                        f"{asked}: bank {bank.path} is another one (sha256 {bank.sha256[:12]}) "
                        f"than the model's ({digest}); {WAYS}"
                    )
                self._bank = bank
            return self._bank


def unpack(packed: str, shape_BTD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the contexts (B, T, D) of `packed`: base64 of little-endian float32 in C order.

    Packed contexts take a quarter of their size as JSON numbers. `shape_BTD` is a placeholder
    (B, 1, D) that gives B and D; T follows from the number of bytes. It must be zeros, so that a
    model that does not know `packed` refuses it instead of predicting from it. Raises ValueError
    for another placeholder, and if `packed` is too long, no base64, or no whole vectors for each of
    the B contexts.
    """
    is_zero = shape_BTD.dtype.kind in "biuf" and not shape_BTD.any()
    if shape_BTD.ndim != 3 or len(shape_BTD) == 0 or shape_BTD.shape[1] != 1 or not is_zero:
        raise ValueError("packed: holds the whole contexts; as inputs give zeros, (batch, 1, dim)")
    if len(packed) > 4 * -(-MAX_BYTES // 3):
        raise ValueError(f"packed: is longer than {MAX_BYTES // 2**20} MiB; send fewer contexts")
    try:
        raw = base64.b64decode(packed, validate=True)
    except ValueError as error:
        raise ValueError(f"packed: is no base64 text ({error})") from None
    batch, _, dim = shape_BTD.shape
    row_bytes = batch * dim * VALUE.itemsize
    if len(raw) % row_bytes:
        raise ValueError(
            f"packed: {len(raw):,} bytes are not float32 values for {batch} x time x {dim}, a "
            f"multiple of {row_bytes:,} bytes"
        )
    return np.frombuffer(raw, VALUE).reshape(batch, -1, dim).astype(np.float32)


class Refusal(MlflowException, ValueError):
    """A bad request: a ValueError in the same process; a 400 with its reason over HTTP.

    MLflow's server adds a traceback to its answer for every error that is not MLflow's own.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(one_line(reason), error_code=INVALID_PARAMETER_VALUE)

    def serialize_as_json(self) -> str:
        """Return the body of the answer without the data, which the server adds to `message`."""
        self.message = str(self)
        return str(super().serialize_as_json())
