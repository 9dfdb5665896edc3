"""A folder of traced components, shared by builds: content-addressed, atomic, bounded in size.

An entry is one file named by the SHA-256 of everything that decides a component (configuration, precision, versions,
source). It is written under a temporary name and renamed, so two builds at once, or one that is killed, leave no
half entry. The least recently used entries are removed when the folder exceeds its limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from k25_export.byte_sizes import bytes_from_text
from k25_export.manifest import Port
from k25_export.traced_component import TracedComponent
from k25_plugins.errors import InputError
from k25_plugins.whole_file import write_whole

CACHE_VARIABLE = "K25_CACHE"
LIMIT_VARIABLE = "K25_CACHE_LIMIT"
DEFAULT_LIMIT_BYTES = 1 << 30
_SUFFIX = ".component"


class ComponentCache:
    """`limit_bytes` bounds the folder's size after each write."""

    def __init__(self, folder: Path, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self.hits = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cache {folder}: cannot be made: {error.strerror}") from error

    def component(self, key: str, make: Callable[[], TracedComponent]) -> TracedComponent:
        """The entry of this key, or what `make` returns, which is then kept."""
        path = self._folder / f"{key}{_SUFFIX}"
        found = _read(path)
        if found is not None:
            self.hits += 1
            return found
        made = make()
        self._write(path, made)
        return made

    def _write(self, path: Path, component: TracedComponent) -> None:
        head = {
            "sha256": hashlib.sha256(component.data).hexdigest(),
            "inputs": [asdict(port) for port in component.inputs],
            "outputs": [asdict(port) for port in component.outputs],
        }
        write_whole(path, json.dumps(head).encode() + b"\n" + component.data)
        self._trim()

    def _trim(self) -> None:
        entries = []
        for path in self._folder.glob(f"*{_SUFFIX}"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another build removed it
            entries.append((status.st_mtime_ns, status.st_size, path))
        size = sum(entry_bytes for _, entry_bytes, _ in entries)
        for _, entry_bytes, path in sorted(entries):
            if size <= self._limit_bytes:
                return
            path.unlink(missing_ok=True)
            size -= entry_bytes


def _read(path: Path) -> TracedComponent | None:
    """The entry, or None where there is none or it is damaged; its age starts again."""
    try:
        head_text, _, data = path.read_bytes().partition(b"\n")
        head = json.loads(head_text)
        if hashlib.sha256(data).hexdigest() != head["sha256"]:
            return None
        ports = {
            kind: tuple(Port(name=port["name"], dtype=port["dtype"], shape=tuple(port["shape"])) for port in head[kind])
            for kind in ("inputs", "outputs")
        }
        with contextlib.suppress(OSError):  # a cache may be shared read-only
            os.utime(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return TracedComponent(data=data, inputs=ports["inputs"], outputs=ports["outputs"])


def cache_from_environment(folder: Path | None = None, limit: str | None = None) -> ComponentCache | None:
    """The cache given by argument or by K25_CACHE and K25_CACHE_LIMIT, or None where no folder is given."""
    place = folder or (Path(os.environ[CACHE_VARIABLE]) if os.environ.get(CACHE_VARIABLE) else None)
    if place is None:
        return None
    text = limit or os.environ.get(LIMIT_VARIABLE)
    return ComponentCache(place, limit_bytes=bytes_from_text(text) if text else DEFAULT_LIMIT_BYTES)
