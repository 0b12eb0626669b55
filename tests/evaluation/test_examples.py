"""Examples of answered queries: drawn by seed, told with their texts."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import Bank, write_bank
from lvm.evaluation.evaluate import EACH, Evaluation, evaluate_together, example_table
from lvm.evaluation.free_predictors import fit_free_predictors
from lvm.report.evaluation import examples_page
from lvm.windows.export import plan_windows
from lvm.windows.planning import Queries, Windows


@pytest.fixture(scope="module")
def measured(tiny_bank: Bank) -> tuple[Evaluation, Queries, Windows]:
    windows = plan_windows(tiny_bank, 10)
    queries = windows.queries["test"]
    model = fit_free_predictors(tiny_bank, windows, ("copy-last",))["copy-last"]
    return evaluate_together({"copy-last": model}, tiny_bank, windows, queries)[0], queries, windows


def test_hits_and_misses_are_told_with_what_was_read_and_found(tiny_bank: Bank, measured) -> None:
    evaluation, queries, windows = measured
    table = example_table(evaluation, queries, tiny_bank, windows)
    own = evaluation.per_query.set_index("target_row")["rank"]
    is_hit = table["outcome"] == "hit"
    assert ((table["rank"] <= 5) == is_hit).all()
    assert is_hit.sum() == min(EACH, (own <= 5).sum())
    assert (~is_hit).sum() == min(EACH, (own > 5).sum())
    for line in table.itertuples():
        row = int(line.truth.removeprefix("Sentence number ").removesuffix("."))
        assert own[row] == line.rank
        assert line.context == f"Sentence number {row - 2}. / Sentence number {row - 1}."
        if line.rank == 1:
            assert (
                windows.representative_N[row]
                == windows.representative_N[
                    int(line.found_1.removeprefix("Sentence number ").removesuffix("."))
                ]
            )
        assert len({line.found_1, line.found_2, line.found_3}) == 3


def test_the_same_seed_draws_the_same_examples(tiny_bank: Bank, measured) -> None:
    evaluation, queries, windows = measured
    first, again = (example_table(evaluation, queries, tiny_bank, windows) for _ in range(2))
    pd.testing.assert_frame_equal(first, again)
    other = dataclasses.replace(windows, seed=1)
    assert not first.equals(example_table(evaluation, queries, tiny_bank, other))


def test_a_bank_without_texts_names_its_rows(tiny_bank: Bank, measured, tmp_path) -> None:
    evaluation, queries, windows = measured
    rows = pd.read_parquet(tiny_bank.path / "rows.parquet").drop(columns="text")
    bare = write_bank(tmp_path / "bank", np.array(tiny_bank.vectors), rows, "none", "a test")
    table = example_table(evaluation, queries, bare, windows)
    place = table["truth"].str.fullmatch(r"row [\d,]+, sequence-\d+, document-\d+")
    assert place.all() and table["found_1"].str.startswith("row ").all()


def test_the_page_escapes_texts_and_cuts_none_off() -> None:
    long = "a <b> &" + 300 * " word"
    table = pd.DataFrame([{"outcome": "miss", "rank": 12.5, "truth": long}])
    page = examples_page("ema", table, leaky=False)
    assert "miss: 1" in page and "12.5" in page
    assert "a &lt;b&gt; &amp;" + 300 * " word" in page
    assert "LEAKY" not in page and "LEAKY" in examples_page("ema", table, leaky=True)
