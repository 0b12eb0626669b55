"""Synthetic banks whose structure is known, reproducible by seed.

Shapes: N bank rows, D vector dim.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from lvm.bank.bank import Bank, write_bank
from lvm.system.seeding import generator


def make_bank(
    path: Path,
    *,
    num_sequences: int = 6,
    num_documents: int = 12,
    document_rows: int = 20,
    dim: int = 16,
    num_lanes: int = 3,
    num_twins: int = 12,
    decay: float = 0.8,
    dtype: str = "float16",
    seed: int = 0,
) -> Bank:
    """Write an AR(1) bank: neighbours are similar, cosine about `decay` from row to row.

    Each document starts a little apart from the last. `num_twins` pairs of rows far apart are byte
    for byte equal. Sequence i has lane i mod `num_lanes`; each row has a text.
    """
    random = generator(seed, "make_bank")
    rows = _row_table(num_sequences, num_documents, document_rows, num_lanes)
    noise_ND = random.standard_normal((len(rows), dim))
    vector_ND = np.zeros((len(rows), dim))  # row 0 reads the row before it, times 0
    sequence_rows = num_documents * document_rows
    for row, noise in enumerate(noise_ND):
        keep = decay * (0.5 if row % document_rows == 0 else 1.0) if row % sequence_rows else 0.0
        vector_ND[row] = keep * vector_ND[row - 1] + np.sqrt(1 - keep**2) * noise
    pairs = random.permutation(len(rows))[: 2 * num_twins].reshape(-1, 2)
    vector_ND[pairs[:, 1]] = vector_ND[pairs[:, 0]]
    return _write(path, vector_ND, rows, dtype)


def telling_bank(path: Path) -> Bank:
    """Write the bank of `make_bank` with texts in which each row repeats a word of the last one."""
    bank = make_bank(path)
    rows = pd.read_parquet(path / "rows.parquet")
    rows["text"] = [f"what follows word{row - 1} is word{row}" for row in range(bank.num_rows)]
    return write_bank(path, np.array(bank.vectors), rows, "synthetic", "test", overwrite=True)


def rotation_bank(
    path: Path,
    *,
    num_sequences: int = 4,
    num_documents: int = 12,
    document_rows: int = 20,
    dim: int = 16,
    dtype: str = "float32",
    seed: int = 0,
) -> Bank:
    """Write a bank in which each vector is one fixed rotation of the vector before it.

    The rotation is `rotation(dim, seed)`; sequences start at random points. A linear predictor
    answers every query exactly.
    """
    random = generator(seed, "rotation_bank")
    rows = _row_table(num_sequences, num_documents, document_rows, 1)
    matrix_DD = rotation(dim, seed)
    vector_ND = np.empty((len(rows), dim))
    for row in range(len(rows)):
        first = row % (num_documents * document_rows) == 0
        vector_ND[row] = random.standard_normal(dim) if first else matrix_DD @ vector_ND[row - 1]
    return _write(path, vector_ND, rows, dtype)


def rotation(dim: int, seed: int = 0) -> np.ndarray:
    """Return the (D, D) rotation M of `rotation_bank`: next = M @ current."""
    random = generator(seed, "rotation")
    basis_DD, _ = np.linalg.qr(random.standard_normal((dim, dim)))
    angles = random.uniform(0.3, 1.5, dim // 2)
    plane_DD = np.eye(dim)
    for pair, angle in enumerate(angles):
        block = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        plane_DD[2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2] = block
    return basis_DD @ plane_DD @ basis_DD.T


def noise_bank(
    path: Path,
    *,
    num_sequences: int = 4,
    num_documents: int = 12,
    document_rows: int = 20,
    dim: int = 16,
    dtype: str = "float16",
    seed: int = 0,
) -> Bank:
    """Write a bank of independent directions: no predictor can beat chance."""
    rows = _row_table(num_sequences, num_documents, document_rows, 2)
    vector_ND = generator(seed, "noise_bank").standard_normal((len(rows), dim))
    return _write(path, vector_ND, rows, dtype)


def _row_table(
    num_sequences: int, num_documents: int, document_rows: int, num_lanes: int
) -> pd.DataFrame:
    row_N = np.arange(num_sequences * num_documents * document_rows)
    document_N = row_N // document_rows
    sequence_N = document_N // num_documents
    return pd.DataFrame(
        {
            "sequence": [f"sequence-{code}" for code in sequence_N],
            "document": [f"document-{code % num_documents}" for code in document_N],
            "lane": [f"lane-{code % num_lanes}" for code in sequence_N],
            "text": [f"Sentence number {row}." for row in row_N],
        }
    )


def _write(path: Path, vector_ND: np.ndarray, rows: pd.DataFrame, dtype: str) -> Bank:
    unit_ND = vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True)
    return write_bank(path, unit_ND, rows, "synthetic", "tests/synthetic.py", dtype)


def lane_rotation_bank(
    path: Path,
    *,
    num_lanes: int = 4,
    num_documents: int = 12,
    document_rows: int = 20,
    dim: int = 12,
    seed: int = 0,
) -> Bank:
    """Write a bank in which each lane has a rotation of its own, and shows which lane it is.

    The first `dim` entries of a vector turn by the rotation of its lane's number, the last
    `num_lanes` are the lane's own. There are two sequences a lane.
    """
    random = generator(seed, "lane_rotation_bank")
    rows = _row_table(2 * num_lanes, num_documents, document_rows, num_lanes)
    lane_N = rows["lane"].str.removeprefix("lane-").astype(int).to_numpy()
    matrix_LDD = np.stack([rotation(dim, seed + lane) for lane in range(num_lanes)])
    vector_ND = np.zeros((len(rows), dim + num_lanes))
    for row, lane in enumerate(lane_N):
        first = row % (num_documents * document_rows) == 0
        point_D = (
            random.standard_normal(dim) if first else matrix_LDD[lane] @ vector_ND[row - 1, :dim]
        )
        vector_ND[row, :dim] = point_D / np.linalg.norm(point_D)
        vector_ND[row, dim + lane] = 1.0
    return _write(path, vector_ND, rows, "float32")
