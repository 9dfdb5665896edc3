"""Files that appear whole or not at all: written under a temporary name, then renamed. Standard library only."""

from __future__ import annotations

import contextlib
import glob
import os
from pathlib import Path

from k25_plugins.errors import InputError


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file, text as UTF-8; missing parents are made. `InputError` where the operating system refuses.

    What a killed process left of an earlier try at the same file is removed.
    """
    if not path.name:
        raise InputError(f"{str(path)!r}: expected the name of a file")
    prefix = f".{path.name}.partial-"
    temporary = path.with_name(f"{prefix}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f"{glob.escape(prefix)}*"):
            if not is_alive(leftover.name.removeprefix(prefix)):
                leftover.unlink(missing_ok=True)
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_alive(process: str) -> bool:
    """Whether the process that a temporary name names still runs; a name that is no process of ours counts as alive."""
    if not (process.isascii() and process.isdigit()):
        return True
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
