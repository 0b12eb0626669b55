"""Columns of a row table: what they may hold, how it is kept."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import write_bank
from lvm.bank.row_table import TMD_LANES, row_table

VECTORS = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)


def table(**columns: object) -> pd.DataFrame:
    return pd.DataFrame({"sequence": ["a"] * 10, **columns})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sequence": [1] * 5 + ["1"] * 5}, "sequence holds mixed-integer values"),
        ({"sequence": [True] * 10}, "sequence holds boolean values"),
        ({"sequence": [b"a"] * 10}, "sequence holds bytes values"),
        ({"document": ["a\x1b[2J"] * 10}, "holds control characters; rename it"),
        ({"lane": [True] * 10}, "lane holds boolean values"),
        ({"text": [1] * 10}, "text holds integer values; it must hold text"),
        ({"text": ["\ud800"] * 10}, "surrogates not allowed"),
    ],
)
def test_columns_hold_names_or_numbers(
    tmp_path: Path, columns: dict[str, list[object]], message: str
) -> None:
    rows = pd.DataFrame({"sequence": ["a"] * 10})
    for name, values in columns.items():
        rows[name] = pd.Series(values, dtype=object)
    with pytest.raises(ValueError, match=message) as caught:
        write_bank(tmp_path / "bank", VECTORS, rows, "e", "t")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_numbers_of_lanes_stand_beside_rows_without_one(tmp_path: Path) -> None:
    rows = table(lane=pd.Series([None] * 4 + [3] * 6, dtype=object))
    bank = write_bank(tmp_path / "bank", VECTORS, rows, "e", "t")
    assert bank.lanes == (TMD_LANES[3],) and bank.lane_N.tolist() == [-1] * 4 + [0] * 6


def test_more_lanes_than_codes_are_refused() -> None:
    rows = pd.DataFrame({"sequence": ["a"] * 40_000, "lane": [f"l{n}" for n in range(40_000)]})
    with pytest.raises(ValueError, match="40,000 lanes; there can be 32,767"):
        row_table(rows, "rows of x")


def test_a_bank_without_any_text_has_empty_ones(tmp_path: Path) -> None:
    bank = write_bank(tmp_path / "bank", VECTORS, table(text=[None] * 10), "e", "t")
    texts = bank.texts()
    assert texts is not None and texts.tolist() == [""] * 10
