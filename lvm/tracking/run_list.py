"""The view of MLflow's run list that has the columns of this project."""

import base64
import json
import zlib

# How MLflow's pages (3.17) keep a saved view: a tag of the experiment, read by their own script.
SAVED_VIEW = "mlflow.sharedViewState."
VIEW = "lvm"
RUNS_PAGE = f"/#/experiments/0/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"
# Column -> pixels, from left to right: at a window of 1280 pixels all but the last are visible.
FIXED = {"attributes.`Run Name`": 200, "runDateAndNestInfo": 100}
CHOSEN = {
    "tags.`model`": 105,
    "tags.`ctx`": 60,
    "tags.`phase`": 70,
    "tags.`recipe`": 65,
    "tags.`leaky`": 60,
    "metrics.`best/hit_at_5`": 90,
    "metrics.`test/hit_at_5`": 90,
    "metrics.`shadow/hit_at_5`": 105,
    "tags.`bank`": 110,
}


def saved_view() -> dict[str, str]:
    """Return the tag by which an experiment offers the view `lvm` of its runs."""
    widths = FIXED | CHOSEN
    state = {
        "selectedColumns": list(CHOSEN),
        "columnOrder": list(widths),
        "columnWidths": widths,
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    view = {"name": VIEW, "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"}
    return {SAVED_VIEW + VIEW: json.dumps(view)}
