"""Command line of lvm: one thin click command a file."""

import gc
import os
import sys

from lvm.system.processes import end_with_parent, hold_signals

# While `python -m` is still locating the module, argv[0] is "-m": the run is not open yet.
if sys.argv[:1] == ["-m"]:
    hold_signals()
    if "MLFLOW_RUN_ID" in os.environ:  # launched: whoever waits for this run is the parent
        end_with_parent()
    gc.disable()  # what is imported stays: looking for garbage in it took 1.0 of 2.8 s of start-up
