"""shadow-eval at the command line: who takes part, what is asked, what is left behind."""

import dataclasses
import json
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from mlflow.tracking import MlflowClient

from entrypoints import promote, rollback, shadow_eval
from lvm.models import weights
from lvm.models.facts import facts_of
from lvm.models.table import FREE_MODELS, build_model
from lvm.shadow.query_log import choose_queries, read_query_log
from lvm.tracking import logged_models, runs
from lvm.tracking.candidates import Wanted, gather
from lvm.tracking.registry import Registry
from lvm.windows.export import plan_windows
from tests.conftest import copy_store
from tests.entrypoints.test_pipeline import artifacts, run_of
from tests.synthetic import make_bank

registry = Registry()

pytestmark = pytest.mark.slow
CTX = 20
SIZES = {"hidden": 8, "layers": 2, "chunk": 5, "slots": 2}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, empty_store):
    """A working folder with a bank of 4,800 rows; version 1 is a model as if trained on it."""
    folder = tmp_path_factory.mktemp("shadow-workplace")
    bank = make_bank(folder / "bank", num_sequences=8, num_documents=30, num_twins=40)
    with pytest.MonkeyPatch.context() as patch:
        copy_store(empty_store, folder / "store", patch)
        patch.chdir(folder)
        with runs.run("train", {}):
            facts = facts_of("memory_gru", "none", bank, plan_windows(bank, CTX))
            torch.manual_seed(0)
            model = build_model({"model": "memory_gru", "dim": 16, **SIZES}).eval()
            registry.register(logged_models.log_predictor(model, facts), facts)
        yield folder


@pytest.fixture(scope="module")
def rehearsed(workplace) -> dict:
    """What a dry run reported, on a registry with a trained version only."""
    assert shadow_eval.main(["--report", "dry.json"]) == 0
    return json.loads(Path("dry.json").read_text())


@pytest.fixture(scope="module")
def promoted(rehearsed) -> dict:
    """What `shadow-eval` with promotion reported."""
    assert shadow_eval.main(["--promote", "enabled", "--report", "shadow.json"]) == 0
    return json.loads(Path("shadow.json").read_text())


def field(candidates: str = "all", ctx: int | None = None, register: bool = False):
    with runs.run("look", {}):
        wanted = Wanted(candidates, None, ctx, register=register)
        return gather(wanted)


def test_a_dry_run_changes_nothing(rehearsed):
    assert rehearsed["decision"]["promote"] and rehearsed["decision"]["failure"] is None
    assert {one["origin"] for one in rehearsed["outcomes"]} == {"measured now"}
    assert list(registry.versions()) == ["1"] and registry.aliases() == {}
    tags = MlflowClient().get_model_version("lvm", "1").tags
    assert "shadow_run" in tags and "decision_run" not in tags


def test_shadow_eval_makes_the_first_baseline(promoted):
    aliases = registry.aliases()
    winner = registry.versions()[aliases["baseline"]]
    assert winner.model == promoted["decision"]["winner"]
    kinds = [facts.kind for facts in registry.versions().values()]
    assert sorted(kinds) == ["free"] * len(FREE_MODELS) + ["trained"]
    run = run_of("shadow-eval")
    named = {"per_query.parquet", "decision.json", "report.md", "history.json"}
    assert named | {"forest.png", "hits.png", "lanes.png"} <= artifacts(run)
    assert run.data.tags["decision"] == "promoted"
    for version in registry.versions():
        tags = MlflowClient().get_model_version("lvm", version).tags
        assert tags["shadow_run"] == run.info.run_id
        assert ("decision_run" in tags) == (version == aliases["baseline"])
        assert tags["shadow_hit_at_5"].endswith("]")
        assert tags["shadow_place"].endswith(f"of {len(kinds)}")
    history = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/history.json")["moves"]
    assert history == registry.history() and history[-1]["version"] == aliases["baseline"]


def test_what_was_measured_before_is_read_back_and_no_model_runs(rehearsed, promoted):
    """The free predictors were fitted twice, once for the dry run: to the same weights."""
    assert {one["origin"] for one in promoted["outcomes"]} == {"read from the store"}
    shared = ("name", "figures", "ci95", "latency_ms", "measured_at")
    tables = [
        [[one[key] for key in shared] for one in x["outcomes"]] for x in (rehearsed, promoted)
    ]
    assert tables[0] == tables[1]


def test_a_second_shadow_eval_changes_nothing(promoted):
    before = registry.aliases(), list(registry.versions())
    assert shadow_eval.main(["--promote", "enabled"]) == 0
    assert (registry.aliases(), list(registry.versions())) == before
    assert run_of("shadow-eval").data.tags["decision"] == "kept"


def test_candidates_are_named_in_every_way_and_taken_once(promoted):
    run_id, baseline = run_of("train").info.run_id, registry.aliases()["baseline"]
    model_id = logged_models.load(f"runs:/{run_id}/model").model_id
    ways = f"1, models:/lvm/1, runs:/{run_id}/model, models:/{model_id}"
    found = field(f"{ways}, ema, models:/lvm@baseline")
    assert sorted(found.versions) == sorted([*FREE_MODELS, "memory_gru"])
    assert found.versions["memory_gru"] == "1" and baseline in found.versions.values()


def test_a_version_that_cannot_be_read_is_left_unscored(promoted, capsys):
    twin = logged_models.load("models:/lvm/1")
    with runs.run("lost", {}):
        correction = twin.row_correction
        lost = logged_models.log_predictor(
            build_model(twin.model.config | {"slots": 3}), twin.facts
        )
    assert correction is None
    version = registry.register(lost, twin.facts)
    (stored,) = Path("store").rglob(f"{lost}/artifacts/artifacts/model.safetensors")
    stored.write_bytes(b"damaged")
    MlflowClient().create_model_version("lvm", "file:///nowhere")
    assert shadow_eval.main(["--report", "lost.json"]) == 0
    outcomes = json.loads(Path("lost.json").read_text())["outcomes"]
    (failed,) = (one for one in outcomes if one["version"] == version)
    assert "does not match the sha256" in failed["failure"] and not failed["figures"]
    assert sum(bool(one["figures"]) for one in outcomes) == len(FREE_MODELS) + 1
    printed = capsys.readouterr().out
    assert "takes no part: its tags are not those" in printed
    assert f"bank {Path('bank').resolve()} (of version {version}, the newest trained)" in printed
    for number in (version, str(int(version) + 1)):
        MlflowClient().delete_model_version("lvm", number)


def test_a_rival_of_the_same_name_gets_a_name_of_its_own(promoted):
    assert sorted(field().versions) == sorted([*FREE_MODELS, "memory_gru"])
    twin = logged_models.read_card("models:/lvm/1")
    version = registry.register(twin.model_id, twin.facts)
    found = field()
    rivals = ["memory_gru-v1", f"memory_gru-v{version}"]
    assert sorted(found.versions) == sorted([*FREE_MODELS, *rivals])
    assert found.versions[found.baseline_name] == found.baseline_version
    MlflowClient().delete_model_version("lvm", version)


def fitted_anew(found) -> set[str]:
    return {one.name for one in found.candidates if one.model is not None}


def test_free_predictors_are_fitted_anew_for_other_windows_or_fits(promoted, monkeypatch):
    """A registered one is of the windows, of the way of fitting, that it was registered with."""
    assert fitted_anew(field()) == set()
    longer = field(ctx=30)
    assert {name.removesuffix("-ctx30") for name in fitted_anew(longer)} == set(FREE_MODELS)
    assert longer.versions[longer.baseline_name] == registry.aliases()["baseline"]
    monkeypatch.setattr(weights, "FIT_VERSION", weights.FIT_VERSION + 1)
    assert len(fitted_anew(field())) == len(FREE_MODELS)


def test_a_free_predictor_whose_files_are_lost_is_fitted_anew(promoted):
    baseline = registry.aliases()["baseline"]
    cards = registry.cards()
    lost = next(c for c in cards if c.facts.kind == "free" and c.version != baseline)
    (stored,) = Path("store").rglob(f"{lost.model_id}/artifacts/artifacts/model.safetensors")
    aside = stored.rename(stored.with_name("aside"))
    assert fitted_anew(field()) == {lost.facts.model}
    aside.rename(stored)


def test_one_exploratory_training_does_not_choose_the_split(promoted):
    other = dataclasses.replace(logged_models.read_card("models:/lvm/1").facts, seed=7)
    version = registry.register(str(logged_models.read_card("models:/lvm/1").model_id), other)
    assert field().windows.seed == 0
    MlflowClient().delete_model_version("lvm", version)


def test_a_query_log_chooses_the_queries(promoted, capsys):
    found = field()
    folder = mlflow.artifacts.download_artifacts(run_id=run_of("shadow-eval").info.run_id)
    table = pd.read_parquet(Path(folder) / "per_query.parquet")
    table.drop_duplicates("target_row").head(210).to_parquet("log.parquet")
    queries, source = choose_queries(
        read_query_log(Path("log.parquet")), found.bank, found.windows, None
    )
    assert len(queries) == 210
    assert source.endswith("rows by split: 0 train, 0 val, 210 test")
    assert (
        choose_queries(None, found.bank, found.windows, 9)[1]
        == "the first 9 of the frozen test split"
    )
    table.to_parquet("repeated.parquet")
    assert shadow_eval.main(["--queries", "repeated.parquet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "repeats query 1" in line


def test_a_log_of_recorded_contexts_is_asked_as_served(promoted):
    windows = field().windows
    tags_before = shadow_tags()
    lines = [
        {"target_row": int(row), "context_rows": list(range(int(row) - 1 - row % 3, int(row)))}
        for row in windows.queries["test"].target_row_Q[:30]
    ]
    Path("served.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert shadow_eval.main(["--queries", "served.jsonl", "--report", "served.json"]) == 0
    report = json.loads(Path("served.json").read_text())
    assert (report["num_queries"], report["removed_ctx"]) == (30, 3)
    assert "each asked from its recorded context" in report["source"]
    assert all(one["figures"] for one in report["outcomes"])
    run = run_of("shadow-eval")
    shown = run.data.metrics
    assert shown["shadow_log/hit_at_5_low"] <= shown["shadow_log/hit_at_5"]
    assert "shadow_log/hit_at_5" in run.data.metrics and "shadow/hit_at_5" not in run.data.metrics
    assert shadow_tags() == tags_before
    assert MlflowClient().get_model_version("lvm", "1").tags["log_run"] == run.info.run_id


def shadow_tags() -> dict[str, str]:
    tags = MlflowClient().get_model_version("lvm", "1").tags
    return {key: text for key, text in tags.items() if key.startswith("shadow_")}


def test_a_promotion_that_fails_is_not_reported_as_one(promoted, monkeypatch, capsys):
    """The registry is as before the first promotion; then its database is locked."""
    client = MlflowClient()
    before = registry.aliases()
    for name in before:
        client.delete_registered_model_alias("lvm", name)

    def fail(self, name, alias, version):
        raise OSError("database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", fail)
        assert shadow_eval.main(["--promote", "enabled", "--report", "failed.json"]) == 2
    run = run_of("shadow-eval")
    assert run.data.tags["decision"] == "promotion failed"
    reason = f"{promoted['decision']['winner']} did not take the alias (database is locked)"
    decision = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/decision.json")
    told = [decision["failure"], json.loads(Path("failed.json").read_text())["decision"]["failure"]]
    told.append(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/report.md"))
    assert all(reason in text for text in told) and reason in capsys.readouterr().out
    for name, version in before.items():
        client.set_registered_model_alias("lvm", name, version)


def test_promotion_by_hand_and_rollback_are_logged(promoted):
    before = registry.aliases()["baseline"]
    other = next(version for version in registry.versions() if version != before)
    assert promote.main(["--version", other, "--reason", "a test"]) == 0
    assert registry.aliases()["baseline"] == other
    assert rollback.main([]) == 0
    assert registry.aliases() == {"baseline": before, "previous": other}
    assert registry.withdrawn() == {other}


def test_a_rollback_to_a_version_that_cannot_be_read_is_refused(promoted, capsys):
    first = registry.aliases()["baseline"]
    other = next(version for version in registry.versions() if version != first)
    assert promote.main(["--version", other, "--reason", "a test"]) == 0
    before, moves = registry.aliases(), registry.history()
    model_id = logged_models.read_card(f"models:/lvm/{first}").model_id
    (stored,) = Path("store").rglob(f"{model_id}/artifacts/artifacts/model.safetensors")
    aside = stored.rename(stored.with_name("aside"))
    capsys.readouterr()
    assert rollback.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "rollback: the previous baseline, version" in line and "entry point promote" in line
    assert (registry.aliases(), registry.history()) == (before, moves)
    aside.rename(stored)
    assert rollback.main([]) == 0
    assert registry.aliases() == {"baseline": first, "previous": other}
