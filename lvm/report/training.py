"""What `train` prints beside its figures: the header, the time it will take, what to type next."""

from collections.abc import Collection

from lvm.bank.store import Bank
from lvm.system.environment import num_cores
from lvm.training.config import Settings, as_dict
from lvm.training.optimizer import TrainingPlan
from lvm.windows.planning import Windows

# Settings that have a line of their own or do not matter to most models.
DERIVED = ("model", "device", "precision", "decay", "init", "trunk")


def training_header(
    bank: Bank,
    windows: Windows,
    config: Settings,
    automatic: Collection[str],
    plan: TrainingPlan,
    num_parameters: int,
) -> str:
    """Return what is trained, on what, with what; `automatic` names the settings left to us."""
    cores = f" (cores: {num_cores()})" if config.device == "cpu" else ""
    lanes = f", {len(bank.lanes)} lanes" if bank.lanes else ""
    counts = windows.counts
    values = as_dict(config).items()
    chosen = [f"{k} {v}" for k, v in values if k in automatic and k not in DERIVED]
    lines = {
        "bank": f"{bank.path}: {bank.num_rows:,} rows of {bank.dim} dims{lanes}, {bank.encoder}",
        "windows": f"ctx {windows.ctx}, split by {windows.split}: {counts['train_windows']:,} to "
        f"train on, {len(windows.queries['val']):,} val queries",
        "model": f"{config.model}, {num_parameters:,} parameters",
        "device": f"{config.device}{cores}, {config.precision}",
        "auto": ", ".join(one for one in chosen if not one.endswith(" None")) or "nothing",
        "plan": f"{plan.steps:,} steps, {plan.steps_per_epoch:,} of them an epoch; "
        f"{plan.examples_per_epoch:,} examples an epoch",
    }
    return "\n".join(f"{name:<8} {words}" for name, words in lines.items())


def pace_line(seconds: float, num_steps: int) -> str:
    """Return how long `num_steps` take at so many seconds a step."""
    minutes = seconds * num_steps / 60
    total = f"{minutes:.0f} min" if minutes >= 2 else f"{60 * minutes:.0f} s"
    return f"time     {num_steps:,} steps of {seconds:.2f} s: {total}, and a validation each epoch"


def next_commands(reference: str, registry: str | None) -> str:
    """Return the commands that follow a training, as typed; `registry` None: not registered."""
    named = "" if registry in (None, "lvm") else f" --registry {registry}"
    lines = [f"next: lvm eval --model {reference}{named}   # test figures, beside free predictors"]
    if registry is not None:
        lines.append(f"then: lvm shadow-eval --promote enabled{named}   # the new baseline?")
    return "\n".join(lines)
