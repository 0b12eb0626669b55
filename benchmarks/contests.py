"""Who takes the alias by which rule: the sequence of `decide` beside Holm's, on drawn contests.

`python -m benchmarks.contests`. A contest has a baseline and challengers, a share of which is truly
better. Each has paired differences by document, which share the baseline's chance; p is the exact
sign-flip test. Val figures are the true gains with as much chance as the test. Printed are the
share of contests in which one that is not better wins (at most alpha), and the share of those with
a better one in which a better one wins, without bystanders and with some that are clearly worse.
Shapes: C challengers of one contest, M documents, P patterns of signs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tabulate import tabulate

from lvm.evaluation.metrics import Difference, holm
from lvm.models.facts import FREE, TRAINED
from lvm.shadow.comparison import Comparison, Outcome, ShadowResult
from lvm.shadow.promotion_gates import decide
from lvm.system.seeding import generator
from lvm.system.settings import read_gate_rules

RULES = read_gate_rules()
BASELINE, HIT = "baseline", 0.2
NUM_DOCUMENTS = 10  # 1,024 patterns of signs, all of which are tried
STANDARD_ERROR = 0.005  # of a difference of Hit@5
WORSE = -5.0  # true gain of a bystander, in standard errors
Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class Contest:
    """True gains of the challengers, what val and test say of them, all (C,) in points of 1."""

    gain_C: Float64Array
    val_C: Float64Array
    mean_C: Float64Array
    low_C: Float64Array
    p_C: Float64Array

    def first(self, num: int) -> "Contest":
        """Return the contest of the first challengers alone."""
        return Contest(*(values_C[:num] for values_C in vars(self).values()))

    def replay(self) -> ShadowResult:
        """Return the contest as a replay whose baseline is a free predictor."""
        names = [f"challenger-{place}" for place in range(len(self.gain_C))]
        outcomes, pairs = [_outcome(BASELINE, FREE, 0.0, 0.0)], []
        for place, name in enumerate(names):
            mean, low = float(self.mean_C[place]), float(self.low_C[place])
            change = Difference(mean, low, 2 * mean - low, float(self.p_C[place]), NUM_DOCUMENTS)
            outcomes.append(_outcome(name, TRAINED, mean, float(self.val_C[place])))
            pairs.append(Comparison(name, BASELINE, change, change, change, STANDARD_ERROR, ()))
        outcomes.sort(key=lambda one: -one.served["hit_at_5"])
        return ShadowResult(
            bank_sha256="",
            windows_sha256="",
            leaky=False,
            num_rows=100_000,
            num_answers=100_000,
            num_queries=2_000,
            num_documents=NUM_DOCUMENTS,
            removed_ctx=100,
            seed=0,
            baseline_name=BASELINE,
            best_free=BASELINE,
            outcomes=tuple(outcomes),
            comparisons=tuple(pairs),
            per_query=pd.DataFrame(),
            queries_sha256="",
        )


def _outcome(name: str, kind: str, gain: float, val: float) -> Outcome:
    hit, ci95 = {"hit_at_5": HIT + gain}, {"hit_at_5": [HIT + gain - 0.02, HIT + gain + 0.02]}
    told = {"figures": hit, "ci95": ci95, "served": hit, "served_ci95": ci95}
    return Outcome(name, kind, None, 100, latency_ms={"p95": 1.0}, val_hit_at_5=HIT + val, **told)  # type: ignore[arg-type]


def draw_contests(
    random: np.random.Generator, num: int, gains: Callable[[int], Float64Array]
) -> Iterator[Contest]:
    """Yield contests of 2 to 12 challengers; `gains` draws the true gains, in standard errors."""
    pattern = np.arange(2 ** (NUM_DOCUMENTS - 1))[:, None]
    sign_PM = 1.0 - 2 * (pattern >> np.arange(NUM_DOCUMENTS) & 1)
    spread = STANDARD_ERROR * np.sqrt(NUM_DOCUMENTS)
    for size in random.integers(2, 13, num):
        gain_C = STANDARD_ERROR * gains(size)
        shared_M = random.standard_normal(NUM_DOCUMENTS)
        own_CM = random.standard_normal((len(gain_C), NUM_DOCUMENTS))
        change_CM = gain_C[:, None] + spread * (shared_M + own_CM) / np.sqrt(2)
        mean_C = change_CM.mean(axis=1)
        error_C = change_CM.std(axis=1, ddof=1) / np.sqrt(NUM_DOCUMENTS)
        flipped_CP = np.abs(change_CM @ sign_PM.T) / NUM_DOCUMENTS
        p_C = (flipped_CP >= np.abs(mean_C)[:, None] - 1e-12).mean(axis=1)
        val_C = gain_C + STANDARD_ERROR * random.standard_normal(len(gain_C))
        yield Contest(gain_C, val_C, mean_C, mean_C - 1.96 * error_C, p_C)


def passed_in_sequence(contest: Contest) -> NDArray[np.bool_]:
    """Return which challengers pass every gate of `decide`, (C,)."""
    decision = decide(contest.replay(), BASELINE, RULES)
    failed = {check.candidate for check in decision.checks if not check.passed}
    places = range(len(contest.gain_C))
    return np.array([f"challenger-{place}" not in failed for place in places])


def passed_by_holm(contest: Contest) -> NDArray[np.bool_]:
    """Return which challengers have a gain with p <= alpha after Holm over all of them, (C,)."""
    return (contest.low_C > 0) & (holm(contest.p_C) <= RULES.alpha)


@click.command()
@click.option("--contests", default=2000, show_default=True, help="Contests of each kind.")
@click.option("--gain", default=3.0, show_default=True, help="True gain, in standard errors.")
@click.option("--bystanders", default=6, show_default=True, help="Challengers that are worse.")
def main(contests: int, gain: float, bystanders: int) -> None:
    """Print error rates and power of both rules."""
    lines = []
    rules = {"sequence": passed_in_sequence, "Holm": passed_by_holm}
    for share in (0.0, 0.3, 0.7):
        for added in (0, bystanders):
            random = generator(0, "contests")

            def gains(size: int, share: float = share, added: int = added) -> Float64Array:
                own_C = gain * (random.random(size) < share)  # noqa: B023
                return np.append(own_C, np.full(added, WORSE))

            drawn = list(draw_contests(random, contests, gains))
            for name, passed in rules.items():
                found = [(one.gain_C > 0, passed(one)) for one in drawn]
                wrong = np.mean([(won_C & ~is_better_C).any() for is_better_C, won_C in found])
                right = [
                    won_C[is_better_C].any() for is_better_C, won_C in found if any(is_better_C)
                ]
                power = f"{100 * np.mean(right):.1f}" if right else "-"
                lines.append([f"{share:.0%}", added, name, f"{100 * wrong:.1f}", power])
    headers = ["truly better", "bystanders", "rule", "a wrong one wins, %", "a better one wins, %"]
    print(tabulate(lines, headers, disable_numparse=True))


if __name__ == "__main__":
    main()
