"""Error messages in one printable line; the cause when a disk or the tracking store fails."""

import errno
import os
import sqlite3

import pytest
import requests
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import OperationalError

from lvm.system.errors import (
    MOST,
    TAIL_LENGTH,
    explain_failure,
    is_environment_error,
    one_line,
    one_line_errors,
    printable,
)


def test_controls_are_written_as_escapes() -> None:
    assert printable("a\x1b[2J\x00\x9b\u2028\u202e\ud800é\U0001f600\xa0") == (
        "a\\x1b[2J\\x00\\x9b\\u2028\\u202e\\ud800é\U0001f600\xa0"
    )
    assert printable("a\tb\n\r", kept="\n\t") == "a\tb\n\\r"


def test_a_line_has_one_line_of_bounded_length() -> None:
    assert one_line("a \n\n b\x07") == "a b\\x07"
    line = one_line("begin " + "x" * 10**6 + " " + "e" * (TAIL_LENGTH - 4) + " end")
    assert len(line) == MOST and line.startswith("begin xx") and line.endswith("ee end")
    assert one_line("x" * MOST) == "x" * MOST


def test_a_reader_tells_its_errors_in_one_line() -> None:
    good = ValueError("a good line")

    @one_line_errors
    def read(error: BaseException | None) -> int:
        """Read."""
        if error is not None:
            raise error
        return 7

    assert read(None) == 7 and read.__doc__ == "Read."
    with pytest.raises(ValueError) as caught:
        read(good)
    assert caught.value is good
    for wrong in (ValueError("two\nlines"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x\ny")):
        with pytest.raises(ValueError) as caught:
            read(wrong)
        assert type(caught.value) is ValueError and caught.value.__cause__ is wrong
        assert "\n" not in str(caught.value)
    with pytest.raises(KeyError):
        read(KeyError("no ValueError"))


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


POOL = "HTTPConnectionPool(host='mlflow.example', port=5000): Max retries exceeded with url: /api"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (f"{POOL} (Caused by NewConnectionError: [Errno 111] Connection refused)", "start it"),
        (f"{POOL} (Caused by ProxyError('Unable to connect to proxy'))", "NO_PROXY"),
        (f"{POOL} (ProxyError(OSError('Tunnel connection failed: 403 Forbidden')))", "a proxy"),
        (f"{POOL} (Caused by NameResolutionError: Failed to resolve 'x')", "host is unknown"),
        (f"{POOL} (SSLError: CERTIFICATE_VERIFY_FAILED)", "certificate is not trusted"),
        (f"{POOL} (ResponseError('too many 503 error responses'))", "answers with errors"),
        (f"{POOL} (ReadTimeoutError: Read timed out. (read timeout=60))", "read its log"),
        (f"{POOL} (ConnectTimeoutError: timed out)", "its host does not answer"),
        (f"{POOL} (something else)", "cannot be reached"),
    ],
)
def test_an_unreachable_server_is_told_by_its_cause(text: str, cause: str) -> None:
    line = explain_failure(MlflowException(text))
    assert line.startswith("tracking store at mlflow.example:5000: ") and cause in line
    assert is_environment_error(MlflowException(text))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "API request failed with error code 407 != 200. Response body: ''",
            "proxy",
        ),
        (
            "API request failed with error code 403 != 200. Response body: '<html><h1>No",
            "other than",
        ),
        (
            "successful but the response body was not in a valid JSON format",
            "other",
        ),
    ],
)
def test_what_answers_instead_of_mlflow_is_told(text: str, cause: str) -> None:
    line = explain_failure(MlflowException(text))
    assert line.startswith("tracking store: ") and cause in line and "HTTPS_PROXY" in line


def test_the_causes_are_told_as_the_http_library_words_them(monkeypatch) -> None:
    """Port 9 of this machine is closed: once as the server, once as the proxy before it."""
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    lines = []
    for proxies in ({}, {"http": "http://127.0.0.1:9"}):
        with pytest.raises(requests.exceptions.ConnectionError) as caught:
            requests.get("http://127.0.0.1:9/api", proxies=proxies, timeout=10)
        lines.append(explain_failure(MlflowException(str(caught.value))))
    assert "127.0.0.1:9: the server does not answer; start it" in lines[0]
    assert "a proxy does not let it through; check MLFLOW_TRACKING_URI, HTTP_PROXY" in lines[1]
