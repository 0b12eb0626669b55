"""Assign lanes to the rows of a bank: its labels, written prototypes or clusters.

A document is assigned as a whole, by its mean vector, which agrees with known subjects far better
than single rows do (docs/LOG.md, 2026-11-25). Shapes: N bank rows, M documents, D vector dim, L
lanes, A labels of the bank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from lvm.bank.bank import Bank, FloatArray
from lvm.bank.row_table import TMD_LANES, UNASSIGNED, Integers, run_starts
from lvm.corpus.encoders import UNNAMED_ENCODERS, Encoder, load_encoder
from lvm.system.errors import one_line_errors
from lvm.system.seeding import torch_seed
from lvm.system.settings import LaneRules, read_yaml
from lvm.windows.planning import Windows

BANK, PROTOTYPES, KMEANS = METHODS = ("bank", "prototypes", "kmeans")
DOMAINS_FILE = Path(__file__).with_name("domains.yaml")
CHECKED_ROWS = 8
SAME_ENCODER = 0.9  # cosine: the bank's own encoder reaches 0.99 or more, others less than 0.5
CLUSTERS = 16  # for a bank without lanes
STARTS = 10
TERMS = 2
WORD = r"(?u)\b[^\W\d_]{3,}\b"


@dataclass(frozen=True)
class Assignment:
    """A bank with the lanes of one method; `facts` describe the method, as JSON values."""

    method: str
    bank: Bank
    facts: dict[str, Any] = field(default_factory=dict)


def assign_lanes(
    bank: Bank,
    windows: Windows,
    rules: LaneRules,
    method: str = BANK,
    encoder: str | None = None,
    seed: int = 0,
) -> Assignment:
    """Return the bank with the lanes of `method`; `encoder` None means the encoder the bank names.

    Raises ValueError for an unknown method, for labels of a bank that has none, and for an encoder
    that is missing or did not make the bank.
    """
    if method == BANK:
        if bank.lane_N is None:
            raise ValueError(
                f"lanes: bank {bank.path} has no labels of its own; use lanes={PROTOTYPES}, "
                f"lanes={KMEANS}, or add a column 'lane' to its row table"
            )
        return Assignment(BANK, bank)
    if method == PROTOTYPES:
        found = prototype_lanes(bank, bank_encoder(bank, encoder), read_domains(), rules)
        return replace(found, facts=found.facts | {"checked_rows": len(checked_texts(bank)[1])})
    if method == KMEANS:
        return cluster_lanes(bank, windows, len(bank.lanes) or CLUSTERS, seed)
    raise ValueError(f"lanes: {method!r} is unknown; use one of {', '.join(METHODS)}")


@one_line_errors
def with_lanes(bank: Bank, lane_M: Sequence[str | None], lanes: Sequence[str]) -> Bank:
    """Return the bank with these lanes: one name per document, None for no lane.

    Raises ValueError for a name that is not among `lanes`.
    """
    code = {name: place for place, name in enumerate(lanes)} | {None: UNASSIGNED}
    unknown = sorted({str(name) for name in lane_M if name not in code})
    if unknown:
        raise ValueError(
            f"lanes: {', '.join(unknown)} unknown; a lane is one of {', '.join(lanes)}"
        )
    code_M = np.array([code[name] for name in lane_M], np.int16)
    return replace(bank, lane_N=code_M[bank.document_N], lanes=tuple(lanes))


def bank_encoder(bank: Bank, name: str | None = None) -> Encoder:
    """Load the encoder of the bank without downloads; `name` None means the one the bank records.

    Raises ValueError if it is unknown or missing, has another dim, or does not reproduce the
    vectors of the bank's texts (see `checked_texts`).
    """
    name = name or bank.encoder
    if name in UNNAMED_ENCODERS:
        raise ValueError(
            f"encoder: bank {bank.path} does not record what made its vectors; give its encoder: "
            "wordllama or the local folder of a sentence-transformers model"
        )
    encoder = load_encoder(name, download=False)
    if encoder.dim != bank.dim:
        raise ValueError(
            f"encoder {name!r}: gives {encoder.dim} dims, bank {bank.path} has {bank.dim}; give "
            f"the encoder that made the bank ({bank.encoder})"
        )
    row_R, texts = checked_texts(bank)
    if texts:
        unit_RD = encoder.encode(texts)
        same = float(np.median(np.einsum("rd,rd->r", unit_RD, bank.unit(row_R))))
        if same < SAME_ENCODER:
            raise ValueError(
                f"encoder {name!r}: gives texts of bank {bank.path} other vectors (median cosine "
                f"{same:.2f}); give the encoder that made the bank ({bank.encoder})"
            )
    return encoder


def checked_texts(bank: Bank) -> tuple[Integers, list[str]]:
    """Return up to eight rows with their texts, spread evenly over the rows with text."""
    text_N = bank.texts()
    told = [] if text_N is None else [row for row, text in enumerate(text_N) if text.strip()]
    if text_N is None or not told:
        return np.empty(0, np.int64), []
    place = np.unique(np.linspace(0, len(told) - 1, CHECKED_ROWS).astype(np.int64))
    row_R = np.array(told)[place]
    return row_R, text_N[row_R].tolist()


@one_line_errors
def read_domains(path: str | Path = DOMAINS_FILE) -> dict[str, list[str]]:
    """Read the sentences that describe each domain; raises ValueError for a wrong file."""
    contents = read_yaml(Path(path), "domains")
    if not isinstance(contents, dict) or not contents:
        raise ValueError(f"domains {path}: must name domains, each with a list of sentences")
    for name, sentences in contents.items():
        if name not in TMD_LANES:
            known = ", ".join(TMD_LANES)
            raise ValueError(f"domains {path}: {name!r} is not a lane; the lanes are {known}")
        texts = sentences if isinstance(sentences, list) else []
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"domains {path}: {name} must have a list of one or more sentences")
    return contents


def prototype_lanes(
    bank: Bank, encoder: Encoder, domains: Mapping[str, Sequence[str]], rules: LaneRules
) -> Assignment:
    """Assign each document to the domain whose prototype is nearest to its mean vector.

    The mean of all prototypes is first subtracted from both, which removes the direction common to
    all texts of an encoder. A document too near to two prototypes, or to none, has no lane (see
    LaneRules).
    """
    prototype_LD = _unit(
        np.stack([encoder.encode(list(sentences)).mean(axis=0) for sentences in domains.values()])
    )
    centre_D = prototype_LD.mean(axis=0)
    mean_MD = document_means(bank)
    score_ML = _unit(mean_MD - centre_D) @ _unit(prototype_LD - centre_D).T
    order_ML = np.argsort(-score_ML, axis=1, kind="stable")
    sorted_ML = np.take_along_axis(score_ML, order_ML, axis=1)
    best_M = sorted_ML[:, 0]
    second_M = sorted_ML[:, 1] if len(domains) > 1 else np.full_like(best_M, -1)
    is_sure_M = (best_M >= rules.assign_score) & (best_M - second_M >= rules.assign_margin)
    names = list(domains)
    lane_M = [names[c] if sure else None for c, sure in zip(order_ML[:, 0], is_sure_M, strict=True)]
    facts = {
        "encoder": encoder.name,
        "min_score": rules.assign_score,
        "min_margin": rules.assign_margin,
    }
    return _assignment(PROTOTYPES, with_lanes(bank, lane_M, names), facts)


def cluster_lanes(bank: Bank, windows: Windows, num_lanes: int, seed: int = 0) -> Assignment:
    """Cluster the documents by k-means, fitted on the mean vectors of their train rows.

    A lane is named cluster-<number>, followed by its characteristic terms if the bank has texts.
    Raises ValueError for fewer documents with train rows than lanes.
    """
    is_train_N = np.zeros(bank.num_rows, bool)
    is_train_N[windows.train_rows()] = True
    train_rows_M = np.bincount(bank.document_N, weights=is_train_N)
    in_train_M = train_rows_M > 0
    if in_train_M.sum() < num_lanes:
        raise ValueError(
            f"lanes: {in_train_M.sum()} documents with train rows in bank {bank.path} make no "
            f"{num_lanes} clusters; use a larger bank"
        )
    seed_32 = torch_seed(seed, "lane clusters") % 2**32
    clusters = KMeans(num_lanes, n_init=STARTS, random_state=seed_32)
    train_mean_MD = document_means(bank, is_train_N)[in_train_M]
    clusters.fit(train_mean_MD, sample_weight=train_rows_M[in_train_M])
    code_M = clusters.predict(document_means(bank))
    names = [f"cluster-{code:02d}" for code in range(num_lanes)]
    terms = _terms(bank, code_M, in_train_M, num_lanes)
    names = [" ".join([name, *words]) for name, words in zip(names, terms, strict=True)]
    found = with_lanes(bank, [names[code] for code in code_M], names)
    return _assignment(KMEANS, found, {"clusters": num_lanes, "seed": seed})


def document_means(bank: Bank, use_N: NDArray[np.bool_] | None = None) -> FloatArray:
    """Return the unit mean vector of each document's rows, or of its rows in `use_N`, (M, D).

    A document without such rows has a zero vector.
    """
    sum_MD = np.zeros((len(bank.documents), bank.dim), np.float32)
    for start, unit_BD in bank.unit_blocks():
        code_B = bank.document_N[start : start + len(unit_BD)]
        if use_N is not None:
            unit_BD = unit_BD * use_N[start : start + len(unit_BD), None]
        first = run_starts(code_B)
        sum_MD[code_B[first]] += np.add.reduceat(unit_BD, first, axis=0)
    return _unit(sum_MD)


def _assignment(method: str, bank: Bank, facts: dict[str, Any]) -> Assignment:
    assert bank.lane_N is not None
    num_unassigned = int((bank.lane_N == UNASSIGNED).sum())
    count = np.bincount(bank.lane_N[bank.lane_N >= 0], minlength=len(bank.lanes))
    rows = dict(zip(bank.lanes, count.tolist(), strict=True))
    return Assignment(method, bank, facts | {"rows": rows, "unassigned_rows": num_unassigned})


def _terms(
    bank: Bank, code_M: NDArray[np.integer], in_train_M: NDArray[np.bool_], num_lanes: int
) -> list[list[str]]:
    """Return the words whose TF-IDF in a cluster's train documents most exceeds that elsewhere."""
    text_N = bank.texts()
    terms: list[list[str]] = [[] for _ in range(num_lanes)]
    if text_N is None:
        return terms
    first_row, num_rows = bank.document_table()[["first_row", "num_rows"]].to_numpy().T
    text_M = [
        " ".join(text_N[row : row + num]) for row, num in zip(first_row, num_rows, strict=True)
    ]
    chosen = np.flatnonzero(in_train_M)
    weights = TfidfVectorizer(stop_words="english", token_pattern=WORD, sublinear_tf=True)
    try:
        weight_MW = weights.fit_transform([text_M[place] for place in chosen])
    except ValueError:  # no words
        return terms
    words = weights.get_feature_names_out()
    overall_W = np.asarray(weight_MW.mean(axis=0)).ravel()
    for code in np.unique(code_M[chosen]):
        own_W = np.asarray(weight_MW[code_M[chosen] == code].mean(axis=0)).ravel()
        best = np.argsort(overall_W - own_W, kind="stable")[:TERMS]
        terms[code] = [str(words[place]) for place in best if own_W[place] > overall_W[place]]
    return terms


def _unit(vector_MD: NDArray[np.floating]) -> FloatArray:
    length_M1 = np.linalg.norm(vector_MD, axis=1, keepdims=True)
    return np.asarray(vector_MD / np.where(length_M1 > 0, length_M1, 1), np.float32)


@dataclass(frozen=True)
class Agreement:
    """Agreement of assigned lanes with the bank's own labels, over the rows that have both.

    Attributes:
        adjusted_rand: 1 for equal partitions, 0 on average for random ones (Hubert & Arabie,
            Journal of Classification 1985); `nmi` is mutual information over the mean entropy.
        best_match: lane of each label in the one-to-one matching with the most rows; its share of
            the rows is `best_match_accuracy`, of all labelled rows `best_match_of_labelled`.
        same_name_accuracy: share of rows whose lane has the name of their label, among rows whose
            label is a lane's name; None if no name is shared.
        count_AL: rows by (label, lane), the unassigned ones in the last column.
    """

    num_labelled: int
    num_assigned: int
    adjusted_rand: float
    nmi: float
    best_match: dict[str, str]
    best_match_accuracy: float
    best_match_of_labelled: float
    same_name_accuracy: float | None
    labels: tuple[str, ...]
    lanes: tuple[str, ...]
    count_AL: NDArray[np.int64]

    def report(self) -> dict[str, Any]:
        """Return the agreement as JSON values."""
        values = asdict(self) | {"counts": self.count_AL.tolist()}
        del values["count_AL"]
        return values


def lane_agreement(labelled: Bank, assigned: Bank) -> Agreement | None:
    """Compare the lanes of two views of one bank; None if no row has both label and lane."""
    label_N, lane_N = labelled.lane_N, assigned.lane_N
    if label_N is None or lane_N is None:
        return None
    has_label_N = label_N != UNASSIGNED
    both_N = has_label_N & (lane_N != UNASSIGNED)
    if not both_N.any():
        return None
    num_lanes = len(assigned.lanes)
    column_N = np.where(lane_N == UNASSIGNED, num_lanes, lane_N).astype(np.int64)
    flat = label_N[has_label_N].astype(np.int64) * (num_lanes + 1) + column_N[has_label_N]
    size = len(labelled.lanes) * (num_lanes + 1)
    count_AL = np.bincount(flat, minlength=size).reshape(-1, num_lanes + 1)
    row, column = linear_sum_assignment(count_AL[:, :-1], maximize=True)
    num_matched = int(count_AL[row, column].sum())
    return Agreement(
        num_labelled=int(has_label_N.sum()),
        num_assigned=int(both_N.sum()),
        adjusted_rand=float(adjusted_rand_score(label_N[both_N], lane_N[both_N])),
        nmi=float(normalized_mutual_info_score(label_N[both_N], lane_N[both_N])),
        best_match={labelled.lanes[a]: assigned.lanes[b] for a, b in zip(row, column, strict=True)},
        best_match_accuracy=num_matched / int(both_N.sum()),
        best_match_of_labelled=num_matched / int(has_label_N.sum()),
        same_name_accuracy=_same_name(count_AL, labelled.lanes, assigned.lanes),
        labels=labelled.lanes,
        lanes=assigned.lanes,
        count_AL=count_AL,
    )


def _same_name(
    count_AL: NDArray[np.int64], labels: tuple[str, ...], lanes: tuple[str, ...]
) -> float | None:
    shared = [name for name in labels if name in lanes]
    num_rows = sum(int(count_AL[labels.index(name), :-1].sum()) for name in shared)
    if not num_rows:
        return None
    same = sum(int(count_AL[labels.index(name), lanes.index(name)]) for name in shared)
    return same / num_rows
