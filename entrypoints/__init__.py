"""Command line of lvm: one thin click command a file."""

import sys

from lvm.stopping import remember_signals

# While `python -m` is still locating the module, argv[0] is "-m": the run is not open yet.
if sys.argv[:1] == ["-m"]:
    remember_signals()
