"""The process whose forks measure candidates, so that libraries are loaded once.

Run as `python -m lvm.shadow.forking <its parent's id>`. Each line of its input is the folder of a
job; the exit code of the fork that did it, -n after signal n, is written as a line. The host itself
computes nothing, so that no pool of threads is lost in a fork.
"""

import gc
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from lvm.shadow.child import run, told_in
from lvm.system.processes import SIGNALS, Stopped, end_with_parent, stoppable


def main(arguments: list[str]) -> None:
    """Fork a process for each job until the input ends, or until the parent does."""
    gc.freeze()  # no search for garbage touches, and so copies, the pages that forks share
    end_with_parent()
    if os.getppid() != int(arguments[0]):
        return  # the parent ended before it could be followed
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    with stoppable():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent decides
        for line in sys.stdin:
            print(measured_apart(Path(line.rstrip("\n"))), file=answers, flush=True)


def measured_apart(folder: Path) -> int:
    """Do the job in `folder` in a fork, which never outlives this call; return its exit code."""
    host = os.getpid()
    child = os.fork()
    if child == 0:
        _work(folder, host)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except Stopped:
        with suppress(ProcessLookupError, ChildProcessError):  # it may have ended just now
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        raise


def _work(folder: Path, host: int) -> NoReturn:
    """Do a job, then end this process; what is raised ends it, too, told in the job's folder."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    sys.excepthook = told_in(folder)
    end_with_parent()
    if os.getppid() == host:
        run(folder)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
