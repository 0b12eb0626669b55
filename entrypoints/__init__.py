"""Command line of lvm: one thin click command a file."""

import gc
import os


def start_command() -> None:
    """Prepare the process of a command for its imports; call this before them.

    A stop signal is remembered until the run is open and can record it. A launched command ends
    with its launcher. The garbage collector stays off until the imports are done, because what
    they create stays: collecting took 1.0 of 2.8 s of start-up.
    """
    from lvm.system.processes import end_with_parent, hold_signals

    hold_signals()
    if "MLFLOW_RUN_ID" in os.environ:
        end_with_parent()
    gc.disable()
