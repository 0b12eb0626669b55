"""Names of processes, told apart from those of others."""

import subprocess
import sys

import psutil
import pytest

from lvm.system.processes import has_ended, process_identifier

SLEEPER = [
    sys.executable,
    "-c",
    "from lvm.system.processes import process_identifier as own; print(own(), flush=True); input()",
]


def test_a_process_is_there_until_it_ends():
    child = subprocess.Popen(SLEEPER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    name = child.stdout.readline().strip()
    assert not has_ended(process_identifier()) and not has_ended(name)
    child.kill()
    while not has_ended(name):  # a zombie is gone, too
        pass
    child.wait()
    assert has_ended(name)


def test_another_process_under_the_same_number_is_told_apart():
    *place, started = process_identifier().split(" ")
    assert has_ended(" ".join([*place, str(float(started) - 3600)]))


def test_what_cannot_be_seen_from_here_is_not_said_to_be_gone():
    host, namespace, _, started = process_identifier().split(" ")
    assert not has_ended(f"another-host {namespace} 999999 {started}")
    assert not has_ended(f"{host} 1 999999 {started}")
    assert not has_ended("") and not has_ended("no name of a process")


@pytest.mark.parametrize("hidden", [psutil.NoSuchProcess, psutil.AccessDenied])
def test_another_users_process_that_proc_hides_is_not_gone(monkeypatch, hidden):
    """What psutil raises where /proc is mounted with hidepid=2 or 1."""

    def refuse(number):
        raise hidden(number)

    host, namespace, _, started = process_identifier().split(" ")
    living = process_identifier()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setattr(psutil, "Process", refuse)
    assert not has_ended(living)
    assert has_ended(f"{host} {namespace} {ended.pid} {started}")
    assert has_ended(f"{host} {namespace} {10**30} {started}")


def test_a_process_that_may_not_be_signalled_is_not_gone(monkeypatch):
    def refuse(number, signal_number):
        raise PermissionError

    host, namespace, _, started = process_identifier().split(" ")
    monkeypatch.setattr("os.kill", refuse)
    assert not has_ended(f"{host} {namespace} 999999999 {started}")
