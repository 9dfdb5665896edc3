"""The folder of traced components: bounded, content-addressed, given by argument or environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from k25_export.component_cache import ComponentCache, cache_from_environment
from k25_export.manifest import Port
from k25_export.traced_component import TracedComponent
from k25_plugins.errors import InputError


def _component(size: int, fill: bytes = b"x") -> TracedComponent:
    port = Port(name="hidden", dtype="float32", shape=("tokens", 64))
    return TracedComponent(data=fill * size, inputs=(port,), outputs=(port, port))


def _refuse() -> TracedComponent:
    raise AssertionError("expected the cached component")


def test_what_is_kept_comes_back_equal(tmp_path: Path) -> None:
    made = ComponentCache(tmp_path / "a" / "b").component("key", lambda: _component(100, b"\n{"))
    cache = ComponentCache(tmp_path / "a" / "b")
    assert cache.component("key", _refuse) == made
    assert cache.hits == 1


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = ComponentCache(tmp_path, limit_bytes=3500)
    for number in range(3):
        cache.component(f"key-{number}", lambda: _component(800))
        os.utime(tmp_path / f"key-{number}.component", ns=(number, number))
    cache.component("key-0", _refuse)  # used: now the youngest
    cache.component("key-3", lambda: _component(800))
    kept = {path.stem for path in tmp_path.iterdir()}
    assert "key-1" not in kept
    assert {"key-0", "key-3"} <= kept
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3500


@pytest.mark.parametrize("damage", [b"", b"{}\n", b'{"sha256": 1}\nxx', b"\xff\n"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: bytes) -> None:
    cache = ComponentCache(tmp_path)
    cache.component("key", lambda: _component(10))
    (tmp_path / "key.component").write_bytes(damage)
    assert cache.component("key", lambda: _component(10)) == _component(10)
    assert cache.hits == 0
    assert cache.component("key", _refuse) == _component(10)


def test_the_environment_gives_folder_and_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_from_environment() is None
    monkeypatch.setenv("K25_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("K25_CACHE_LIMIT", "1kB")
    cache = cache_from_environment()
    assert cache is not None
    cache.component("big", lambda: _component(2000))
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setenv("K25_CACHE_LIMIT", "much")
    with pytest.raises(InputError, match="'much'"):
        cache_from_environment()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache .*file/cache: cannot be made"):
        ComponentCache(tmp_path / "file" / "cache")
