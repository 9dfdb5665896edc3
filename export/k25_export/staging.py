"""Folders that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from k25_plugins.errors import InputError
from k25_plugins.whole_file import is_alive

#: How often a rename is tried again when another build was faster.
RACES = 20


@contextlib.contextmanager
def staged_folder(target: Path, *, is_ours: Callable[[Path], bool], what: str) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends without an error.

    Missing parents are created. An existing `target` must be empty or `is_ours`; it is replaced whole. On any error,
    or an interrupt, the target is as before and the temporary folder is gone. Errors of the operating system (not
    writable, disk full) become `InputError`.
    """
    try:
        if os.path.lexists(target) and not target.is_dir():
            raise InputError(f"{what} {target}: expected a folder, found a file. Choose another name.")
        if target.is_dir() and any(target.iterdir()) and not is_ours(target):
            raise InputError(f"{what} {target}: the folder is not empty and is no {what} of ours. Choose another name.")
        target = target.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        staging = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise InputError(f"{what} {target}: cannot be created: {_reason(error)}") from error
    try:
        staging.chmod(0o755)
        yield staging
        _replace(staging, target)
    except OSError as error:
        where = f" ({Path(error.filename).name})" if isinstance(error.filename, str) else ""
        raise InputError(f"{what} {target}: cannot be written: {_reason(error)}{where}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-{os.getpid()}-"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def remove_leftovers(target: Path) -> None:
    """Remove what killed runs left beside `target`: folders whose process is gone."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.partial-*-*"):
        owner = path.name.removeprefix(f".{target.name}.partial-").partition("-")[0]
        if not is_alive(owner):
            shutil.rmtree(path, ignore_errors=True)


def _replace(staging: Path, target: Path) -> None:
    """Rename to `target`. What is there is moved aside first, and back on any error.

    Another build may do the same at the same time: whoever renames last stands, and both succeed.
    """
    _sync(staging)
    for _ in range(RACES):
        try:
            _swap(staging, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT) or not staging.is_dir():
                raise
            last = error
    raise last


def _swap(staging: Path, target: Path) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        staging.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    try:
        target.rename(aside / "old")
        staging.rename(target)
    except BaseException:
        if (aside / "old").is_dir() and not target.is_dir():
            (aside / "old").rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
