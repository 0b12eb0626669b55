"""Figures drawn from results, the empty ones too."""

import dataclasses
import io

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from lvm.bank.bank import Bank
from lvm.evaluation.lane_diagnosis import diagnose, lane_figures
from lvm.report.evaluation import context_figure, experts_figure, training_figure
from lvm.report.lanes import confusion_figure, lane_figure
from lvm.report.shadow import forest_figure, rank_figure, shadow_lane_figure
from lvm.system.settings import read_lane_rules
from lvm.windows.export import plan_windows
from tests.shadow_cases import unscored, winning_case

pytestmark = pytest.mark.slow


def assert_drawn(figure: Figure, *texts: str) -> None:
    """The image has 1280 x 800 pixels, is not blank, and holds each text inside its border."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    pixels = matplotlib.image.imread(buffer)
    assert pixels.shape[:2] == (800, 1280)
    assert pixels[..., :3].std() > 0.01
    found = {artist.get_text(): artist for artist in figure.findobj(matplotlib.text.Text)}
    for text in texts:
        artist = next((one for shown, one in found.items() if text in shown), None)
        assert artist is not None, f"{text!r} is not among {sorted(found)}"
        box = artist.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= 1280 and box.y0 >= 0 and box.y1 <= 800, text


def with_ranks(names: list[str]) -> pd.DataFrame:
    tables = [
        pd.DataFrame(
            {"candidate": name, "rank_served": [1.0 + step * (place + 1) for step in range(50)]}
        )
        for place, name in enumerate(names)
    ]
    return pd.concat(tables, ignore_index=True)


def test_forest() -> None:
    assert_drawn(forest_figure(winning_case()), "model\nagainst old", "+4.0", "2,000 queries")
    assert_drawn(forest_figure(winning_case(leaky=True)), "LEAKY")
    nothing = dataclasses.replace(winning_case(), comparisons=())
    assert_drawn(forest_figure(nothing), "no two candidates could be compared")


def test_ranks() -> None:
    result = winning_case()
    names = [one.name for one in result.outcomes]
    outcomes = (*result.outcomes, unscored("broken", num_non_finite=1))
    drawn = dataclasses.replace(result, per_query=with_ranks(names), outcomes=outcomes)
    assert_drawn(rank_figure(drawn), *names, "share of 2,000 queries")
    seen = dataclasses.replace(outcomes[0], leak="trained on leaky windows")
    assert_drawn(
        rank_figure(dataclasses.replace(drawn, outcomes=(seen, *outcomes[1:]))), "model (LEAKY)"
    )


def test_ranks_without_a_scored_candidate() -> None:
    result = dataclasses.replace(winning_case(), outcomes=(unscored("broken", num_non_finite=1),))
    assert_drawn(rank_figure(result), "k (logarithmic)")


@pytest.mark.parametrize("num_epochs", [1, 12])
def test_training(num_epochs: int) -> None:
    history = [
        {"epoch": epoch, "train/loss": 9.0 / epoch}
        | {f"val/hit_at_{k}": 0.01 * k + 0.002 * epoch for k in (1, 5, 10)}
        for epoch in range(1, num_epochs + 1)
    ]
    figure = training_figure(history, num_epochs, {"ema": 0.05}, leaky=False)
    assert_drawn(figure, "Hit@1", "Hit@5", "Hit@10", "ema", f"best epoch: {num_epochs}")
    shares = {"train/share_linear": 0.2, "train/share_encoder": 0.1, "train/share_recall": 0.0}
    with_parts = [record | shares for record in history]
    figure = training_figure(with_parts, num_epochs, {"ema": 0.05}, leaky=False)
    assert_drawn(figure, "Hit@5", "train loss", "linear", "encoder", "recall", "share, %")
    assert_drawn(training_figure(history, num_epochs, {"ema": 0.05}, leaky=True), "LEAKY")


def test_experts() -> None:
    table_LX = np.full((3, 16), 0.1)
    table_LX[0, 5], table_LX[2] = 90.0, 0.0
    figure = experts_figure(table_LX, ("Art", "Law", "Software"), leaky=True)
    assert_drawn(figure, "Art", "Law", "LEAKY", "share", "98", "load, %")
    shown = {artist.get_text() for artist in figure.findobj(matplotlib.text.Text)}
    assert "Software" not in shown, "a lane without queries has no line"
    assert_drawn(
        experts_figure(np.zeros((2, 4)), ("Art", "Law"), leaky=False), "no val query has a lane"
    )


@pytest.mark.parametrize("lengths", [(1, 2), (1, 5, 20, 100, 500, 1000, 2000)])
def test_context(lengths: tuple[int, ...]) -> None:
    entries = []
    for place, length in enumerate(lengths):
        hits = {f"hit_at_{k}": 0.01 * k + 0.01 * place for k in (1, 5, 10)}
        ci95 = {key: [value - 0.005, value + 0.01] for key, value in hits.items()}
        entries.append({"ctx": length, **hits, "ci95": ci95})
    controls = {"queries": 2000, "documents": 300, "context": entries}
    figure = context_figure("memory_gru", controls, leaky=False)
    assert_drawn(figure, "Hit@1", "Hit@5", "Hit@10", "memory_gru, the same 2,000 queries")
    unknown = {**entries[0], "ci95": dict.fromkeys(entries[0]["ci95"], [None, None])}
    alone = {**controls, "context": [unknown, *entries[1:]]}
    assert_drawn(context_figure("ema", alone, leaky=True), "LEAKY", f"{lengths[-1]:,}")


def test_lanes_and_confusions(tiny_bank: Bank) -> None:
    windows = plan_windows(tiny_bank, 10)
    target_row_Q = windows.queries["test"].target_row_Q
    table = pd.DataFrame({"target_row": target_row_Q, "top_row": 0})
    table["rank"] = 1.0 + target_row_Q % 9
    lanes = lane_figures(table, {}, tiny_bank)
    both = lane_figure({"model": lanes, "ema": lanes}, {"model": 0.4}, leaky=False)
    assert_drawn(both, "lane-2", "ema")
    assert_drawn(lane_figure({"model": lanes}, {"model": 0.4}, leaky=True), "LEAKY")
    result = winning_case()
    outcomes = [dataclasses.replace(one, lanes=tuple(lanes)) for one in result.outcomes]
    drawn = shadow_lane_figure(dataclasses.replace(result, outcomes=tuple(outcomes)))
    assert_drawn(drawn, "lane-2", "model", "old", "ema", "dashed: model over all lanes, 20.0 %")
    assert_drawn(shadow_lane_figure(result), "the bank has no lanes")
    diagnosis = diagnose("model", {"model": table}, tiny_bank, windows, read_lane_rules(), False)
    assert_drawn(confusion_figure(diagnosis), "lane-0", "lane of the first hit", "% of the row")
    assert_drawn(confusion_figure(dataclasses.replace(diagnosis, leaky=True)), "LEAKY")
