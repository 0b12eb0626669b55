"""Printable text: errors as one line, with the cause if a disk or the tracking store fails."""

import errno
import functools
import os
import re
import sqlite3
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from sqlalchemy.exc import SQLAlchemyError

MOST = 600  # characters of a message
TAIL_LENGTH = 200  # the end of a message, where it says what would be right, is never cut
CUT = " [...] "
# Controls, line separators, overrides of the reading direction, halves of surrogate pairs.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

DATABASE_ERRORS = (SQLAlchemyError, sqlite3.Error)
AGAIN = "then run the same command again"
CHECK_URI = f"check MLFLOW_TRACKING_URI, {AGAIN}"
CHECK_PROXY = "check MLFLOW_TRACKING_URI, HTTP_PROXY, HTTPS_PROXY and NO_PROXY"
NOT_MLFLOW = f"something other than MLflow answers there; {CHECK_PROXY}"
FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_ERRNOS = (*FULL, errno.EROFS)
STORE_ERRORS = {
    "database is locked": f"is locked by another process; wait until that one has ended, {AGAIN}",
    "disk is full": f"its disk is full; free some space, {AGAIN}",
    "readonly database": "is read-only; set MLFLOW_TRACKING_URI to one that can be written",
    "disk I/O error": f"its disk is full or fails; free some space, {AGAIN}",
    "unable to open database": "cannot be opened; set MLFLOW_TRACKING_URI to one that can be",
    "not a database": "is damaged; restore it, or move it away to begin a new one",
    "disk image is malformed": "is damaged; restore it, or move it away to begin a new one",
    # HTTP: the cause first, since each of these messages may also say "Max retries exceeded".
    "Unable to connect to proxy": f"a proxy does not let it through; {CHECK_PROXY}",
    "Tunnel connection failed": f"a proxy does not let it through; {CHECK_PROXY}",
    "Proxy Authentication Required": f"a proxy asks for a password; {CHECK_PROXY}",
    "error code 407": f"a proxy asks for a password; {CHECK_PROXY}",
    "response body was not in a valid JSON": NOT_MLFLOW,
    "Response body: '<": NOT_MLFLOW,
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not trusted; see REQUESTS_CA_BUNDLE and "
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "WRONG_VERSION_NUMBER": "it does not speak https there; check MLFLOW_TRACKING_URI",
    "Failed to resolve": f"the name of its host is unknown; {CHECK_URI}",
    "NameResolutionError": f"the name of its host is unknown; {CHECK_URI}",
    "No route to host": f"no network leads to its host; {CHECK_URI}",
    "Network is unreachable": f"no network leads to its host; {CHECK_URI}",
    "Connection refused": f"the server does not answer; start it, {AGAIN}",
    "error responses": f"the server or a proxy answers with errors; read its log, {AGAIN}",
    "Read timed out": f"the server takes requests but does not answer; read its log, {AGAIN}",
    "ConnectTimeoutError": f"its host does not answer; {CHECK_URI}",
    "Max retries exceeded": f"the server cannot be reached; {CHECK_URI}",
}
SERVER = re.compile(r"host='([^']*)', port=(\d+)")

P = ParamSpec("P")
T = TypeVar("T")


def printable(text: str, kept: str = "") -> str:
    """Replace every control character outside `kept` by its escape, such as \\x1b."""

    def escape(found: re.Match[str]) -> str:
        return found[0] if found[0] in kept else ascii(found[0])[1:-1]

    return CONTROL.sub(escape, text)


class Printable:
    """A text stream that escapes what the terminal cannot show, and control characters.

    Names and texts from files must not steer the terminal.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`; escape control characters except tab and newline."""
        shown = printable(text, kept="\n\t")
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def one_line(text: str) -> str:
    """Return `text` as one line of at most MOST printable characters, cut in its middle."""
    line = printable(" ".join(text.split()))
    if len(line) <= MOST:
        return line
    head = MOST - TAIL_LENGTH - len(CUT)
    return line[:head] + CUT + line[-TAIL_LENGTH:]


def one_line_errors(reader: Callable[P, T]) -> Callable[P, T]:
    """Decorate a reader so that the message of every ValueError is one line, see `one_line`."""

    @functools.wraps(reader)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return reader(*args, **kwargs)
        except ValueError as error:
            line = one_line(str(error))
            if type(error) is ValueError and line == str(error):
                raise
            raise ValueError(line) from error

    return wrapped


def explain_failure(error: BaseException) -> str:
    """Return why a command failed: what, where, what would be right, without SQL or a traceback."""
    if _is_disk_error(error, FULL):
        what = getattr(error, "filename", None) or "an artifact or a temporary file"
        return f"disk full: {what} could not be written; free some space, {AGAIN}"
    if _is_disk_error(error, (errno.EROFS,)):
        what = getattr(error, "filename", None) or "the folder of an artifact"
        return f"read-only: {what} cannot be written; give a folder that can be"
    text = " ".join(str(error).partition("[SQL:")[0].partition("(Background on")[0].split())
    if isinstance(error, ValueError):
        return text
    for sign, explanation in STORE_ERRORS.items():
        if sign in text:
            found = SERVER.search(text)
            where = "" if found is None else f" at {found[1]}:{found[2]}"
            return f"tracking store{where}: {explanation} ({sign})"
    return f"tracking store: {text}" if isinstance(error, DATABASE_ERRORS) else text


def is_environment_error(error: BaseException) -> bool:
    """Return whether a disk or the tracking store failed.

    The file itself may be fine; do not report it as missing or corrupt.
    """
    return _is_disk_error(error, DISK_ERRNOS) or any(sign in str(error) for sign in STORE_ERRORS)


def _is_disk_error(error: BaseException, numbers: tuple[int, ...]) -> bool:
    """MLflow wraps errors of downloads: then only the message tells the errno, in words."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in numbers
    is_wrapped = not isinstance(error, ValueError)
    return is_wrapped and any(os.strerror(number) in str(error) for number in numbers)
