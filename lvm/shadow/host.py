"""Processes for jobs, forked from one python that has loaded the libraries already."""

import os
import subprocess
import sys
from pathlib import Path

from lvm.system.processes import GRACE_SECONDS


class Host:
    """Starts a process for each job; its python, with this very code, is started for the first."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def measure(self, folder: Path) -> int:
        """Do the job in `folder`; return the exit code of its process, which has ended by then."""
        if self._process is None:
            self._process = _start_host()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        answer = ""
        try:
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            pass  # it was killed, which its exit code tells
        finally:
            if not answer:  # after a stop signal to this process, too
                self.close()
        return int(answer) if answer else process.returncode

    def close(self) -> None:
        """End the python that was started, with whatever still runs below it."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.communicate()


def _start_host() -> subprocess.Popen[str]:
    code = str(Path(__file__).resolve().parents[2])
    others = os.environ.get("PYTHONPATH")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([code, *([others] if others else [])])
    }
    command = [sys.executable, "-m", "lvm.shadow.forking", str(os.getpid())]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
