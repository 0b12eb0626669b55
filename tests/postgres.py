"""A throw-away PostgreSQL with an `mlflow server` before it, as docs/team.md sets them up."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

DEBIAN = Path("/usr/lib/postgresql")  # Debian leaves the programs of the server off PATH
UNPRIVILEGED = "postgres" if os.getuid() == 0 else None  # PostgreSQL does not run as root
LOCALHOST = "127.0.0.1"


@contextmanager
def postgres() -> Iterator[str]:
    """Yield the URI of an empty database, reached by a socket alone; it is gone afterwards."""
    programs = server_programs()
    folder = Path(tempfile.mkdtemp(prefix="lvm-"))  # pytest's folders are closed to other users
    if UNPRIVILEGED is not None:
        shutil.chown(folder, UNPRIVILEGED)

    def call(name: str, *arguments: str) -> None:
        command = [str(programs / name), *arguments]
        with (folder / f"{name}.log").open("w") as log:
            done = subprocess.run(command, user=UNPRIVILEGED, cwd=folder, stdout=log, stderr=log)
        assert done.returncode == 0, (folder / f"{name}.log").read_text()

    try:
        call("initdb", "--pgdata", "data", "--username", "lvm", "--auth", "trust")
        settings = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
        control = ("--pgdata", "data", "--wait")
        call("pg_ctl", *control, "--log", "postgres.log", "--options", settings, "start")
        try:
            call("createdb", "--host", str(folder), "--username", "lvm", "mlflow")
            yield f"postgresql://lvm@/mlflow?host={folder}"
        finally:
            call("pg_ctl", *control, "--mode", "fast", "stop")
    finally:
        shutil.rmtree(folder)


def server_programs() -> Path:
    """Return the folder of the newest PostgreSQL's programs; fail in one line without one."""
    on_path = shutil.which("initdb")
    if on_path is not None:
        return Path(on_path).resolve().parent
    found = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        reason = f"no initdb on PATH nor in {DEBIAN}/*/bin"
        pytest.fail(f"PostgreSQL is missing ({reason}): apt-get install postgresql", pytrace=False)
    return found[-1].parent


@contextmanager
def mlflow_server(store: str, artifacts: Path, log: Path) -> Iterator[str]:
    """Yield the URL of a server with two workers, which keeps artifacts in a folder of its own."""
    with socket.socket() as free:
        free.bind((LOCALHOST, 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    command += ["--artifacts-destination", str(artifacts), "--host", LOCALHOST, "--port", port]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # seven processes without a use
    url = f"http://{LOCALHOST}:{port}"
    with log.open("w") as written:
        process = subprocess.Popen(
            [*command, "--workers", "2"], env=environment, stdout=written, stderr=written
        )
    try:
        with requests.Session() as session:
            session.mount(url, HTTPAdapter(max_retries=Retry(300, backoff_factor=1, backoff_max=1)))
            session.get(f"{url}/health").raise_for_status()
        yield url
    except BaseException:
        print(log.read_text()[-3000:])
        raise
    finally:
        process.terminate()
        process.wait(timeout=300)
