"""Command: the whole pipeline on the embedded bank."""

if __name__ == "__main__":
    from entrypoints.cli import start

    start("main")

from dataclasses import asdict, dataclass
from typing import Any

from entrypoints.cli import EntryPoint
from entrypoints.options import MainOptions
from lvm.report.data import last_screen, pipeline_note
from lvm.system.progress import part
from lvm.tracking import runs
from lvm.tracking.datasets import DEFAULT_BANK
from lvm.tracking.registry import ARTIFACT
from lvm.tracking.runs import publish_report
from lvm.tracking.store import ui_command


@dataclass(frozen=True)
class Size:
    """Parameters of the steps; those not named keep their defaults."""

    bank: str
    ctx: int
    ingest: dict[str, Any]
    train: dict[str, Any]


PLANS = {
    "quick": Size(f"{DEFAULT_BANK}-quick", 500, {"max_rows": 40_000}, {}),
    "full": Size(f"{DEFAULT_BANK}-full", 1000, {"max_rows": "all"}, {}),
    "tiny": Size(
        f"{DEFAULT_BANK}-tiny",
        50,
        {"max_rows": 8000},
        {"epochs": 1, "hidden": 16, "layers": 2, "negatives": 64},
    ),
}


def body(options: MainOptions) -> None:
    """Ingest, export, train, eval, lane-diagnostics, shadow-eval with promotion, as nested runs."""
    plan = PLANS[options.size]
    runs.log_config(asdict(options) | {"plan": asdict(plan)})
    data: dict[str, Any] = {"bank": plan.bank, "ctx": plan.ctx}
    runs.name_run(options.size)
    launched: dict[str, str] = {}

    def launch(entry: str, **parameters: Any) -> None:
        with part(entry, is_shown=False):  # it prints lines of its own
            launched[entry] = runs.launch(entry, parameters)

    launch("ingest", bank=plan.bank, **plan.ingest)
    launch("export", **data)
    launch("train", **data, **plan.train, registry=options.registry)
    launch("eval", model=f"runs:/{launched['train']}/{ARTIFACT}")
    launch("lane-diagnostics", eval_run=launched["eval"])
    launch("shadow-eval", bank=plan.bank, promote="enabled", registry=options.registry)
    summary = runs.read_text(launched["shadow-eval"], "shadow.txt")
    runs.log_artifact(summary, "shadow.txt")
    shadow = runs.read_json(launched["shadow-eval"], "report.json")
    runs.describe_run(pipeline_note(plan.bank, plan.ctx, shadow))
    publish_report({"size": options.size, "runs": launched, "shadow": shadow}, options.report)
    examples = runs.read_json(launched["eval"], "examples.json")
    first = dict(zip(examples["columns"], examples["data"][0], strict=True))
    name = runs.read_json(launched["eval"], "report.json")["model"]
    commands = {
        "what follows a text of yours": "lvm predict --text mine.txt",
        "train on texts of yours": "lvm ingest --source <folder> --bank data/mine; "
        "lvm train --bank data/mine --registry mine",
        "the runs in the MLflow UI": ui_command(),
        "  with lvm's columns": f"http://127.0.0.1:5000{runs.active_runs_page()}",
    }
    print(f"\n{last_screen(plan.ctx, shadow, first, name, commands)}")


main = EntryPoint("main", MainOptions, body)
