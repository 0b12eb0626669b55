"""Command: train the phases, replay them together, report them."""

if __name__ == "__main__":
    from entrypoints.cli import start

    start("phases")

from dataclasses import asdict

from entrypoints.cli import EntryPoint
from entrypoints.options import PhasesOptions
from lvm.bank.bank import Bank
from lvm.report.phases import plan_text
from lvm.studies.phase_comparison import measure_phases
from lvm.studies.phases import Job, Planner, chosen_phases, read_phases
from lvm.tracking import datasets, runs
from lvm.tracking.datasets import read_bank
from lvm.tracking.registry import Registry
from lvm.tracking.study_runs import (
    as_trained,
    publish_phases,
    replay_seed,
    shadow_or_find,
    train_all,
)
from lvm.training.config import RECIPES
from lvm.training.guard import planned_warnings


def check(options: PhasesOptions) -> None:
    """Raise ValueError on an unknown phase."""
    chosen_phases(options.phases, read_phases())


def body(options: PhasesOptions) -> None:
    """Train each phase once, replay all on the same queries, report them beside the old figures."""
    bank, registry = read_bank(options.bank), Registry(options.registry)
    registry.check_bank(bank)
    datasets.log_bank(bank, "phases")
    jobs = plan_all(options, bank, registry)
    warnings = [one for job in jobs for one in planned_warnings(job.plan)]
    runs.set_tags({"warnings": "; ".join(dict.fromkeys(warnings)) or "none"})
    planned = {job.name: job.parameters for job in jobs}
    runs.log_config(asdict(options) | {"planned": planned})
    runs.name_run(f"{options.phases} {options.recipe} {options.size}")
    print(plan_text(jobs), flush=True)
    done = train_all(registry, jobs)
    asked = (options.promote, options.max_queries)
    shadow = shadow_or_find(registry, jobs, done, bank, *asked)
    trained = [as_trained(job, one, shadow.report) for job, one in zip(jobs, done, strict=True)]
    measured = measure_phases(trained, shadow.report, shadow.per_query, bank)
    publish_phases(measured, shadow, options.promote, options.gates, options.report)


def plan_all(options: PhasesOptions, bank: Bank, registry: Registry) -> list[Job]:
    """Plan all trainings before the first starts, so that an impossible one is refused at once."""
    recipes = RECIPES if options.recipe == "both" else (options.recipe,)
    limits = {"epochs": options.epochs, "max_steps": options.max_steps}
    given = {"bank": options.bank, "seed": options.seed, "registry": registry.name}
    given |= {name: value for name, value in limits.items() if value is not None}
    phases = chosen_phases(options.phases, read_phases())
    return Planner(bank, replay_seed(registry, bank)).all_jobs(phases, recipes, options.size, given)


main = EntryPoint("phases", PhasesOptions, body, check)
