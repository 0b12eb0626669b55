"""Work of the processes that settle promotions at the same moment."""

import dataclasses
import os
from multiprocessing.synchronize import Barrier

from mlflow.tracking import MlflowClient

from lvm import tracking
from lvm.registry import alias
from lvm.registry.settling import settle
from lvm.rules import read_gate_rules
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
    decision = settle(result, versions, read_gate_rules(), name, published.append, print)
    assert published == [decision]
    results.put((version, decision.promote, decision.winner, decision.reasons[0]))


def cut_off_between_the_aliases(uri: str, after: str, version: str, expected: str) -> None:
    """Promote, but end as by SIGKILL right after the alias `after` is set."""
    os.environ["MLFLOW_TRACKING_URI"] = uri
    tracking.configure()
    set_alias = MlflowClient.set_registered_model_alias

    def set_and_end(self: MlflowClient, name: str, alias: str, version: str) -> None:
        set_alias(self, name, alias, version)
        if alias == after:
            os._exit(9)

    MlflowClient.set_registered_model_alias = set_and_end  # type: ignore[method-assign]
    alias.promote(version, expected, {"reason": "cut off"})
