"""Two processes that promote_winner promotions at the same moment, each of a candidate of its own.

Usage: python -m tests.tracking.rival_settlements NAME VERSION NAME VERSION
in the store that MLFLOW_TRACKING_URI names. Prints JSON: of each the version, the names that took
the alias, the winner, the first reason.
"""

import dataclasses
import json
import multiprocessing
import sys
from multiprocessing.synchronize import Barrier

from lvm.system.settings import read_gate_rules
from lvm.tracking import runs
from lvm.tracking.candidates import promote_winner
from lvm.tracking.registry import Registry
from tests.shadow_cases import winning_case


def settle_at_once(name: str, version: str, barrier: Barrier, results) -> None:
    """Settle a replay in which `name` beats the baseline, when all others are ready to."""
    runs.configure()
    won = winning_case()
    outcomes = (dataclasses.replace(won.outcomes[0], name=name, version=version), *won.outcomes[1:])
    pairs = tuple(
        dataclasses.replace(pair, candidate=name) if pair.candidate == "model" else pair
        for pair in won.comparisons
    )
    result = dataclasses.replace(won, outcomes=outcomes, comparisons=pairs)
    versions = {name: version, "old": "1", "ema": None, "copy-last": None}
    published = []
    barrier.wait(60)
    decision = promote_winner(
        Registry(), result, versions, read_gate_rules(), name, published.append, print
    )
    assert published == [decision]
    results.put((version, decision.promote, decision.winner, decision.reasons[0]))


def main(words: list[str]) -> None:
    """Settle in forks: so far this process has imported, not opened the store."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    rivals = list(zip(words[::2], words[1::2], strict=True))
    workers = [
        context.Process(target=settle_at_once, args=(*rival, barrier, results)) for rival in rivals
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
