"""Names of processes, told apart from those of others."""

import subprocess
import sys

from lvm.processes import is_gone, own_name

SLEEPER = [
    sys.executable,
    "-c",
    "from lvm.processes import own_name; print(own_name(), flush=True); input()",
]


def test_a_process_is_there_until_it_ends():
    child = subprocess.Popen(SLEEPER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    name = child.stdout.readline().strip()
    assert not is_gone(own_name()) and not is_gone(name)
    child.kill()
    while not is_gone(name):  # a zombie is gone, too
        pass
    child.wait()
    assert is_gone(name)


def test_another_process_under_the_same_number_is_told_apart():
    *place, started = own_name().split(" ")
    assert is_gone(" ".join([*place, str(float(started) - 3600)]))


def test_what_cannot_be_seen_from_here_is_not_said_to_be_gone():
    host, namespace, _, started = own_name().split(" ")
    assert not is_gone(f"another-host {namespace} 999999 {started}")
    assert not is_gone(f"{host} 1 999999 {started}")
    assert not is_gone("") and not is_gone("no name of a process")
