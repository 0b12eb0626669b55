"""Files or folders that are made beside their place, then put there whole."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lvm.processes import is_gone, own_name

BETWEEN, SUFFIX = "~", ".scratch"


@contextmanager
def put_whole(path: Path) -> Iterator[Path]:
    """Yield where to make the file or folder `path`, which is put there when the block ends.

    A reader sees what stood there before, or the new. Where the block raises, nothing changes.
    Raises OSError where a file would take the place of a folder, or a folder that of a file.
    """
    with scratch_beside(path) as scratch:
        made = scratch / path.name
        yield made
        if path.is_dir() and not made.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if path.is_dir():
            os.rename(path, scratch / "replaced")
        os.replace(made, path)


@contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """Yield an empty hidden folder on the disk of `path`, which is gone when the block ends.

    Its name tells its process: what killed ones left there for the same `path` is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_remains(path)
    owner = own_name().replace(" ", BETWEEN)
    prefix = f".{path.name}{BETWEEN}{owner}{BETWEEN}"
    scratch = Path(tempfile.mkdtemp(prefix=prefix, suffix=SUFFIX, dir=path.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_remains(path: Path) -> None:
    prefix = f".{path.name}{BETWEEN}"
    for folder in path.parent.iterdir():
        if folder.name.startswith(prefix) and folder.suffix == SUFFIX:
            owner = folder.name.removeprefix(prefix).rpartition(BETWEEN)[0]
            if is_gone(owner.replace(BETWEEN, " ")):
                shutil.rmtree(folder, ignore_errors=True)
