"""The row table of a bank: which sequence, document or lane each row belongs to.

Shapes: N bank rows.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from lvm.bank.tables import name_text
from lvm.system.errors import CONTROL

Integers = npt.NDArray[np.integer]

TMD_LANES = (
    "Science",
    "Mathematics",
    "Technology",
    "Engineering",
    "Medicine",
    "Psychology",
    "Philosophy",
    "History",
    "Literature",
    "Art",
    "Economics",
    "Law",
    "Politics",
    "Education",
    "Environment",
    "Software",
)
UNASSIGNED = -1
PINNED = "train"  # value of the column `split` that makes a sequence train-only
BLOCK_ROWS = 100  # rows per document if the table names no documents
MAX_LANES = 32_767  # codes are int16
NAMES, NUMBERS = ("string", "empty"), ("integer", "floating")
KINDS = {
    "sequence": (*NAMES, *NUMBERS),
    "document": (*NAMES, *NUMBERS),
    "lane": (*NAMES, *NUMBERS),
    "split": NAMES,
    "text": NAMES,
}


@dataclass(frozen=True, eq=False)
class RowTable:
    """Integer codes of every row.

    `document_N` numbers contiguous (sequence, document) runs in row order; `documents` holds their
    own names, which may repeat in other sequences. `lane_N` is None without a lane column.
    `pinned_N` marks rows that are train rows in every split.
    """

    sequence_N: npt.NDArray[np.int32]
    document_N: npt.NDArray[np.int32]
    lane_N: npt.NDArray[np.int16] | None
    sequences: tuple[str, ...]
    documents: tuple[str, ...]
    lanes: tuple[str, ...]
    pinned_N: npt.NDArray[np.bool_]


def row_table(rows: pd.DataFrame, where: str) -> RowTable:
    """Encode and check `rows`, one line per bank row; `where` names the file in errors.

    Columns: sequence; optional document, lane, split, text. Raises ValueError for an empty table,
    missing names, names with control characters, mixed types in a column, a sequence or document in
    two pieces, a split other than PINNED or none, and a sequence of which only some rows are
    pinned.
    """
    rows = _without_categories(rows)
    _check_kinds(rows, where)
    if "sequence" not in rows.columns:
        raise ValueError(f"{where}: no column 'sequence'; give each row the name of its sequence")
    if not len(rows):
        raise ValueError(f"{where}: no rows; a bank needs at least one")
    sequence_N, sequences = _name_codes(rows["sequence"], "sequence", where)
    _check_contiguous(sequence_N, sequences, "sequence", where)
    if "document" in rows.columns:
        document_N, documents = _document_runs(rows["document"], sequence_N, where)
    else:
        document_N, documents = _document_blocks(sequence_N)
    lane_N, lanes = _lane_codes(rows["lane"], where) if "lane" in rows.columns else (None, ())
    pinned_N = _pinned(rows, sequence_N, sequences, where)
    return RowTable(sequence_N, document_N, lane_N, sequences, documents, lanes, pinned_N)


def with_sequence(
    rows: pd.DataFrame, num_rows: int, stem: str
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Return the table with a column `sequence`, and a note if it was missing.

    Without the column each document is a sequence of its own. Without documents all rows are one
    sequence, `stem`.
    """
    if "sequence" in rows:
        return rows, ()
    if "document" in rows:
        note = "no column sequence: each document is a sequence of its own"
        return rows.rename(columns={"document": "sequence"}), (note,)
    note = f"no column sequence: all rows are one sequence, {stem}"
    return pd.DataFrame({"sequence": [stem] * num_rows}).join(rows.reset_index(drop=True)), (note,)


def _without_categories(rows: pd.DataFrame) -> pd.DataFrame:
    """Replace categorical columns by their values, so that lane numbers stay numbers."""
    once = [name for name in KINDS if (rows.columns == name).sum() == 1]
    coded = [name for name in once if isinstance(rows[name].dtype, pd.CategoricalDtype)]
    return rows.astype(dict.fromkeys(coded, object)) if coded else rows


def _check_kinds(rows: pd.DataFrame, where: str) -> None:
    """Raise ValueError if a column appears twice or holds values of a wrong type."""
    for column, kinds in KINDS.items():
        if (rows.columns == column).sum() > 1:
            raise ValueError(f"{where}: has two columns {column!r}; give one")
        if column not in rows.columns:
            continue
        values = rows[column][rows[column].notna()]
        kind = pd.api.types.infer_dtype(values, skipna=True) if len(values) else "empty"
        if kind not in kinds:
            wanted = "text" if kinds == NAMES else "names or numbers, not both"
            raise ValueError(f"{where}: {column} holds {kind} values; it must hold {wanted}")


def _labels(unique: pd.Index, column: str, where: str) -> tuple[str, ...]:
    """Return names as text; control characters are refused, since names are printed."""
    names = tuple(map(name_text, unique))
    wrong = next((name for name in names if CONTROL.search(name)), None)
    if wrong is not None:
        raise ValueError(f"{where}: {column} {wrong!r} holds control characters; rename it")
    return names


def run_starts(code_N: Integers) -> npt.NDArray[np.int64]:
    """Return the first row of each run of equal codes."""
    return np.concatenate([[0], np.flatnonzero(np.diff(code_N)) + 1]).astype(np.int64)


def _name_codes(
    names: pd.Series, column: str, where: str
) -> tuple[npt.NDArray[np.int32], tuple[str, ...]]:
    """Number the names by first appearance; missing and empty names are refused."""
    missing = names.isna().to_numpy() | (names == "").to_numpy(dtype=bool, na_value=False)
    if missing.any():
        raise ValueError(
            f"{where}: {missing.sum()} rows without a {column}, first at row {missing.argmax()}; "
            f"name the {column} of every row"
        )
    code_N, unique = pd.factorize(names)
    # Names that differ only in their Unicode normal form are the same name.
    name_U, labels = pd.factorize(np.array(_labels(unique, column, where), dtype=object))
    return name_U[code_N].astype(np.int32), tuple(labels)


def _check_contiguous(
    code_N: Integers, names: tuple[str, ...], column: str, where: str, of: str = ""
) -> None:
    """Raise ValueError unless each code is one run."""
    start_R = run_starts(code_N)
    code_R = code_N[start_R]
    repeated_R = pd.Series(code_R).duplicated().to_numpy()
    if not repeated_R.any():
        return
    again = int(start_R[repeated_R.argmax()])
    before = int(np.flatnonzero(code_N[:again] == code_N[again])[-1])
    raise ValueError(
        f"{where}: {column} {names[code_N[again]]!r}{of} ends at row {before} and begins again at "
        f"row {again}; keep the rows of one {column} together"
    )


def _document_runs(
    names: pd.Series, sequence_N: npt.NDArray[np.int32], where: str
) -> tuple[npt.NDArray[np.int32], tuple[str, ...]]:
    name_N, unique = _name_codes(names, "document", where)
    pair_N = sequence_N.astype(np.int64) * len(unique) + name_N
    pair_codes_N, pairs = pd.factorize(pair_N)
    labels = tuple(unique[pair % len(unique)] for pair in pairs)
    _check_contiguous(pair_codes_N, labels, "document", where, of=" (of one sequence)")
    return pair_codes_N.astype(np.int32), labels


def _document_blocks(
    sequence_N: npt.NDArray[np.int32],
) -> tuple[npt.NDArray[np.int32], tuple[str, ...]]:
    """Cut each sequence into documents of BLOCK_ROWS rows, numbered from 0."""
    row_N = np.arange(len(sequence_N))
    start_R = run_starts(sequence_N)
    run_N = np.searchsorted(start_R, row_N, side="right") - 1
    block_N = (row_N - start_R[run_N]) // BLOCK_ROWS
    new_N = np.zeros(len(sequence_N), dtype=bool)
    new_N[run_starts(block_N)] = True
    new_N[start_R] = True
    labels = tuple(f"block-{block:06d}" for block in block_N[new_N])
    return (np.cumsum(new_N) - 1).astype(np.int32), labels


def _pinned(
    rows: pd.DataFrame, sequence_N: npt.NDArray[np.int32], sequences: tuple[str, ...], where: str
) -> npt.NDArray[np.bool_]:
    """Return which rows the column `split` pins to train; null and "" mean not pinned."""
    if "split" not in rows.columns:
        return np.zeros(len(rows), dtype=bool)
    values = rows["split"].where(rows["split"].notna() & (rows["split"] != ""), None)
    pinned_N = (values == PINNED).to_numpy(dtype=bool, na_value=False)
    wrong_N = values.notna().to_numpy() & ~pinned_N
    if wrong_N.any():
        row = int(wrong_N.argmax())
        raise ValueError(
            f"{where}: split {values.iloc[row]!r} at row {row}; only {PINNED!r} can be asked for, "
            "null leaves the row to the ordinary split"
        )
    num_pinned_S = np.bincount(sequence_N, weights=pinned_N)
    partly_S = (num_pinned_S > 0) & (num_pinned_S < np.bincount(sequence_N))
    if partly_S.any():
        raise ValueError(
            f"{where}: sequence {sequences[int(partly_S.argmax())]!r} has split {PINNED!r} in some "
            "rows only; give it to all rows of a sequence or to none"
        )
    return pinned_N


def _lane_codes(values: pd.Series, where: str) -> tuple[npt.NDArray[np.int16], tuple[str, ...]]:
    """Number the lanes in alphabetical order; null and "" are UNASSIGNED.

    Lanes given as numbers are indices into TMD_LANES, -1 for unassigned.
    """
    if pd.api.types.infer_dtype(values, skipna=True) in NUMBERS:
        values = _tmd_names(values, where)
    names = values.where(values.notna() & (values != ""), None)
    code_N, unique = pd.factorize(names.astype(object), sort=True, use_na_sentinel=True)
    if len(unique) > MAX_LANES:
        raise ValueError(f"{where}: {len(unique):,} lanes; there can be {MAX_LANES:,}")
    labels, name_U = np.unique(
        np.array(_labels(unique, "lane", where), dtype=object), return_inverse=True
    )
    return np.append(name_U, UNASSIGNED)[code_N].astype(np.int16), tuple(labels)


def _tmd_names(numbers: pd.Series, where: str) -> pd.Series:
    if numbers.dtype == object:  # numbers beside rows without one
        numbers = numbers.where(numbers.notna(), UNASSIGNED).map(
            lambda one: min(max(one, -2), 2**53)
        )
    number_N = numbers.to_numpy(dtype=np.float64, na_value=UNASSIGNED)
    wrong_N = ~np.isin(number_N, range(UNASSIGNED, len(TMD_LANES)))
    if wrong_N.any():
        row = int(wrong_N.argmax())
        raise ValueError(
            f"{where}: {wrong_N.sum()} lane numbers out of range, first {number_N[row]:g} at row "
            f"{row}; use 0 to {len(TMD_LANES) - 1}, {UNASSIGNED} for unassigned, or names"
        )
    return pd.Series(np.array([*TMD_LANES, None], dtype=object)[number_N.astype(int)])
