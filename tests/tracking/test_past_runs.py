"""Artifacts of runs: what is missing, what only cannot be had now."""

import errno
import os

import mlflow
import pytest

from lvm.tracking import past_runs


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError("No such file or directory: 'report.json'"), ValueError),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/x"), OSError),
        (mlflow.MlflowException("Run 'abc' not found"), ValueError),
        (mlflow.MlflowException("database is locked"), mlflow.MlflowException),
    ],
)
def test_a_store_that_cannot_be_read_now_lacks_nothing(
    error: Exception, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*words: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", fails)
    with pytest.raises(kind) as caught:
        past_runs.read_json("abc")
    assert type(caught.value) is kind
