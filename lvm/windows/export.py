"""Windows on disk: plan, audit, write, open.

A plan holds row numbers of a bank, no vectors. Shapes: N bank rows, W windows, Q queries.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lvm.bank.bank import Bank
from lvm.bank.duplicates import SAME_SCORE
from lvm.bank.files import file_sha256
from lvm.bank.row_table import BLOCK_ROWS
from lvm.system.atomic import atomic_replace, is_damaged, locked, with_checksum, write_errors_name
from lvm.system.progress import part
from lvm.windows.planning import (
    MIN_DOCUMENTS,
    SPLIT_KINDS,
    SPLITS,
    TRAIN,
    Queries,
    Windows,
    contents_sha256,
    draft_windows,
    make_queries,
    runs,
)

FORMAT = 1
DEFAULTS = {"overlap": None, "split": "document", "seed": 0}
REPLAN = "delete the folder, and they are planned again"
FILES = ("windows.parquet", "documents.parquet", "queries.parquet", "twins.parquet")
SETTINGS = ("ctx", "overlap", "split", "seed", "bank_sha256", "leaky", "sha256", "counts", "audit")
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


def plan_windows(
    bank: Bank, ctx: int, overlap: int | None = None, split: str = "document", seed: int = 0
) -> Windows:
    """Split the bank's rows, cut windows of `ctx` inputs, freeze the queries and audit the plan.

    Windows start every ctx - overlap rows (`overlap` is ctx // 2 when None). split=random is the
    geometry of the system that lvm replaces, and is marked leaky. Raises ValueError for impossible
    settings, a bank without val or test queries, and any leak.
    """
    overlap = ctx // 2 if overlap is None else overlap
    _check_settings(bank, ctx, overlap, split)
    draft = draft_windows(bank, ctx, overlap, split, seed)
    _check_queries(draft)
    audit = audit_windows(bank, draft)
    check_audit(draft, audit)
    return dataclasses.replace(draft, audit=audit)


def longest_context(bank: Bank) -> int:
    """Return the rows of the longest context of a bank: all but the last of a sequence."""
    return int(np.bincount(bank.sequence_N).max()) - 1


def _check_settings(bank: Bank, ctx: int, overlap: int, split: str) -> None:
    if split not in SPLIT_KINDS:
        raise ValueError(f"split: {split!r} is unknown; choose one of {', '.join(SPLIT_KINDS)}")
    if ctx < 2:
        raise ValueError(f"ctx: {ctx} is too short; at least 2 rows of context are needed")
    if not 0 <= overlap < ctx:
        raise ValueError(f"overlap: {overlap} is outside 0 ... ctx - 1 = {ctx - 1}")
    longest = bank.num_rows if split == "random" else longest_context(bank) + 1
    if longest < 3:
        raise ValueError(
            f"bank: {bank.path} has no sequence of three rows or more, so that no context of two "
            "rows has a successor; give the rows of a document one sequence, in reading order"
        )
    if ctx >= longest:
        raise ValueError(
            f"ctx: {ctx} is too long, the longest sequence has {longest} rows; "
            f"choose ctx of at most {longest - 1}"
        )


def _check_queries(windows: Windows) -> None:
    for name in SPLITS[1:]:
        if len(windows.queries[name]):
            continue
        dropped = windows.counts[f"{name}_dropped_twins"]
        if dropped:
            raise ValueError(
                f"bank: no {name} query is left: all {dropped:,} {name} rows with a context are "
                f"duplicates of train rows (cosine {SAME_SCORE} or more); remove repeated rows, or "
                "add others"
            )
        needed = (
            f"sequences of {MIN_DOCUMENTS} documents or more ({BLOCK_ROWS} rows each where none "
            "are named), or tens of sequences"
        )
        if windows.leaky:
            needed = f"{11 * windows.ctx} rows or more at ctx {windows.ctx}"
        raise ValueError(f"bank: no {name} query is left; a bank needs {needed}")
    if not (windows.window_split_W == TRAIN).any():
        raise ValueError("bank: no train window can be cut; a bank needs longer sequences")


def write_windows(windows: Windows, path: str | Path) -> Windows:
    """Write a plan to the folder `path` atomically; an older plan there is replaced."""
    path = Path(path)
    if path.exists() and not (path / "windows.json").is_file():
        raise ValueError(f"{path}: exists and is not a windows folder; choose another path")
    with atomic_replace(path) as made:
        made.mkdir()
        for name, columns in _tables(windows).items():
            with write_errors_name(path / name):
                _write_table(columns, made / name)
        document = {"format": FORMAT} | {name: getattr(windows, name) for name in SETTINGS}
        document |= {"files": {name: file_sha256(made / name) for name in FILES}}
        with write_errors_name(path / "windows.json"):
            text = json.dumps(with_checksum(document), indent=1) + "\n"
            (made / "windows.json").write_text(text)
    return dataclasses.replace(windows, folder=path)


def _tables(windows: Windows) -> dict[str, dict[str, Any]]:
    """Return the columns of each file; queries are in their frozen order, val before test."""
    run_start, run_rows = runs(windows.split_N)
    twins = np.bincount(windows.representative_N, minlength=len(windows.split_N)) > 1
    twin_row = np.flatnonzero(twins[windows.representative_N])
    queries = [windows.queries[name] for name in SPLITS[1:]]
    lengths = [len(q) for q in queries]
    split_table = {"num_rows": run_rows, "split": windows.split_N[run_start]}
    window_columns = {
        "start": windows.window_start_W,
        "rows": windows.window_rows_W,
        "split": windows.window_split_W,
    }
    query_columns = {
        "target_row": np.concatenate([q.target_row_Q for q in queries]),
        "split": np.repeat(np.arange(1, len(SPLITS)), lengths),
    }
    twin_columns = {"row": twin_row, "representative": windows.representative_N[twin_row]}
    tables = (window_columns, split_table, query_columns, twin_columns)
    return dict(zip(FILES, tables, strict=True))


def _write_table(columns: dict[str, Any], path: Path) -> None:
    """Write integer columns, delta-encoded: sorted row numbers take a byte or two."""
    table = pa.table({name: pa.array(values.astype(np.int64)) for name, values in columns.items()})
    pq.write_table(
        table,
        path,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        column_encoding=dict.fromkeys(columns, "DELTA_BINARY_PACKED"),
    )


def open_windows(path: str | Path, bank: Bank) -> Windows:
    """Read a plan; raises ValueError unless it is complete, of this bank and without leaks."""
    path = Path(path)
    settings = _read_settings(path)
    if settings["bank_sha256"] != bank.sha256:
        raise ValueError(
            f"{path}: windows of another bank (sha256 {str(settings['bank_sha256'])[:12]}, "
            f"not {bank.sha256[:12]}); export windows for this one"
        )
    try:
        for name, recorded in settings.get("files", {}).items():
            if file_sha256(path / name) != recorded:
                raise ValueError(f"{name} differs from its sha256")
        tables = {name: pd.read_parquet(path / name) for name in FILES}
        windows = _assemble(settings, tables, bank)
    except (OSError, KeyError, ValueError, IndexError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: windows cannot be read ({reason}); {REPLAN}") from None
    if contents_sha256(windows) != windows.sha256:
        raise ValueError(f"{path}: contents differ from the recorded sha256; {REPLAN}")
    audit = audit_windows(bank, windows)
    check_audit(windows, audit)
    return dataclasses.replace(windows, audit=audit, folder=path)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads((path / "windows.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"{path}: no windows here (windows.json unreadable); {REPLAN}") from None
    known = isinstance(settings, dict) and settings.get("format") == FORMAT
    if not known or not set(SETTINGS) <= set(settings):
        raise ValueError(f"{path}: windows.json has another format than {FORMAT}; {REPLAN}")
    if is_damaged(settings):
        raise ValueError(f"{path}: windows.json differs from the sha256 in it; {REPLAN}")
    return dict(settings)


def _assemble(settings: dict[str, Any], tables: dict[str, pd.DataFrame], bank: Bank) -> Windows:
    cut, splits, queries, twins = (tables[name] for name in FILES)
    representative_N = np.arange(bank.num_rows)
    representative_N[twins["row"]] = twins["representative"]
    origin_N = bank.sequence_start_N()
    by_split = {}
    for code, name in enumerate(SPLITS[1:], start=1):
        target_row_Q = queries["target_row"].to_numpy(np.int64)[queries["split"] == code]
        origin_Q = np.zeros_like(target_row_Q) if settings["leaky"] else origin_N[target_row_Q]
        number_Q = np.arange(len(target_row_Q))
        by_split[name] = make_queries(number_Q, target_row_Q, origin_Q, settings["ctx"])
    return Windows(
        **{name: settings[name] for name in SETTINGS},
        split_N=np.repeat(splits["split"].to_numpy(np.int8), splits["num_rows"]),
        window_start_W=cut["start"].to_numpy(np.int64),
        window_rows_W=cut["rows"].to_numpy(np.int32),
        window_split_W=cut["split"].to_numpy(np.int8),
        representative_N=representative_N,
        queries=by_split,
    )


@part("windows")
def ensure_windows(bank: Bank, ctx: int, path: str | Path | None = None, **plan: Any) -> Windows:
    """Open the windows at `path`, or plan them there; one process at a time plans.

    Windows are reused if they belong to this bank, have this ctx and agree with every setting that
    `plan` (overlap, split, seed) names. Raises ValueError if a given `path` holds other windows:
    only an export replaces those.

    Without `path` the folder is data/windows/ctx<ctx>. If that holds other windows, or is missing
    and `plan` is not the default, the folder is ctx<ctx>-<split>-seed<seed>-<bank's sha256>.
    """
    place = _place(ctx, path)
    with locked(place):
        if not _holds(place, bank, ctx, plan):
            if path is not None and _is_there(place):
                settings = _read_settings(place)
                raise ValueError(
                    f"windows: {path} holds other windows (ctx {settings['ctx']}, bank "
                    f"{str(settings['bank_sha256'])[:12]}); name another folder, or export to it "
                    "again"
                )
            if path is None and (_is_there(place) or _given(plan) != DEFAULTS):
                place = place.with_name(f"{_name(ctx, plan)}-{bank.sha256[:8]}")
        return _open_or_plan(place, bank, ctx, plan)


@part("windows")
def export_windows(bank: Bank, ctx: int, path: str | Path | None = None, **plan: Any) -> Windows:
    """Plan windows at `path` (data/windows/ctx<ctx> when None), replacing others there."""
    place = _place(ctx, path)
    with locked(place):
        return _open_or_plan(place, bank, ctx, plan)


def _open_or_plan(place: Path, bank: Bank, ctx: int, plan: dict[str, Any]) -> Windows:
    if _holds(place, bank, ctx, plan):
        return open_windows(place, bank)
    return write_windows(plan_windows(bank, ctx, **plan), place)


def _place(ctx: int, path: str | Path | None) -> Path:
    return Path("data/windows") / f"ctx{ctx}" if path is None else Path(path)


def _is_there(place: Path) -> bool:
    return (place / "windows.json").is_file()


def _holds(place: Path, bank: Bank, ctx: int, plan: dict[str, Any]) -> bool:
    """Return whether `place` has windows of this bank and ctx that agree with `plan`."""
    if not _is_there(place):
        return False
    wanted = {name: value for name, value in plan.items() if value is not None}
    wanted |= {"ctx": ctx, "bank_sha256": bank.sha256}
    settings = _read_settings(place)
    return all(settings[name] == value for name, value in wanted.items())


def _given(plan: dict[str, Any]) -> dict[str, Any]:
    """Return every setting of a plan, defaults included."""
    return DEFAULTS | {name: value for name, value in plan.items() if value is not None}


def _name(ctx: int, plan: dict[str, Any]) -> str:
    given = _given(plan)
    shared = "" if given["overlap"] is None else f"-overlap{given['overlap']}"
    return f"ctx{ctx}-{given['split']}-seed{given['seed']}{shared}"


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
