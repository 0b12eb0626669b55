"""The banks that a model was trained on before, and which answers of a bank have a twin there.

Shapes: N bank rows, Q rows that can be answers, M marked rows.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lvm.bank.bank import UNKNOWN_ENCODER, Bank, open_bank
from lvm.bank.duplicates import rows_with_twins
from lvm.windows.planning import TRAIN, IntArray, Windows, split_by_document


@dataclass(frozen=True)
class Origin:
    """A bank that a model was trained on, by its place and hash, with the seed of its split.

    A model of leaky windows (split=random) may have been trained on every row.
    """

    bank: str
    sha256: str
    seed: int
    leaky: bool


def as_text(origins: Sequence[Origin]) -> str:
    """Return the origins as the text that the facts of a model hold; "" for none."""
    return json.dumps([asdict(one) for one in origins]) if origins else ""


def from_text(text: str) -> tuple[Origin, ...]:
    """Return the origins that `as_text` wrote."""
    return tuple(Origin(**one) for one in json.loads(text)) if text else ()


def marked_rows(bank: Bank, windows: Windows, origins: Iterable[Origin]) -> IntArray:
    """Return the val and test rows (M,) of `bank` with a twin among the train rows of `origins`.

    A row is marked if any row of its group of duplicates has such a twin, since the group is one
    answer. Raises ValueError where a bank cannot be opened, has changed, or where its vectors are
    not of the encoder and width of `bank`.
    """
    is_marked_N = np.zeros(bank.num_rows, dtype=bool)
    group_N = windows.representative_N
    is_answer_N = np.isin(group_N, group_N[windows.split_N != TRAIN])
    for origin in origins:
        other = _opened(origin, bank)
        is_train_N = np.full(other.num_rows, origin.leaky)
        if not origin.leaky:
            is_train_N = split_by_document(other, origin.seed) == TRAIN
        seen = np.flatnonzero(is_train_N)
        is_marked_N[rows_with_twins(bank, np.flatnonzero(is_answer_N), other, seen)] = True
    return np.flatnonzero(np.isin(group_N, group_N[is_marked_N]) & (windows.split_N != TRAIN))


def _opened(origin: Origin, bank: Bank) -> Bank:
    """Open the bank of an origin; raise ValueError if it is not that bank, or does not fit."""
    digest = origin.sha256[:12]
    wanted = f"put bank {digest} back there: its train rows are compared with the answers"
    if not Path(origin.bank).exists():
        raise ValueError(f"its bank {origin.bank} does not exist; {wanted}")
    other = open_bank(origin.bank, verify=True)
    if other.sha256 != origin.sha256:
        raise ValueError(f"its bank {origin.bank} is now {other.sha256[:12]}; {wanted}")
    if (other.dim, other.encoder) != (bank.dim, bank.encoder) or other.encoder == UNKNOWN_ENCODER:
        raise ValueError(
            f"its bank {origin.bank} has {other.dim} dims of encoder {other.encoder}, bank "
            f"{bank.path} {bank.dim} of {bank.encoder}; give a model of the same known encoder"
        )
    return other
