"""Leak audit: counts of rows of val or test that a plan of windows leaks into train.

Shapes: N bank rows, W windows, Q queries.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvm.bank.store import Bank
from lvm.windows.planning import SPLITS, TRAIN, Windows
from lvm.windows.queries import Queries

# All of these must be zero, except in a plan that is marked leaky.
VIOLATIONS = (
    "train_windows_with_held_out_inputs",
    "train_windows_with_held_out_targets",
    "held_out_windows_with_foreign_targets",
    "documents_in_two_splits",
    "windows_across_sequences",
    "queries_of_another_split",
    "queries_with_twin_in_train",
    "contexts_across_sequences",
    "contexts_out_of_bounds",
)


def audit_windows(bank: Bank, windows: Windows) -> dict[str, Any]:
    """Return the counts of a plan's leaks, named in VIOLATIONS, and two more for information.

    The two are how many val targets are inputs of some train window, with their share, and how
    many test contexts hold a duplicate of their target (text that repeats inside a sequence).
    """
    counts = _count_query_leaks(bank, windows) | _count_window_leaks(bank, windows)
    covered_N = _num_covering(bank.num_rows, *windows.train_windows()) > 0
    val, test = windows.queries["val"], windows.queries["test"]
    seen = int(covered_N[val.target_row_Q].sum())
    return {
        **counts,
        "val_targets_in_train_contexts": seen,
        "val_targets_in_train_contexts_share": round(seen / max(1, len(val)), 4),
        "test_contexts_with_twin": _num_contexts_with_twin(test, windows.representative_N),
    }


def check_audit(windows: Windows, audit: dict[str, Any]) -> None:
    """Raise ValueError for the first leak of a plan that is not marked leaky."""
    for name in VIOLATIONS:
        if audit[name] and not windows.leaky:
            leak = name.replace("_", " ")
            raise ValueError(
                f"windows: the leak audit found {audit[name]} {leak}; "
                "delete the folder, and they are planned again"
            )


def _count_window_leaks(bank: Bank, windows: Windows) -> dict[str, int]:
    train_start_W, train_rows_W = windows.train_windows()
    held_out_N = windows.split_N != TRAIN
    start_W = windows.window_start_W
    target_W = start_W + windows.window_rows_W
    foreign_W = windows.split_N[target_W] != windows.window_split_W
    crossing_W = bank.sequence_N[start_W] != bank.sequence_N[target_W]
    pieces = np.unique(bank.document_N.astype(np.int64) * len(SPLITS) + windows.split_N)
    return {
        "train_windows_with_held_out_inputs": _num_touching(
            held_out_N, train_start_W, train_rows_W
        ),
        "train_windows_with_held_out_targets": _num_touching(
            held_out_N, train_start_W + 1, train_rows_W
        ),
        "held_out_windows_with_foreign_targets": int(
            (foreign_W & (windows.window_split_W != TRAIN)).sum()
        ),
        "documents_in_two_splits": len(pieces) - len(np.unique(bank.document_N)),
        "windows_across_sequences": int(crossing_W.sum()),
    }


def _count_query_leaks(bank: Bank, windows: Windows) -> dict[str, int]:
    counts: dict[str, int] = {}
    train_group_N = np.zeros(bank.num_rows, bool)
    train_group_N[windows.representative_N[windows.split_N == TRAIN]] = True
    for name, queries in windows.queries.items():
        target_row_Q, first_row_Q = queries.target_row_Q, queries.first_row_Q
        length_Q = target_row_Q - first_row_Q
        found = {
            "queries_of_another_split": windows.split_N[target_row_Q] != SPLITS.index(name),
            "queries_with_twin_in_train": train_group_N[windows.representative_N[target_row_Q]],
            "contexts_across_sequences": bank.sequence_N[first_row_Q]
            != bank.sequence_N[target_row_Q],
            "contexts_out_of_bounds": (length_Q < 1) | (length_Q > queries.ctx),
        }
        for leak, is_leak_Q in found.items():
            counts[leak] = counts.get(leak, 0) + int(is_leak_Q.sum())
    return counts


def _num_covering(
    num_rows: int, start_W: NDArray[np.int64], rows_W: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Return how many windows read each row, (N,)."""
    steps = np.bincount(start_W, minlength=num_rows + 1)
    steps -= np.bincount(start_W + rows_W, minlength=num_rows + 1)
    return steps[:-1].cumsum()


def _num_touching(
    marked_N: NDArray[np.bool_], start_W: NDArray[np.int64], rows_W: NDArray[np.integer]
) -> int:
    """Return how many of the row ranges contain a marked row."""
    before = np.concatenate([[0], marked_N.cumsum()])
    return int((before[start_W + rows_W] > before[start_W]).sum())


def _num_contexts_with_twin(queries: Queries, representative_N: NDArray[np.int64]) -> int:
    """Return how many contexts contain a row of their target's duplicate group."""
    order = np.argsort(representative_N, kind="stable")
    same = representative_N[order[1:]] == representative_N[order[:-1]]
    previous_N = np.full(len(representative_N), -1)
    previous_N[order[1:][same]] = order[:-1][same]
    return int((previous_N[queries.target_row_Q] >= queries.first_row_Q).sum())
