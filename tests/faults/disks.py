"""Small disks that fill up or become read-only, as tmpfs mounts."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = 4096


class Disk:
    """A disk of its own at `path`; whatever stands there, `leave` decides how much is free."""

    def __init__(self, path: Path) -> None:
        self.path, self._filler = path, path / "filler"

    def leave(self, num_bytes: int) -> None:
        """Fill the disk until only `num_bytes` are free."""
        self.empty()
        left = shutil.disk_usage(self.path).free - num_bytes
        with self._filler.open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, max(left, 1))

    def empty(self) -> None:
        """Free what was filled."""
        self._filler.unlink(missing_ok=True)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Let nothing be written in the block, not by root either."""
        _mount("-o", "remount,ro", str(self.path))
        try:
            yield
        finally:
            _mount("-o", "remount,rw", str(self.path))


@contextmanager
def mounted(path: Path, megabytes: int = 64) -> Iterator[Disk]:
    """Mount an empty disk at `path`; skip the test where that is not permitted."""
    path.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here: {error}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)
