"""Failures of disks and stores in one line."""

import errno
import os
import sqlite3

import pytest
from sqlalchemy.exc import OperationalError

from lvm.reasons import plain_reason


def disk_error(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (disk_error(errno.ENOSPC, "data/state"), "disk full: data/state could not be written"),
        (disk_error(errno.EDQUOT), "disk full: an artifact or a temporary file could not"),
        (disk_error(errno.EROFS, "data/x"), "read-only: data/x cannot be written; give a folder"),
        (sqlite3.OperationalError("database is locked"), "is locked by another process"),
        (sqlite3.DatabaseError("file is not a database"), "tracking store: is damaged"),
        (sqlite3.OperationalError("no such table: runs"), "tracking store: no such table: runs"),
        (ValueError("lr: database is locked"), "lr: database is locked"),
        (FileNotFoundError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
    ],
    ids=str,
)
def test_reason(error: Exception, told: str) -> None:
    assert plain_reason(error).startswith(told) or told in plain_reason(error)


def test_sql_is_left_out() -> None:
    cause = sqlite3.OperationalError("database or disk is full")
    error = OperationalError("UPDATE runs\nSET status=?", ("FAILED",), cause)
    line = plain_reason(error)
    assert line == (
        "tracking store: its disk is full; free some space, then run the same command again "
        "(disk is full)"
    )
