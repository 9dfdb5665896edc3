"""The one place that knows TensorRT's import names: `tensorrt_rtx` or `tensorrt` (enterprise 11.x), one thin object."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k25_engines.manifest import Flavour
from k25_engines.targets import TENSORRT, TENSORRT_RTX, Target
from k25_plugins.errors import BackendMissingError

LIBRARY_PATH = "LD_LIBRARY_PATH"


@dataclass(frozen=True, kw_only=True)
class _Package:
    """What is known of a flavour: names, the versions that were tried, the library that its parser asks for by name."""

    module: str
    distribution: str
    versions: tuple[str, ...]
    install: str
    libraries: str
    library: str


_PACKAGES: Mapping[Flavour, _Package] = {
    TENSORRT_RTX: _Package(
        module="tensorrt_rtx",
        distribution="tensorrt_rtx",
        versions=("1.7.",),
        install="pip install 'tensorrt-rtx==1.7.1.116'",
        libraries="tensorrt_rtx_libs",
        library="libtensorrt_rtx.so",
    ),
    TENSORRT: _Package(
        module="tensorrt",
        distribution="tensorrt",
        versions=("11.",),
        install="pip install 'tensorrt>=11,<12'",
        libraries="tensorrt_libs",
        library="libnvinfer.so",
    ),
}


@dataclass(frozen=True, kw_only=True)
class InstalledTensorRT:
    """A TensorRT that is installed, not yet imported."""

    flavour: Flavour
    version: str


@dataclass(frozen=True, kw_only=True)
class TensorRT:
    """An imported TensorRT: `module` is its Python module, whose API both flavours share but for what is here."""

    module: Any
    flavour: Flavour
    version: str

    @property
    def has_targets(self) -> bool:
        """Whether it builds for compute capabilities that are set; otherwise for the GPU of this machine."""
        return hasattr(self.module, "ComputeCapability")

    def set_target(self, config: Any, target: Target) -> None:
        """Make the builder configuration build for this target. Raises `BackendMissingError` where it has none."""
        if not self.has_targets:
            return
        capability = getattr(self.module.ComputeCapability, target.name.upper(), None)
        if capability is None:
            raise BackendMissingError(f"target {target.name}: {self.flavour} {self.version} has no such target")
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)

    def dtype_name(self, dtype: Any) -> str:
        """The name that the manifest uses for a TensorRT dtype, or TensorRT's own."""
        for name in ("float32", "bfloat16", "int32", "int64"):
            if dtype == getattr(self.module, name):
                return name
        return str(dtype)


def installed_tensorrt(flavour: Flavour | None = None) -> InstalledTensorRT:
    """The TensorRT of this flavour, or whichever is installed, RTX first. Nothing is imported.

    Raises `BackendMissingError` with the install line where there is none, or none of a version that was tried.
    """
    flavours = tuple(_PACKAGES) if flavour is None else (flavour,)
    for candidate in flavours:
        version = _installed_version(_PACKAGES[candidate])
        if version is not None:
            _require_version(candidate, version)
            return InstalledTensorRT(flavour=candidate, version=version)
    names = " or ".join(flavours)
    raise BackendMissingError(f"this needs {names}, which is not installed: {_PACKAGES[flavours[0]].install}")


def load_tensorrt(flavour: Flavour | None = None) -> TensorRT:
    """Import TensorRT. Raises `BackendMissingError` where it is not there or cannot be loaded."""
    installed = installed_tensorrt(flavour)
    package = _PACKAGES[installed.flavour]
    try:
        module = importlib.import_module(package.module)
    except (ImportError, OSError, FileNotFoundError) as error:
        raise BackendMissingError(
            f"{installed.flavour} {installed.version} is installed and cannot be loaded: {error}. Try {package.install}"
        ) from error
    return TensorRT(module=module, flavour=installed.flavour, version=str(module.__version__))


def device_compute_capability() -> str | None:
    """The compute capability of the first GPU of this machine, through the driver; None without one."""
    with contextlib.suppress(OSError, AttributeError):
        cuda = ctypes.CDLL("libcuda.so.1")
        device, values = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
        if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
            return None
        for attribute, value in zip(
            (75, 76), values, strict=True
        ):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
                return None
        return f"{values[0].value}.{values[1].value}"
    return None


def parser_library_is_found(installed: InstalledTensorRT, environment: Mapping[str, str]) -> bool:
    """Whether the ONNX parser will find TensorRT's library under its plain name.

    It loads it when it meets a plugin node. The pip package has the versioned name only, and where it is not found
    the process is ended, with no error that could be caught.
    """
    folder = _library_folder(installed)
    if folder is None:
        return True  # not from pip: the system's loader knows its libraries
    places = [folder, *map(Path, filter(None, environment.get(LIBRARY_PATH, "").split(os.pathsep)))]
    return any(os.path.lexists(place / _PACKAGES[installed.flavour].library) for place in places)


def parser_environment(installed: InstalledTensorRT, scratch: Path) -> dict[str, str]:
    """What a child's environment must have so that the ONNX parser finds its library; `scratch` gets a link.

    The installed package is left as it is. Nothing, where nothing is missing.
    """
    if parser_library_is_found(installed, os.environ):
        return {}
    folder = _library_folder(installed)
    assert folder is not None
    _link_library(installed, folder, scratch)
    known = os.environ.get(LIBRARY_PATH)
    return {LIBRARY_PATH: str(scratch) + (f"{os.pathsep}{known}" if known else "")}


def repair_parser_library(installed: InstalledTensorRT) -> None:
    """Put the missing link into the installed package, for tools that parse in their own process (Polygraphy).

    Raises `BackendMissingError` with the line that helps where the package cannot be written.
    """
    folder = _library_folder(installed)
    if folder is None or parser_library_is_found(installed, os.environ):
        return
    try:
        _link_library(installed, folder, folder)
    except OSError as error:
        package = _PACKAGES[installed.flavour]
        raise BackendMissingError(
            f"{folder}: cannot be written ({error.strerror}), and {package.library} is missing there. Make the link "
            f"elsewhere: mkdir -p ~/.cache/k25-export/lib; ln -s {_versioned(folder, package.library)} "
            f"~/.cache/k25-export/lib/{package.library}; export {LIBRARY_PATH}=~/.cache/k25-export/lib"
        ) from error


def _link_library(installed: InstalledTensorRT, folder: Path, place: Path) -> None:
    name = _PACKAGES[installed.flavour].library
    with contextlib.suppress(FileExistsError):
        (place / name).symlink_to(_versioned(folder, name))


def _versioned(folder: Path, library: str) -> Path:
    return next(iter(sorted(folder.glob(f"{library}.*"))), folder / f"{library}.1")


def _library_folder(installed: InstalledTensorRT) -> Path | None:
    spec = importlib.util.find_spec(_PACKAGES[installed.flavour].libraries)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _installed_version(package: _Package) -> str | None:
    try:
        if importlib.util.find_spec(package.module) is None:
            return None
    except ValueError:  # sys.modules has None for it
        return None
    try:
        return importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return str(importlib.import_module(package.module).__version__)  # not from pip


def _require_version(flavour: Flavour, version: str) -> None:
    package = _PACKAGES[flavour]
    if not version.startswith(package.versions):
        wanted = " or ".join(f"{prefix}x" for prefix in package.versions)
        raise BackendMissingError(f"{flavour} {version} was never tried; this needs {wanted}: {package.install}")
