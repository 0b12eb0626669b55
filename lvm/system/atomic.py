"""Files or folders that are made beside their place, then put there whole."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lvm.system.processes import is_gone, own_name
from lvm.system.signals import undisturbed

BETWEEN, SUFFIX, REPLACED = "~", ".scratch", "replaced"


@contextmanager
def put_whole(path: Path) -> Iterator[Path]:
    """Yield where to make the file or folder `path`, which is put there when the block ends.

    A reader sees what stood there before, or the new; of a folder, for the instant between two
    renames, neither. Where the block raises, or the new cannot be put there, nothing changes.
    Raises OSError where a file would take the place of a folder, or a folder that of a file.
    """
    with scratch_beside(path) as scratch:
        made = scratch / path.name
        yield made
        if path.is_dir() and not made.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if path.is_dir():
            _exchange(path, made, scratch / REPLACED)
        else:
            os.replace(made, path)


@contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """Yield an empty hidden folder on the disk of `path`, which is gone when the block ends.

    Its name tells its process: what killed ones left there for the same `path` is removed first,
    but for the folder that one was about to replace, which is put back.
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


def _exchange(path: Path, made: Path, replaced: Path) -> None:
    with undisturbed():
        os.rename(path, replaced)
        try:
            os.replace(made, path)
        except OSError:
            os.rename(replaced, path)
            raise


def _remove_remains(path: Path) -> None:
    prefix = f".{path.name}{BETWEEN}"
    for folder in path.parent.iterdir():
        if folder.name.startswith(prefix) and folder.suffix == SUFFIX:
            owner = folder.name.removeprefix(prefix).rpartition(BETWEEN)[0]
            if is_gone(owner.replace(BETWEEN, " ")):
                _put_back(folder, path)
                shutil.rmtree(folder, ignore_errors=True)


def _put_back(folder: Path, path: Path) -> None:
    """Undo a replacement that broke off between its renames: there, the new is still in scratch."""
    broke_off = (folder / path.name).exists() and not os.path.lexists(path)
    if broke_off:
        with suppress(FileNotFoundError):  # none was replaced, or another has put it back
            os.rename(folder / REPLACED, path)
