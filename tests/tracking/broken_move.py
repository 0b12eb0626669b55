"""A promotion whose process ends, as by SIGKILL, right after one alias is set.

Usage: python -m tests.tracking.broken_move ALIAS VERSION EXPECTED
in the store that MLFLOW_TRACKING_URI names.
"""

import os
import sys

from mlflow.tracking import MlflowClient

from lvm.tracking import runs
from lvm.tracking.registry import Registry

registry = Registry()


def main(after: str, version: str, expected: str) -> None:
    """Promote `version`, but end with exit code 9 once the alias `after` is set."""
    runs.configure()
    set_alias = MlflowClient.set_registered_model_alias

    def set_and_end(self: MlflowClient, model: str, name: str, number: str) -> None:
        set_alias(self, model, name, number)
        if name == after:
            os._exit(9)

    MlflowClient.set_registered_model_alias = set_and_end  # type: ignore[method-assign]
    registry.promote(version, expected, {"reason": "cut off"})


if __name__ == "__main__":
    main(*sys.argv[1:])
