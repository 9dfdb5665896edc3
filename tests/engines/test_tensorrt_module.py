"""Which TensorRT is there, and the link that pip's package lacks: nothing installed is changed behind one's back."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from engine_helpers import needs_tensorrt

from k25_engines import tensorrt_module
from k25_engines.messages import ERROR, INFO, WARNING, MessageLog, error_recorder_for
from k25_engines.targets import TARGETS, TENSORRT, TENSORRT_RTX
from k25_engines.tensorrt_module import (
    InstalledTensorRT,
    TensorRT,
    installed_tensorrt,
    load_tensorrt,
    parser_environment,
    parser_library_is_found,
    repair_parser_library,
)
from k25_plugins.errors import BackendMissingError

RTX = InstalledTensorRT(flavour=TENSORRT_RTX, version="1.7.1.116")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library folder as pip leaves it."""
    folder = tmp_path / "tensorrt_rtx_libs"
    folder.mkdir()
    (folder / "libtensorrt_rtx.so.1").write_bytes(b"library")
    monkeypatch.setattr(tensorrt_module, "_library_folder", lambda installed: folder)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    return folder


def test_the_link_goes_into_a_folder_of_ours(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert not parser_library_is_found(RTX, {})
    monkeypatch.setenv("LD_LIBRARY_PATH", "/somewhere")
    environment = parser_environment(RTX, scratch)
    assert environment == {"LD_LIBRARY_PATH": f"{scratch}{os.pathsep}/somewhere"}
    assert (scratch / "libtensorrt_rtx.so").read_bytes() == b"library"
    assert [path.name for path in package.iterdir()] == ["libtensorrt_rtx.so.1"]
    assert parser_library_is_found(RTX, environment)
    monkeypatch.setenv("LD_LIBRARY_PATH", environment["LD_LIBRARY_PATH"])
    assert parser_environment(RTX, scratch) == {}


def test_tools_that_parse_themselves_get_it_in_the_package(package: Path) -> None:
    repair_parser_library(RTX)
    repair_parser_library(RTX)
    assert (package / "libtensorrt_rtx.so").resolve() == package / "libtensorrt_rtx.so.1"
    assert parser_environment(RTX, package) == {}


def test_where_the_package_cannot_be_written_the_way_out_is_told(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(BackendMissingError, match=r"Permission denied.*ln -s .*rtx\.so\.1.*LD_LIBRARY_PATH"):
        repair_parser_library(RTX)


def test_a_package_that_is_not_from_pip_needs_no_link(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tensorrt_module, "_library_folder", lambda installed: None)
    assert parser_environment(RTX, tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("versions", "flavour", "wanted"),
    [
        ({"tensorrt_rtx": "1.7.2", "tensorrt": "11.4.0.1"}, None, (TENSORRT_RTX, "1.7.2")),
        ({"tensorrt": "11.4.0.1"}, None, (TENSORRT, "11.4.0.1")),
        ({"tensorrt_rtx": "1.7.2", "tensorrt": "11.4.0.1"}, TENSORRT, (TENSORRT, "11.4.0.1")),
    ],
)
def test_the_one_that_is_there_is_taken(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], flavour: Any, wanted: tuple[str, str]
) -> None:
    monkeypatch.setattr(tensorrt_module, "_installed_version", lambda package: versions.get(package.module))
    found = installed_tensorrt(flavour)
    assert (found.flavour, found.version) == wanted


@pytest.mark.parametrize(
    ("module", "version"), [("tensorrt_rtx", "1.6.0"), ("tensorrt", "10.9.1"), ("tensorrt", "110.0")]
)
def test_versions_that_were_never_tried_are_refused(monkeypatch: pytest.MonkeyPatch, module: str, version: str) -> None:
    monkeypatch.setattr(
        tensorrt_module, "_installed_version", lambda package: version if package.module == module else None
    )
    with pytest.raises(BackendMissingError, match=rf"{version} was never tried; .*pip install"):
        installed_tensorrt()


def test_none_at_all_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendMissingError, match=r"pip install 'tensorrt-rtx==1\.7\.1\.116'"):
        installed_tensorrt()
    with pytest.raises(BackendMissingError, match="tensorrt, which is not installed: pip install 'tensorrt>=11,<12'"):
        load_tensorrt(TENSORRT)


def test_enterprise_has_no_targets_to_set() -> None:
    module: Any = SimpleNamespace()
    tensorrt = TensorRT(module=module, flavour=TENSORRT, version="11.4")
    assert not tensorrt.has_targets
    tensorrt.set_target(None, TARGETS["sm90"])


@needs_tensorrt
def test_the_module_is_loaded() -> None:
    tensorrt = load_tensorrt(TENSORRT_RTX)
    assert isinstance(tensorrt.module, ModuleType)
    assert tensorrt.version == installed_tensorrt(TENSORRT_RTX).version
    assert tensorrt.has_targets
    assert [tensorrt.dtype_name(getattr(tensorrt.module, name)) for name in ("bfloat16", "float32", "int64")] == [
        "bfloat16", "float32", "int64",
    ]  # fmt: skip
    assert tensorrt.dtype_name(tensorrt.module.int8) == "DataType.INT8"
    with pytest.raises(BackendMissingError, match="target sm90"):
        tensorrt.set_target(None, TARGETS["sm90"])


@needs_tensorrt
def test_the_error_recorder_has_the_real_message() -> None:
    trt = load_tensorrt(TENSORRT_RTX).module
    log = MessageLog()
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    recorder = error_recorder_for(trt, log)
    runtime.error_recorder = recorder
    assert runtime.deserialize_cuda_engine(b"no engine" * 100) is None
    assert recorder.num_errors() > 0
    assert "magicTag" in recorder.get_error_desc(0)
    assert "magicTag" in log.reason()


def test_messages_by_severity_without_noise() -> None:
    log = MessageLog()
    log.add(WARNING, "ModelImporter.cpp:1: A node named node_of_w already exists")
    log.add(WARNING, "ModelImporter.cpp:17: something odd")
    log.add(WARNING, "something odd")
    log.add(ERROR, "In f at x.cpp:1 (cudaError 35: CUDA driver version is insufficient)")
    log.add(INFO, "hello")
    assert log.texts(WARNING) == ("something odd",)
    assert log.texts(ERROR) == ()
    assert log.reason() == "TensorRT gave no reason"
    log.add(ERROR, "graph_jit.cpp:278: CHECK failed")
    assert log.reason() == "CHECK failed"
    log.clear()
    assert log.messages == []
