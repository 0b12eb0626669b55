"""Failures of disks and stores in one line."""

import errno
import os
import sqlite3

import pytest
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import OperationalError

from lvm.system.errors import explain_failure, is_environment_error


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
    assert explain_failure(error).startswith(told) or told in explain_failure(error)


def test_sql_is_left_out() -> None:
    cause = sqlite3.OperationalError("database or disk is full")
    error = OperationalError("UPDATE runs\nSET status=?", ("FAILED",), cause)
    line = explain_failure(error)
    assert line == (
        "tracking store: its disk is full; free some space, then run the same command again "
        "(disk is full)"
    )


@pytest.mark.parametrize(
    ("error", "is_of_it"),
    [
        (disk_error(errno.ENOSPC, "x"), True),
        (MlflowException("failures while downloading: [Errno 28] No space left on device"), True),
        (MlflowException("(sqlite3.OperationalError) database is locked"), True),
        (MlflowException("HTTPConnectionPool: Max retries exceeded with url"), True),
        (MlflowException("Run 'abc' not found"), False),
        (disk_error(errno.ENOENT, "x"), False),
        (ValueError("weights: not those of the configuration"), False),
    ],
    ids=str,
)
def test_what_is_read_is_not_blamed_for_its_place(error: Exception, is_of_it: bool) -> None:
    assert is_environment_error(error) == is_of_it
    assert "\n" not in explain_failure(error)
