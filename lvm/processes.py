"""Processes by a name that outlives them, so that what they left behind can be told from theirs."""

import os
import socket
from pathlib import Path

import psutil

# A clock that is set anew shifts when a process is said to have started, by less than this.
CLOCK_SECONDS = 60.0
NAMESPACE = Path("/proc/self/ns/pid")


def own_name() -> str:
    """Return `<host> <namespace of process ids> <id> <start>` of this process."""
    started = psutil.Process().create_time()
    return f"{socket.gethostname()} {_namespace()} {os.getpid()} {started:.2f}"


def is_gone(name: str) -> bool:
    """Tell whether the process of this name has ended; False where it cannot be seen from here."""
    host, namespace, number, started = name.rsplit(" ", 3)
    if (host, namespace) != (socket.gethostname(), str(_namespace())):
        return False
    try:
        process = psutil.Process(int(number))
        now = process.create_time()
        return process.status() == psutil.STATUS_ZOMBIE or abs(now - float(started)) > CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True


def _namespace() -> int:
    """Return what tells the process ids of a container from those of its host; 0 without /proc."""
    return NAMESPACE.stat().st_ino if NAMESPACE.exists() else 0
