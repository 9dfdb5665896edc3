"""Which plugin creators TensorRT uses: ours in Python, or those of the shared library `plugins/` builds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from k25_engines.tensorrt_module import TensorRT
from k25_plugins import signatures, tensorrt_plugin_launch, tensorrt_plugin_rules, tensorrt_plugins
from k25_plugins.errors import InputError, mismatch
from k25_plugins.tensorrt_plugin_rules import NAMESPACE, PLUGIN_OPS, PLUGIN_VERSION

_SOURCES = (signatures, tensorrt_plugin_rules, tensorrt_plugins, tensorrt_plugin_launch)
_ELF = b"\x7fELF"


def plugin_source_sha256() -> str:
    """SHA-256 over the Python creators and the signature table that they follow."""
    digest = hashlib.sha256()
    for module in _SOURCES:
        assert module.__file__ is not None
        digest.update(f"{module.__name__}\0".encode())
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


def library_sha256(library: Path) -> str:
    """SHA-256 of a plugin library. Raises `InputError` where the file is none."""
    try:
        data = library.read_bytes()
    except OSError as error:
        raise InputError(f"plugin library {library}: {error.strerror}") from error
    if not data.startswith(_ELF):
        raise mismatch(f"plugin library {library}", expected="a shared library", found=f"{data[:4]!r}")
    return hashlib.sha256(data).hexdigest()


def register_plugins(tensorrt: TensorRT, library: Path | None, *, report: tensorrt_plugins.Report) -> list[Any]:
    """Register the creators of this library, or our own; keep the result alive. Raises `InputError`."""
    if library is None:
        return tensorrt_plugins.register_creators(tensorrt.module, report=report)
    library_sha256(library)
    registry = tensorrt.module.get_plugin_registry()
    handle = registry.load_library(str(library.resolve()))
    names = [signature.name for signature in PLUGIN_OPS]
    missing = [name for name in names if registry.get_creator(name, PLUGIN_VERSION, NAMESPACE) is None]
    if missing:
        where = f"plugin library {library}"
        raise mismatch(where, expected=f"creators of {', '.join(names)} in namespace {NAMESPACE}", found="others")
    return [handle]
