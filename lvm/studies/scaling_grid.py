"""Run a grid of trainings: check the plan, train its cells, fit the surface, judge.

Shapes: F fractions, W widths, S seeds, Q queries.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lvm.bank.bank import Bank
from lvm.evaluation.metrics import (
    LEVEL,
    Difference,
    document_interval,
    figures,
    hit_at,
    paired_difference,
    soft_hit_at,
)
from lvm.studies.scaling_cells import Cell, CellResult, Trainer, ValQueries, num_documents, part_of
from lvm.studies.scaling_fit import MIN_SEEDS, MIN_SIZES, Fitted, GridValues, data_for, fit_grid
from lvm.studies.scaling_verdict import (
    MOST_TIMES,
    K,
    Optimised,
    Sample,
    Trials,
    Verdict,
    gain_over_seeds,
    is_in_doubt,
    judge,
    judge_optimisation,
    not_optimised,
    pays,
)
from lvm.system.settings import ScalingRules
from lvm.windows.planning import Windows

HALF = "half the steps"
OnCell = Callable[[str, CellResult], None]


@dataclass(frozen=True)
class Plan:
    """Sizes of the grid, all ascending; every cell has these `steps` and this `lr`."""

    fractions: tuple[float, ...]
    widths: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    lr: float

    def __post_init__(self) -> None:
        _check_sizes("fractions", self.fractions)
        _check_sizes("widths", self.widths)
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise ValueError(f"fractions: {fraction:g} is not above 0 and at most 1")
        for width in self.widths:
            if width < 2 or width % 2:
                raise ValueError(f"widths: {width} is not an even number of 2 or more")
        if len(set(self.seeds)) < max(MIN_SEEDS, len(self.seeds)) or min(self.seeds) < 0:
            raise ValueError("seeds: need two or more different whole numbers of 0 or more")

    @classmethod
    def parse(cls, fractions: str, widths: str, seeds: str, steps: int, lr: float) -> "Plan":
        """Read the sizes from comma-separated lists; raises ValueError if one is malformed."""
        return cls(
            fractions=tuple(_numbers("fractions", fractions, float)),
            widths=tuple(_numbers("widths", widths, int)),
            seeds=tuple(_numbers("seeds", seeds, int)),
            steps=steps,
            lr=lr,
        )

    def cell(self, fraction: float, width: int, seed: int) -> Cell:
        return Cell(fraction, width, seed, self.steps, self.lr)

    def largest(self) -> Cell:
        """Return the cell that must be optimised before the others are trained."""
        return self.cell(self.fractions[-1], self.widths[-1], self.seeds[0])


@dataclass(frozen=True)
class BreakEven:
    """The train documents to add for a `gain` of Hit@5 at the largest width, with an interval.

    Infinite if no number is enough, or more than MOST_TIMES what was trained on.
    """

    gain: float
    documents: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Scaling:
    """The results of a run; the fits are None if it stopped before the grid (not optimised).

    `soft` is fitted to soft Hit@5 and decides; `hit` is fitted to Hit@5. `lead` names the best free
    predictor, with the lead of the largest cell over it in soft Hit@5.
    """

    verdict: Verdict
    optimised: Optimised
    results: tuple[CellResult, ...]
    num_documents: int
    soft: Fitted | None = None
    hit: Fitted | None = None
    break_even: BreakEven | None = None
    lead: tuple[str, Difference] | None = None


def check_data(
    bank: Bank, windows: Windows, queries: ValQueries, plan: Plan, rules: ScalingRules
) -> None:
    """Raise ValueError if the bank is too small for such a grid."""
    if windows.leaky:
        raise ValueError(
            "windows: split=random leaks, no verdict can rest on it; export them again"
        )
    if len(queries.measured) < rules.min_queries:
        raise ValueError(
            f"queries: {len(queries.measured)} val queries are left to measure with; at least "
            f"{rules.min_queries} are needed, so give more documents or a larger max_queries"
        )
    measured = len(np.unique(queries.document_Q))
    if measured < rules.min_documents:
        raise ValueError(
            f"queries: those to measure with are of {measured} val documents; at least "
            f"{rules.min_documents} are needed, so give more documents"
        )
    for seed in plan.seeds:
        parts = [part_of(bank, windows, fraction, seed) for fraction in plan.fractions]
        documents = num_documents(bank, parts[0])
        if documents < rules.min_documents:
            raise ValueError(
                f"fractions: {plan.fractions[0]:g} of this bank is {documents} documents; at least "
                f"{rules.min_documents} are needed, so use a larger fraction or more documents"
            )
        sizes = [len(part.train_rows()) for part in parts]
        if len(set(sizes)) < len(sizes):
            raise ValueError(
                "fractions: two of them choose the same documents of this bank; use fractions "
                "further apart, a shorter ctx or more documents"
            )


def run_grid(
    trainer: Trainer, plan: Plan, rules: ScalingRules, on_cell: OnCell = lambda kind, result: None
) -> Scaling:
    """Judge the optimisation, train the grid, fit it and judge it.

    `on_cell` is called with each result and its kind: "grid", or the kind of trial before it.
    """
    results: dict[Cell, CellResult] = {}

    def trained(kind: str, cell: Cell) -> CellResult:
        if cell not in results:
            results[cell] = trainer.result(cell)
            on_cell(kind, results[cell])
        return results[cell]

    optimised = _optimised(trainer, plan, rules, trained)
    documents = num_documents(trainer.bank, trainer.windows)
    if optimised.reasons:
        return Scaling(not_optimised(optimised), optimised, tuple(results.values()), documents)
    grid = [
        trained("grid", plan.cell(fraction, width, seed))
        for fraction in plan.fractions
        for width in plan.widths
        for seed in plan.seeds
    ]
    document_Q = trainer.queries.document_Q
    soft, hit = (
        fit_grid(
            grid_values(plan, grid, document_Q, is_soft), extrapolation_sd=rules.extrapolation_sd
        )
        for is_soft in (True, False)
    )
    largest = [one for one in grid if one.cell == replace(plan.largest(), seed=one.cell.seed)]
    halves = [trained(HALF, half_of(one.cell)) for one in largest]
    steps = gain_over_seeds(largest, halves, document_Q, soft.seed_sd, soft.seed_freedom)
    optimised = replace(optimised, steps=steps)
    sample = Sample(len(document_Q), len(np.unique(document_Q)), len(plan.seeds))
    verdict = judge(soft, optimised, sample, rules)
    trained_on = float(np.mean([one.documents for one in largest]))
    even = break_even(hit, trained_on, documents, rules)
    return Scaling(verdict, optimised, tuple(results.values()), documents, soft, hit, even)


def grid_values(
    plan: Plan, results: Sequence[CellResult], document_Q: np.ndarray, soft: bool
) -> GridValues:
    """Return the per-query values of the cells in order; data are mean rows over the seeds."""
    by_cell = {result.cell: result for result in results}
    score = soft_hit_at if soft else hit_at
    ordered = [
        [[by_cell[plan.cell(f, w, s)] for s in plan.seeds] for w in plan.widths]
        for f in plan.fractions
    ]
    value_FWSQ = np.array([[[score(r.rank_Q, K) for r in line] for line in f] for f in ordered])
    data_F = np.array([np.mean([r.rows for r in line[0]]) for line in ordered])
    parameters_W = np.array([line[0].parameters for line in ordered[0]], np.float64)
    return GridValues(data_F, parameters_W, value_FWSQ, document_Q)


def free_figures(
    ranks: Mapping[str, np.ndarray], document_Q: np.ndarray, seed: int
) -> dict[str, dict[str, Any]]:
    """Return the figures of each free predictor with intervals and soft Hit@5, from its ranks."""
    return {
        name: {
            **figures(rank_Q),
            "soft": float(soft_hit_at(rank_Q, K).mean()),
            "ci95": document_interval(rank_Q, document_Q, seed),
        }
        for name, rank_Q in ranks.items()
    }


def lead_over_free(
    largest: CellResult, free: Mapping[str, np.ndarray], document_Q: np.ndarray
) -> tuple[str, Difference]:
    """Return the free predictor with the best soft Hit@5, and the largest cell's lead over it."""
    scores = {name: soft_hit_at(rank_Q, K) for name, rank_Q in free.items()}
    best = max(scores, key=lambda name: float(scores[name].mean()))
    own_Q = soft_hit_at(largest.rank_Q, K)
    return best, paired_difference(own_Q, scores[best], document_Q, seed=0)


def break_even(hit: Fitted, trained_on: float, there: int, rules: ScalingRules) -> BreakEven:
    """Return how many train documents to add for the gain, with the interval over the resamples.

    The largest fraction has `trained_on` of the `there` train documents.
    """
    gain, (level, slope) = rules.break_even_gain, hit.coefficient_P[:2]
    times = float(data_for(gain, level, slope, hit.exponents[0]))
    times_B = data_for(gain, hit.level_B, hit.slope_B, hit.exponent_B)
    low, high = np.quantile(times_B, [LEVEL / 2, 1 - LEVEL / 2], method="nearest")
    more = [
        max(0.0, trained_on * float(one) - there) if one <= MOST_TIMES else math.inf
        for one in (times, low, high)
    ]
    return BreakEven(gain, *more)


def half_of(cell: Cell) -> Cell:
    """Return the cell with half the optimizer steps."""
    return replace(cell, steps=max(1, cell.steps // 2))


def _optimised(
    trainer: Trainer,
    plan: Plan,
    rules: ScalingRules,
    trained: Callable[[str, Cell], CellResult],
) -> Optimised:
    """Train the largest cell, then half its steps, also at other learning rates.

    The difference of two trainings may be luck, so every seed is trained before it stops the grid.
    """
    cell = plan.largest()
    passes = plan.steps / trainer.steps_per_epoch() / plan.fractions[-1]
    document_Q = trainer.queries.document_Q
    other_rates = (cell.lr / rules.lr_factor, cell.lr * rules.lr_factor)

    def judged(full: int, half: int, rates: Sequence[int]) -> Optimised:
        """Judge by this many seeds of each."""
        cells = [replace(cell, seed=seed) for seed in plan.seeds]
        trials = Trials(
            full=[trained("grid", one) for one in cells[:full]],
            half=[trained(HALF, half_of(one)) for one in cells[:half]],
            rates=[
                [trained("other lr", replace(half_of(one), lr=lr)) for one in cells[:number]]
                for lr, number in zip(other_rates, rates, strict=True)
            ],
        )
        return judge_optimisation(trials, passes, document_Q, rules)

    found = judged(1, 1, (1, 1))
    if not is_in_doubt(found, rules):
        return found
    num = len(plan.seeds)
    rates = [num if pays(gain, rules) else 1 for _, gain in found.rates]
    return judged(num if pays(found.steps, rules) else 1, num, rates)


def _check_sizes(name: str, sizes: Sequence[float]) -> None:
    if len(sizes) < MIN_SIZES:
        raise ValueError(f"{name}: {len(sizes)} given; a curve needs at least {MIN_SIZES}")
    if list(sizes) != sorted(set(sizes)):
        raise ValueError(f"{name}: must be different numbers in ascending order")


def _numbers(name: str, text: str, kind: type[Any]) -> list[Any]:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}: {text!r} is not a comma-separated list of numbers") from None
