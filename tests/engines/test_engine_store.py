"""The folder of engines: two builders at once, killed ones, what cannot be written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k25_engines import engine_store
from k25_engines.engine_store import StagedEngine, install, reusable_engine, staging
from k25_engines.manifest import (
    MANIFEST_PATH,
    EngineEntry,
    EngineManifest,
    engine_manifest_from_json,
    read_engine_file,
    read_engine_manifest,
)
from k25_export.staging import is_alive
from k25_plugins.errors import InputError

Make = Callable[..., EngineEntry]


def staged(folder: Path, component: str, target: str = "sm120", content: bytes = b"engine") -> StagedEngine:
    """An engine as a child leaves it."""
    entry = engine_manifest_from_json(_TEXT.replace("COMPONENT", component).replace("TARGET", target)).engines[0]
    name = f"{component}.{target}.{content.decode()}"
    (folder / name).write_bytes(content)
    (folder / f"{name}.log").write_text("log")
    values = entry.__dict__ | {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return StagedEngine(entry=EngineEntry(**values), file=folder / name, log=folder / f"{name}.log")


_TEXT = (
    '{"format": "k25-engines", "schema_version": 1, "engines": [{"component": "COMPONENT", "target": "TARGET", '
    '"compute_capabilities": ["12.0"], "path": "engines/TARGET/COMPONENT.engine", "bytes": 1, '
    f'"sha256": "{"0" * 64}", "precision": "bf16", "portable": false, "flavour": "tensorrt-rtx", "version": "1", '
    '"inputs": [], "outputs": [], "aliases": {}, "profiles": [], "checks": {}, "component_sha256": {}, '
    f'"key": "{"1" * 64}", "build_seconds": 1, "peak_memory_bytes": 1, "log": "engines/TARGET/COMPONENT.log"}}]}}'
)


def test_engines_are_moved_in_and_recorded(tmp_path: Path) -> None:
    with staging(tmp_path) as folder:
        install(tmp_path, [staged(folder, "head"), staged(folder, "embed", "sm80")])
    manifest = read_engine_manifest(tmp_path)
    assert [entry.path for entry in manifest.engines] == ["engines/sm80/embed.engine", "engines/sm120/head.engine"]
    for entry in manifest.engines:
        assert read_engine_file(tmp_path, entry) == b"engine"
        assert (tmp_path / entry.log).read_text() == "log"
    assert sorted(path.name for path in (tmp_path / "engines").iterdir()) == ["engines.json", "sm120", "sm80"]


def test_engines_of_others_are_kept_and_the_same_is_replaced(tmp_path: Path) -> None:
    with staging(tmp_path) as folder:
        install(tmp_path, [staged(folder, "head"), staged(folder, "embed")])
        install(tmp_path, [staged(folder, "head", content=b"newer")])
    manifest = read_engine_manifest(tmp_path)
    assert read_engine_file(tmp_path, manifest.engine("head", "sm120")) == b"newer"
    assert read_engine_file(tmp_path, manifest.engine("embed", "sm120")) == b"engine"


def test_many_builders_at_once_lose_nothing(tmp_path: Path) -> None:
    names = [f"component{number}" for number in range(12)]
    errors: list[Exception] = []

    def build(name: str) -> None:
        try:
            with staging(tmp_path) as folder:
                install(tmp_path, [staged(folder, name), staged(folder, "shared", content=name.encode())])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=build, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    manifest = read_engine_manifest(tmp_path)
    assert sorted(entry.component for entry in manifest.engines) == sorted([*names, "shared"])
    for entry in manifest.engines:
        read_engine_file(tmp_path, entry)


@pytest.mark.parametrize("moves", range(4))
def test_a_kill_in_between_never_leaves_a_record_of_another_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """Stopped after any number of moves: what is recorded is there, byte for byte."""
    with staging(tmp_path) as folder:
        install(tmp_path, [staged(folder, "head"), staged(folder, "embed"), staged(folder, "other")])
        again = [staged(folder, "head", content=b"h2"), staged(folder, "embed", content=b"e2")]
        replace, count = Path.replace, 0

        def stop(self: Path, target: Any) -> Path:
            nonlocal count
            if self.parent == folder:
                if count == moves:
                    raise KeyboardInterrupt
                count += 1
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            install(tmp_path, again)
    manifest = read_engine_manifest(tmp_path)
    assert [entry.component for entry in manifest.engines] == ["other"]
    for entry in manifest.engines:
        read_engine_file(tmp_path, entry)


def test_what_killed_builders_left_is_removed(tmp_path: Path) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert not is_alive(str(done.pid))
    left = tmp_path / "engines" / f".partial-{done.pid}-abc"
    running = tmp_path / "engines" / f".partial-{os.getpid()}-abc"
    for folder in (left, running):
        folder.mkdir(parents=True)
        (folder / "sm120.engine").write_bytes(b"half")
    with staging(tmp_path):
        assert not left.exists()
        assert running.exists()


def test_nothing_is_left_of_a_build_that_failed(tmp_path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), staging(tmp_path) as folder:
        (folder / "x").write_bytes(b"half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("a file")
    with pytest.raises(InputError, match=r"engines: cannot be written"), staging(tmp_path):
        pass
    (tmp_path / "engines").unlink()
    with staging(tmp_path) as folder:
        engine = staged(folder, "head")
        (tmp_path / "engines" / "sm120").write_text("a file")
        with pytest.raises(InputError, match=r"engines: cannot be written"):
            install(tmp_path, [engine])
    assert not (tmp_path / MANIFEST_PATH).exists()


def test_a_damaged_record_is_not_overwritten(tmp_path: Path) -> None:
    with staging(tmp_path) as folder:
        (tmp_path / MANIFEST_PATH).write_text("{")
        with pytest.raises(InputError, match=r"engines\.json"):
            install(tmp_path, [staged(folder, "head")])
    assert (tmp_path / MANIFEST_PATH).read_text() == "{"


def test_an_engine_is_reused_where_key_and_file_are_the_same(tmp_path: Path) -> None:
    with staging(tmp_path) as folder:
        known = install(tmp_path, [staged(folder, "head")])
    key = "1" * 64
    assert reusable_engine(tmp_path, known, component="head", target="sm120", key=key) == known.engines[0]
    assert reusable_engine(tmp_path, known, component="head", target="sm80", key=key) is None
    assert reusable_engine(tmp_path, known, component="head", target="sm120", key="2" * 64) is None
    assert reusable_engine(tmp_path, EngineManifest(), component="head", target="sm120", key=key) is None
    place = tmp_path / known.engines[0].path
    place.write_bytes(b"enginE")
    assert reusable_engine(tmp_path, known, component="head", target="sm120", key=key) is None
    place.unlink()
    assert reusable_engine(tmp_path, known, component="head", target="sm120", key=key) is None
    assert engine_store.read_engine_manifest(tmp_path) == known
