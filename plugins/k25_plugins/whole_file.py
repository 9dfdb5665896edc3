"""Files that appear whole or not at all: written under a temporary name, then renamed. Standard library only."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from k25_plugins.errors import InputError


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file, text as UTF-8; missing parents are made. `InputError` where the operating system refuses."""
    if not path.name:
        raise InputError(f"{str(path)!r}: expected the name of a file")
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
