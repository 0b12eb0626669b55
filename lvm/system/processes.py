"""Processes by a name that outlives them, so that what they left behind can be told from theirs."""

import os
import re
import socket
from pathlib import Path

import psutil

# A clock that is set anew shifts when a process is said to have started, by less than this.
CLOCK_SECONDS = 60.0
NAMESPACE = Path("/proc/self/ns/pid")
_NAME = re.compile(r"(\S+) (\d+) (\d+) (\d+\.\d+)")


def own_name() -> str:
    """Return `<host> <namespace of process ids> <id> <start>` of this process."""
    started = psutil.Process().create_time()
    return f"{socket.gethostname()} {_namespace()} {os.getpid()} {started:.2f}"


def is_gone(name: str) -> bool:
    """Tell whether the process of this name has ended; False where that cannot be seen from here.

    What is no name of a process is not gone either.
    """
    found = _NAME.fullmatch(name)
    if found is None or (found[1], found[2]) != (socket.gethostname(), str(_namespace())):
        return False
    try:
        process = psutil.Process(int(found[3]))
        shift = abs(process.create_time() - float(found[4]))
        return process.status() == psutil.STATUS_ZOMBIE or shift > CLOCK_SECONDS
    except psutil.ZombieProcess:
        return True
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return not _has_number(int(found[3]))


def _has_number(number: int) -> bool:
    """Tell whether there is a process of this number, even one that /proc hides (hidepid)."""
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _namespace() -> int:
    """Return what tells the process ids of a container from those of its host; 0 without /proc."""
    return NAMESPACE.stat().st_ino if NAMESPACE.exists() else 0
