"""The saved view of MLflow's run list: `make test-ui` looks at it in a browser."""

import base64
import json
import zlib
from pathlib import Path

from mlflow.tracking import MlflowClient

from lvm.tracking import runs as tracking
from lvm.tracking.run_list import RUNS_PAGE, SAVED_VIEW, VIEW

ROOT = Path(__file__).parents[2]


def test_a_run_leaves_the_view_to_its_experiment_once(store):
    with tracking.run("train", {}):
        pass
    tag = MlflowClient().get_experiment("0").tags[SAVED_VIEW + VIEW]
    packed = json.loads(tag)["state"].removeprefix("deflate;")
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert {"tags.`phase`", "tags.`ctx`", "metrics.`test/hit_at_5`"} < set(state["selectedColumns"])
    MlflowClient().set_experiment_tag("0", SAVED_VIEW + VIEW, "changed by a user")
    with tracking.run("train", {}):
        pass
    assert MlflowClient().get_experiment("0").tags[SAVED_VIEW + VIEW] == "changed by a user"


def test_make_ui_tells_the_address_of_the_view():
    assert RUNS_PAGE.replace("#", "\\#") in (ROOT / "Makefile").read_text()
