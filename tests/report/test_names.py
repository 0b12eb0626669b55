"""Names of any script in figures: drawn by a font that has them, else as code points."""

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib.tables._g_l_y_f import Glyph
from matplotlib import font_manager
from matplotlib.text import Text

from lvm.report.canvas import CODE, CODE_NOTE, canvas, heat_map, legible
from lvm.report.evaluation import experts_figure, training_figure
from lvm.report.lanes import larger_k_figure
from lvm.report.shadow import forest_figure, rank_figure
from tests.report.test_figures import assert_drawn, with_ranks
from tests.report.test_lanes import ceilings
from tests.shadow_cases import winning_case

NAMES = ("科学与法律", "科学と技術", "วิทยาศาสตร์", "विज्ञान", "Наука", "علوم")
NOT_INSTALLED = "\U0010f4d0\U0010f4d1"  # private use: no font has them
OWN = "\U0010f4e0\U0010f4e1"


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def texts(figure) -> dict[str, Text]:
    return {artist.get_text(): artist for artist in figure.findobj(Text)}


@pytest.mark.parametrize("name", [*NAMES, NOT_INSTALLED])
def test_every_figure_draws_every_name(name: str) -> None:
    found = ceilings(2)
    named = tuple(dataclasses.replace(lane, lane=name) for lane in found.lanes)
    assert_drawn(larger_k_figure(name, dataclasses.replace(found, lanes=named), leaky=False))
    assert_drawn(experts_figure(np.eye(2), (name, "Law"), leaky=False))
    result = winning_case()
    outcomes = tuple(dataclasses.replace(one, name=name) for one in result.outcomes)
    pairs = tuple(dataclasses.replace(one, candidate=name) for one in result.comparisons)
    replay = dataclasses.replace(
        result, outcomes=outcomes, comparisons=pairs, per_query=with_ranks([name])
    )
    assert_drawn(forest_figure(replay))
    assert_drawn(rank_figure(replay))
    history = [{"epoch": 1, "train/loss": 9.0} | {f"val/hit_at_{k}": 0.1 for k in (1, 5, 10)}]
    assert_drawn(training_figure(history, 1, {name: 0.05}, leaky=False))


def test_characters_without_a_font_are_code_points_and_the_figure_says_so() -> None:
    figure, [axes] = canvas("Lanes", "sub", leaky=False)
    heat_map(figure, axes, np.eye(2, dtype=int), ["Law", f"{NOT_INSTALLED} a"], ["Law", "Art"])
    assert_drawn(legible(figure), f"{CODE}10F4D0.10F4D1 a  (1)", CODE_NOTE)
    plain, [axes] = canvas("Lanes", "sub", leaky=False)
    heat_map(plain, axes, np.eye(2, dtype=int), ["Law", "Naïve"], ["Law", "Art"])
    assert CODE_NOTE not in texts(legible(plain))


def test_long_names_lose_their_middle_and_leave_room_for_the_panel() -> None:
    names = [f"{'a long name ' * 12}{place}" for place in range(6)]
    figure, [axes] = canvas("Lanes", "sub", leaky=False)
    heat_map(figure, axes, np.eye(6, dtype=int), names, names)
    assert_drawn(legible(figure), "a long name a lon…")
    assert axes.get_window_extent().width > 400


@pytest.fixture
def own_font(tmp_path: Path) -> Iterator[str]:
    """An installed family that alone has the characters of OWN."""
    glyphs = [".notdef", *(f"u{ord(one):X}" for one in OWN)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({ord(one): name for one, name in zip(OWN, glyphs[1:], strict=True)})
    builder.setupGlyf({name: Glyph() for name in glyphs})
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Own Script", "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(tmp_path / "own.ttf")
    known = list(font_manager.fontManager.ttflist)
    font_manager.fontManager.addfont(tmp_path / "own.ttf")
    yield "Own Script"
    font_manager.fontManager.ttflist[:] = known


def test_an_installed_font_that_has_the_characters_is_found(own_font: str) -> None:
    figure, [axes] = canvas("Lanes", "sub", leaky=False)
    heat_map(figure, axes, np.eye(2, dtype=int), ["Law", OWN], ["Law", "Art"])
    assert_drawn(legible(figure), f"{OWN}  (1)")
    assert own_font in texts(figure)[f"{OWN}  (1)"].get_fontfamily()
    assert own_font not in texts(figure)["Law  (1)"].get_fontfamily()
