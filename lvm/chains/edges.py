"""Edge lists: checked pairs of concepts with their weights, from csv, tsv or parquet."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from lvm.bank.files import UNREADABLE, read_columns
from lvm.system.errors import CONTROL, one_line_errors

SUFFIXES = (".csv", ".tsv", ".parquet")
MAX_ROWS = 20_000_000
KINDS = ("string", "integer", "empty")


@one_line_errors
def read_edges(path: Path, start: str, end: str) -> pd.DataFrame:
    """Return the columns `start`, `end`, `weight` (1 where the file has none) of an edge file.

    Raises ValueError on a missing column, no edge, an unnamed end, a weight below 0.
    """
    edges = read_frame(path)
    missing = [name for name in (start, end) if name not in edges]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(missing)}; an edge list has {start}, {end} and, where "
            f"it is weighted, weight; found {', '.join(map(str, edges.columns))}"
        )
    if not len(edges):
        raise ValueError(f"{path}: holds no edge; give at least one line of {start}, {end}")
    _check_columns(path, edges, (start, end, "weight"))
    for name in (start, end):
        unnamed_N = (edges[name].isna() | (edges[name] == "")).to_numpy()
        if unnamed_N.any():
            raise ValueError(f"{path}: {name} is empty in edge {unnamed_N.argmax()}; name it")
    weight_N = _weights(path, edges)
    return edges[[start, end]].assign(weight=weight_N)


@one_line_errors
def read_concepts(path: Path) -> pd.DataFrame | None:
    """Return `node`, `text`, `lane` of the concepts of an edge file; None without their file.

    It stands beside the edges: edges.nodes.csv for edges.csv.
    """
    beside = path.with_name(f"{path.stem}.nodes{path.suffix}")
    if not beside.is_file():
        return None
    nodes = read_frame(beside)
    missing = [name for name in ("node", "text") if name not in nodes]
    if missing:
        raise ValueError(
            f"{beside}: no column {', '.join(missing)}; it must have node, text, optionally lane"
        )
    _check_columns(beside, nodes, ("node", "text", "lane"))
    nodes = nodes.assign(node=nodes["node"].astype(str))
    again_N = nodes["node"].duplicated().to_numpy()
    if again_N.any():
        name = nodes["node"].iloc[int(again_N.argmax())]
        raise ValueError(f"{beside}: node {name!r} stands there twice; give it one line")
    if "lane" not in nodes:
        nodes = nodes.assign(lane="")
    return nodes[["node", "text", "lane"]].fillna("").astype(str)


def edge_files(path: Path) -> list[Path]:
    """Return the edge file with that of its concepts, where it has one."""
    return [
        one for one in (path, path.with_name(f"{path.stem}.nodes{path.suffix}")) if one.exists()
    ]


def read_frame(path: Path) -> pd.DataFrame:
    """Read a .csv, .tsv or .parquet table; raises ValueError where it is none."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: must be a {', '.join(SUFFIXES)} file")
    try:
        if path.suffix == ".parquet":
            return read_columns(path, _parquet_names(path))
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # of a line that is too long
            separator = "\t" if path.suffix == ".tsv" else ","
            return pd.read_csv(
                path, sep=separator, dtype=str, keep_default_na=False, index_col=False
            )
    except pd.errors.EmptyDataError as error:
        raise ValueError(f"{path}: is empty; its first line must name the columns") from error
    except (*UNREADABLE, pd.errors.ParserWarning) as error:
        raise ValueError(f"{path}: not a readable {path.suffix} table ({error})") from error


def _parquet_names(path: Path) -> list[str]:
    names = pq.read_schema(path).names
    if len(set(names)) < len(names):
        raise ValueError("a column stands there twice")
    if pq.read_metadata(path).num_rows > MAX_ROWS:
        raise ValueError(f"more than {MAX_ROWS:,} rows")
    return list(names)


def _check_columns(path: Path, table: pd.DataFrame, names: tuple[str, ...]) -> None:
    """Raise ValueError where one stands there twice, or holds what is no name, text or number."""
    for name in names:
        if name not in table:
            continue
        if (table.columns == name).sum() > 1 or f"{name}.1" in table:
            raise ValueError(f"{path}: has two columns {name}; give one")
        values = table[name][table[name].notna()]
        kind = pd.api.types.infer_dtype(values, skipna=True) if len(values) else "empty"
        if kind not in (*KINDS, *(("floating",) if name == "weight" else ())):
            raise ValueError(f"{path}: {name} holds {kind} values; give names or numbers, not both")
        if kind == "string" and name != "text":
            wrong = next((value for value in values if CONTROL.search(value)), None)
            if wrong is not None:
                raise ValueError(f"{path}: {name} {wrong!r} holds control characters; rename it")


def _weights(path: Path, edges: pd.DataFrame) -> np.ndarray:
    if "weight" not in edges:
        return np.ones(len(edges))
    weight_N = pd.to_numeric(edges["weight"], errors="coerce").to_numpy(dtype=np.float64)
    wrong_N = ~np.isfinite(weight_N) | (weight_N < 0)
    if wrong_N.any():
        row = int(wrong_N.argmax())
        raise ValueError(
            f"{path}: weight '{edges['weight'].iloc[row]}' in edge {row}; weights must be numbers "
            "of 0 or more"
        )
    return weight_N
