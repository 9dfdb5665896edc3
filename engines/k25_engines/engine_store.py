"""The folder `BUNDLE/engines`: engines appear whole, `engines.json` is written last, two builders do not mix.

Whoever installs holds a lock of the system on the folder, which ends with its process. What a record names is always
there: records of files that are about to be replaced are taken out first, so a process that is killed in between
leaves engines without a record, never a record of another engine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from k25_engines.manifest import (
    ENGINES_FOLDER,
    MANIFEST_PATH,
    EngineEntry,
    EngineManifest,
    engine_manifest_to_json,
    read_engine_file,
    read_engine_manifest,
)
from k25_plugins.errors import InputError
from k25_plugins.whole_file import is_alive, write_whole

_PREFIX = ".partial-"


@dataclass(frozen=True, kw_only=True)
class StagedEngine:
    """An engine and its log, written and checked, not yet in place."""

    entry: EngineEntry
    file: Path
    log: Path


@contextlib.contextmanager
def staging(bundle: Path) -> Iterator[Path]:
    """A folder in `BUNDLE/engines` to build in; gone afterwards, and so is what killed builds left."""
    engines = bundle / ENGINES_FOLDER
    try:
        engines.mkdir(exist_ok=True)
        for leftover in engines.glob(f"{_PREFIX}*"):
            if not is_alive(leftover.name.removeprefix(_PREFIX).partition("-")[0]):
                shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=engines))
    except OSError as error:
        raise InputError(f"{engines}: cannot be written: {error.strerror}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            engines.rmdir()  # only where nothing was built


def install(bundle: Path, engines: list[StagedEngine]) -> EngineManifest:
    """Move engines into place and add them to `engines.json`, keeping those of others."""
    try:
        with _lock(bundle / ENGINES_FOLDER):
            known = read_engine_manifest(bundle)
            places = {(staged.entry.component, staged.entry.target) for staged in engines}
            if known.without(places) != known:
                write_whole(bundle / MANIFEST_PATH, engine_manifest_to_json(known.without(places)))
            for staged in engines:
                for source, path in ((staged.file, staged.entry.path), (staged.log, staged.entry.log)):
                    place = bundle / path
                    place.parent.mkdir(exist_ok=True)
                    source.replace(place)
            manifest = known.merged(tuple(staged.entry for staged in engines))
            write_whole(bundle / MANIFEST_PATH, engine_manifest_to_json(manifest))
            return manifest
    except OSError as error:
        raise InputError(
            f"{bundle / ENGINES_FOLDER}: cannot be written: {error.strerror} ({error.filename})"
        ) from error


def reusable_engine(
    bundle: Path, known: EngineManifest, *, component: str, target: str, key: str
) -> EngineEntry | None:
    """The engine that is there already: of this key, its file intact."""
    entry = known.find(component, target)
    if entry is None or entry.key != key:
        return None
    try:
        read_engine_file(bundle, entry)
    except InputError:
        return None
    return entry


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
