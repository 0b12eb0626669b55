"""MLflow's pages of a tiny project, as a visitor sees them; screenshots lie in build/ui."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from lvm.tracking import runs
from lvm.tracking.registry import Registry
from lvm.tracking.store import runs_page
from tests.conftest import copy_store
from tests.entrypoints.test_phase_runs import Launcher
from tests.ui.project import make_project

registry = Registry()

pytestmark = pytest.mark.ui

SHOTS = Path(__file__).parents[2] / "build" / "ui"
INTERVAL = r"\d+\.\d \[ ?\d+\.\d, +\d+\.\d\]"


@pytest.fixture(scope="module")
def project(tmp_path_factory, empty_store):
    """The store's runs by their entry point and phase, in a working folder of its own."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        copy_store(empty_store, folder / "store", patch)
        patch.chdir(folder)
        patch.setattr(runs, "launch", Launcher())
        make_project(folder)
        found = MlflowClient().search_runs(["0"])
        yield {(run.data.tags.get("entry"), run.data.tags.get("phase")): run for run in found}


@pytest.fixture(scope="module")
def page(project, tmp_path_factory):
    """A page of the browser at the run list, without the panel that opens at the first visit."""
    from tests.ui.browser import opened, served  # the browser's driver is this target's alone

    SHOTS.mkdir(parents=True, exist_ok=True)
    with (
        served(mlflow.get_tracking_uri()) as address,
        opened(tmp_path_factory.mktemp("profile")) as page,
    ):
        page.goto(address + runs_page())
        page.get_by_label("Close").first.click()
        yield page


@pytest.fixture(scope="module")
def visit(page) -> Callable[[str], None]:
    """Go to a page of the server, afresh: what stands there was not there before."""
    address = page.url.partition("/#/")[0]

    def go(path: str) -> None:
        page.goto("about:blank")
        page.goto(address + path)

    return go


@pytest.fixture
def see(page) -> Callable[..., None]:
    """Wait until every text is visible inside the window, then keep a screenshot."""
    from playwright.sync_api import expect

    def look(shot: str, *texts: str | re.Pattern) -> None:
        for text in texts:
            expect(page.get_by_text(text).filter(visible=True).first).to_be_in_viewport()
        page.screenshot(path=SHOTS / f"{shot}.png")

    return look


def run_page(run: mlflow.entities.Run) -> str:
    return f"/#/experiments/0/runs/{run.info.run_id}"


def test_the_run_list_has_our_names_and_columns(visit, see):
    visit(runs_page())
    columns = "model ctx phase recipe leaky best/hit_at_5 test/hit_at_5 shadow/hit_at_5"
    names = ("memory_gru ctx 10", "eval memory_gru v2 ctx 20", "shadow-eval 9 candidates")
    cells = [re.compile(f"^{word}$") for word in ("memory_gru", "2B", "3.5", "dense")]
    see("runs", *names, *cells, *(re.compile(f"^{name}$") for name in columns.split()))


def test_the_chart_view_begins_with_val_hit_at_5(visit, see, page):
    visit(runs_page() + "&compareRunsMode=CHART")
    see("charts", "val Hit@5 by epoch")


def test_three_trainings_are_compared_in_a_chart(project, visit, see, page):
    from playwright.sync_api import expect

    chosen = [project["train", phase].info.run_id for phase in ("2B", "3.5", "none")]
    visit(f'/#/compare-runs?runs={json.dumps(chosen)}&experiments=["0"]')
    plot = page.locator(".pcp-plot")
    expect(plot.locator("canvas").first).to_be_visible()
    for text in ("train/loss", "ctx", "2B", "3.5"):
        expect(plot.get_by_text(text, exact=True).first).to_be_visible()
    see("compare", "Comparing 3 Runs", "Parallel Coordinates Plot", "ctx 10 dense phase 2B")
    tags = page.get_by_role("row", name="phase 2B 3.5 none").last
    tags.scroll_into_view_if_needed()
    expect(tags).to_be_in_viewport()
    see("compare-tags")


def test_a_trainings_page_tells_its_figures(project, visit, see, page):
    run = project["train", "3.5"]
    visit(run_page(run))
    hit = f"{100 * run.data.metrics['best/hit_at_5']:.1f}"
    see("train", "memory_gru ctx 20 dense phase 3.5", f"Hit@5 {hit} [", "of 3; version 2")
    page.get_by_text("Show more").click()
    see("train-figures", re.compile(f"^\\s*{INTERVAL}$"), "(best free)")


FIGURES = [
    ("train", "training"),
    ("eval", "context"),
    *[("lane-diagnostics", name) for name in ("lanes", "confusion", "larger_k")],
    *[("shadow-eval", name) for name in ("forest", "hits", "lanes")],
]


@pytest.mark.parametrize(("entry", "name"), FIGURES)
def test_a_figure_is_shown_among_the_artifacts(entry, name, project, visit, see, page):
    phase = None if entry == "shadow-eval" else "3.5"
    visit(f"{run_page(project[entry, phase])}/artifacts/{name}.png")
    image = page.get_by_alt_text(f"{name}.png")
    image.wait_for()
    size = image.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert size == [1280, 800]
    see(f"{entry}-{name}", f"{name}.png")


def test_examples_are_shown_with_their_texts(project, visit, see, page):
    artifacts = run_page(project["eval", "3.5"]) + "/artifacts/"
    visit(artifacts + "examples.json")
    see("examples", "outcome", "truth", "found_1", re.compile(r"^Sentence number \d+\.$"))
    visit(artifacts + "examples.html")
    inside = page.frame_locator("iframe")
    inside.get_by_text("memory_gru: examples of the test queries").wait_for()
    inside.get_by_text(re.compile(r"^Sentence number \d+\.$")).first.wait_for()
    see("examples-page", "examples.html")


def test_a_shadow_evaluation_tells_its_decision(project, visit, see, page):
    visit(run_page(project["shadow-eval", None]))
    winner = project["shadow-eval", None].data.tags["baseline"]
    see("shadow", f"Baseline: {winner}")
    page.get_by_text("Show more").click()
    see("shadow-figures", f"{winner} becomes the first baseline")


def test_the_baselines_page_has_its_alias_figures_and_source(visit, see):
    version = registry.aliases()["baseline"]
    visit(f"/#/models/lvm/versions/{version}")
    texts = ("@ baseline", "shadow-eval 9 candidates", "Took the alias by", "corrected Hit@5")
    see("baseline", f"Version {version}", *texts, re.compile(f"^\\s*{INTERVAL}$"))


def test_a_trained_versions_page_leads_to_its_run(visit, see, page):
    visit("/#/models/lvm/versions/2")
    see("version", "memory_gru (trained), ctx 20, recipe dense, phase 3.5", "end of training")
    page.get_by_text("memory_gru ctx 20 dense phase 3.5").click()
    see("version-source", "of 3; version 2")


def test_a_studys_page_tells_its_verdict(project, visit, see, page):
    visit(run_page(project["tune", None]))
    see("tune", "Study lvm: 4 trials", "tune lvm 4 trials")
    visit(f"{run_page(project['tune', None])}/artifacts/importance.png")
    page.get_by_alt_text("importance.png").wait_for()
    see("tune-importance", "importance.png")
