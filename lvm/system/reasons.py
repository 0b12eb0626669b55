"""The line that tells a user why a disk or the tracking store failed."""

import errno
import os
import sqlite3

from sqlalchemy.exc import SQLAlchemyError

DATABASE_ERRORS = (SQLAlchemyError, sqlite3.Error)
AGAIN = "then run the same command again"
FULL = (errno.ENOSPC, errno.EDQUOT)
OF_DISKS = (*FULL, errno.EROFS)
OF_THE_STORE = {
    "database is locked": f"is locked by another process; wait until that one has ended, {AGAIN}",
    "disk is full": f"its disk is full; free some space, {AGAIN}",
    "readonly database": "is read-only; set MLFLOW_TRACKING_URI to one that can be written",
    "disk I/O error": f"its disk is full or fails; free some space, {AGAIN}",
    "unable to open database": "cannot be opened; set MLFLOW_TRACKING_URI to one that can be",
    "not a database": "is damaged; restore it, or move it away to begin a new one",
    "disk image is malformed": "is damaged; restore it, or move it away to begin a new one",
    "Max retries exceeded": f"the server does not answer; start it, {AGAIN}",
}


def plain_reason(error: BaseException) -> str:
    """Return why a command failed: what, where, what would be right, without SQL or a traceback."""
    if _is_of_disks(error, FULL):
        what = getattr(error, "filename", None) or "an artifact or a temporary file"
        return f"disk full: {what} could not be written; free some space, {AGAIN}"
    if _is_of_disks(error, (errno.EROFS,)):
        what = getattr(error, "filename", None) or "the folder of an artifact"
        return f"read-only: {what} cannot be written; give a folder that can be"
    text = " ".join(str(error).partition("[SQL:")[0].partition("(Background on")[0].split())
    if isinstance(error, ValueError):
        return text
    for sign, told in OF_THE_STORE.items():
        if sign in text:
            return f"tracking store: {told} ({sign})"
    return f"tracking store: {text}" if isinstance(error, DATABASE_ERRORS) else text


def is_of_the_place(error: BaseException) -> bool:
    """Tell whether a disk or the store failed, whatever was read or written there.

    What was asked for may be well: it must not be taken for missing, or for damaged.
    """
    return _is_of_disks(error, OF_DISKS) or any(sign in str(error) for sign in OF_THE_STORE)


def _is_of_disks(error: BaseException, numbers: tuple[int, ...]) -> bool:
    """MLflow wraps errors of a download: then the words of the number stand in its message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in numbers
    is_wrapped = not isinstance(error, ValueError)
    return is_wrapped and any(os.strerror(number) in str(error) for number in numbers)
