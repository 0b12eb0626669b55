"""Command line of lvm: one thin click command a file."""

import gc
import sys

from lvm.stopping import remember_signals

# While `python -m` is still locating the module, argv[0] is "-m": the run is not open yet.
if sys.argv[:1] == ["-m"]:
    remember_signals()
    gc.disable()  # what is imported stays: looking for garbage in it took 1.0 of 2.8 s of start-up
