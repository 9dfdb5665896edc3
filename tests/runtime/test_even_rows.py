"""Who uploads experts at multiples of 128 bytes promises the kernels that their rows are even."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from engine_bundles import bundle_with_engines
from fake_device import FakeDevice

from k25_plugins.errors import InputError
from k25_plugins.native_library import NativeLibrary
from k25_runtime import even_rows, tensorrt_engine
from k25_runtime.engine_opening import engine_backend_from_bundle


class Handle:
    """The C functions of a library with `kernels` GPU kernels, and what was promised to it."""

    def __init__(self, kernels: int) -> None:
        self.kernels = kernels
        self.promised: list[int] = []

    def k25_gpu_kernel_count(self) -> int:
        return self.kernels

    def k25_gpu_set_even_rows(self, is_even: int) -> None:
        self.promised.append(is_even)


@pytest.mark.parametrize("kernels", [0, 128])
def test_a_backend_of_engines_tells_a_native_library_that_has_kernels(
    kernels: int, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle: Any = Handle(kernels)
    monkeypatch.setattr(even_rows, "native_library", lambda: NativeLibrary(Path("libk25_ops.so"), handle))
    bundle = bundle_with_engines(exported.bundle, tmp_path)
    backend = engine_backend_from_bundle(bundle, device=FakeDevice(sessions={}))
    assert backend.expert_alignment is not None
    assert backend.expert_alignment % 16 == 0, "two rows of 8 bytes"
    backend.close()
    assert handle.promised == ([1] if kernels else [])


def test_without_a_native_library_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(even_rows, "native_library", lambda: None)
    even_rows.promise_even_rows()


def test_the_loader_tells_its_library_of_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, seen = Handle(128), []
    library = tmp_path / "libk25_tensorrt.so"
    monkeypatch.setenv(tensorrt_engine.LIBRARY_VARIABLE, str(library))
    monkeypatch.setattr(ctypes, "CDLL", lambda path: seen.append(path) or handle)
    monkeypatch.setattr(tensorrt_engine, "register_plugins", lambda tensorrt, path, report: [path])
    monkeypatch.setattr(tensorrt_engine, "_logger", lambda module, messages: None)
    tensorrt: Any = type("TensorRT", (), {"module": type("Module", (), {"Runtime": staticmethod(lambda _: object())})})
    tensorrt_engine.EngineLoader(tensorrt)
    assert seen == [str(library)]
    assert handle.promised == [1]


def test_a_library_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    library = tmp_path / "libk25_tensorrt.so"
    library.write_bytes(b"no library")
    with pytest.raises(InputError, match=r"libk25_tensorrt\.so: cannot be loaded"):
        even_rows.promise_even_rows_to(library)
