"""Work of the processes that settle promotions at the same moment."""

import dataclasses
import os
from multiprocessing.synchronize import Barrier

from lvm import tracking
from lvm.rules import read_gate_rules
from lvm.settling import settle
from tests.shadow_cases import winning_case


def settle_at_once(name: str, version: str, uri: str, barrier: Barrier, results) -> None:
    """Settle a replay in which `name` beats the baseline, when all others are ready to."""
    os.environ["MLFLOW_TRACKING_URI"] = uri
    tracking.configure()
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
    decision = settle(result, versions, read_gate_rules(), name, published.append, True)
    assert published == [decision]
    results.put((version, decision.promote, decision.winner, decision.reasons[0]))
