"""The process that measures candidates: it loads the libraries once, then forks for each job.

Run as `python -m lvm.shadow.worker <id of its parent>`. Each line of its input is the folder of a
job; each line of its output is the exit code of the fork that did the job, -n after signal n. The
host itself computes nothing, so no thread pool is lost in a fork. `multiprocessing`'s forkserver
does the same, but a fork of it imports the caller's main module again (MLflow, matplotlib: 6 s
each, measured), its resource tracker ignores SIGTERM, and it cannot be stopped by a public call.
"""

import gc
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np

from lvm.bank.archive import map_array
from lvm.models.weights import load_model
from lvm.shadow.replay import Job, measure, write_measurement
from lvm.system import progress
from lvm.system.processes import SIGNALS, Stopped, end_with_parent, stoppable

MODEL, CORRECTION, JOB, ERROR = "model", "row_correction.npy", "job.pickle", "error.txt"
SPENT = "spent.json"
ExceptHook = Callable[[type[BaseException], BaseException, TracebackType | None], None]


def main(arguments: list[str]) -> None:
    """Fork a process for each job until the input ends, or until the parent does."""
    gc.freeze()  # the collector would write to, and so copy, the pages that forks share
    end_with_parent()
    if os.getppid() != int(arguments[0]):
        return  # the parent ended before this process could follow it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be read as an answer
    with stoppable():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which decides
        for line in sys.stdin:
            print(run_in_fork(Path(line.rstrip("\n"))), file=answers, flush=True)


def run_in_fork(folder: Path) -> int:
    """Do the job in `folder` in a fork, which never outlives this call; return its exit code."""
    host = os.getpid()
    child = os.fork()
    if child == 0:
        _work(folder, host)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except Stopped:
        with suppress(ProcessLookupError, ChildProcessError):  # it may have just ended
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        raise


def run(job: Job) -> None:
    """Measure the model of a job and write the result."""
    folder = job.folder / MODEL
    path = folder / CORRECTION
    row_correction = np.array(map_array(path)) if path.is_file() else None
    progress.reset()
    found = measure(load_model(folder), job.asked, row_correction)
    (job.folder / SPENT).write_text(json.dumps(progress.report()["parts"]))
    write_measurement(job.result, job.key, found)


def error_writer(folder: Path) -> ExceptHook:
    """Return an `excepthook` that writes the error that ends a process to `folder`, in one line.

    If even that write fails, the process exits with its errno.
    """

    def write(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        line = " ".join(f"{kind.__name__}: {error}".split())
        try:
            (folder / ERROR).write_text(line[:500])
        except OSError as refused:
            os._exit(refused.errno or 1)

    return write


def _work(folder: Path, host: int) -> NoReturn:
    """Do a job, then end this process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    sys.excepthook = error_writer(folder)
    end_with_parent()
    if os.getppid() == host:
        run(pickle.loads((folder / JOB).read_bytes()))
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
