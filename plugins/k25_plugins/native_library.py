"""The native library (`plugins/core/k25.h`): where it is, and its C interface through ctypes.

`native_library()` is None where there is none, and says once how to get it; `K25_NATIVE=off` does without it, silently.
Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from k25_plugins.errors import InputError

#: K25_ABI_VERSION of the header that this file was written for.
ABI_VERSION = 4

#: `off` runs the function bodies even where the library is there; `on` (the default) or a path of a library.
NATIVE_VARIABLE = "K25_NATIVE"

LIBRARY = Path(__file__).resolve().parent / "native" / "libk25_ops.so"

Mode = Literal["fast", "exact"]
Isa = Literal["best", "portable", "avx2", "avx512", "avx512_bf16"]
MODES: tuple[Mode, ...] = get_args(Mode)
ISAS: tuple[Isa, ...] = get_args(Isa)


class Tensor(ctypes.Structure):
    """`k25_tensor`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 8),
    )


class Message(ctypes.Structure):
    """`k25_message`."""

    _fields_ = (("text", ctypes.c_char_p), ("capacity", ctypes.c_size_t))


class MlaAttributes(ctypes.Structure):
    """`k25_mla_attributes`."""

    _fields_ = (
        ("num_heads", ctypes.c_int64),
        ("qk_nope_head_dim", ctypes.c_int64),
        ("v_head_dim", ctypes.c_int64),
        ("softmax_scale", ctypes.c_float),
        ("inv_freq", ctypes.POINTER(ctypes.c_float)),
        ("inv_freq_count", ctypes.c_int64),
    )


class MoeDispatchAttributes(ctypes.Structure):
    """`k25_moe_dispatch_attributes`."""

    _fields_ = (("intermediate_size", ctypes.c_int64), ("group_size", ctypes.c_int64))


class VisionAttentionAttributes(ctypes.Structure):
    """`k25_vision_attention_attributes`."""

    _fields_ = (("num_heads", ctypes.c_int64), ("softmax_scale", ctypes.c_float))


class RmsNormAttributes(ctypes.Structure):
    """`k25_rms_norm_attributes`."""

    _fields_ = (("eps", ctypes.c_float),)


class RouterAttributes(ctypes.Structure):
    """`k25_router_attributes`."""

    _fields_ = (("top_k", ctypes.c_int64), ("normalise", ctypes.c_int64), ("scaling_factor", ctypes.c_float))


Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
Run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, Task, ctypes.c_void_p, ctypes.c_size_t)


class Parallel(ctypes.Structure):
    """`k25_parallel`."""

    _fields_ = (("run", Run), ("context", ctypes.c_void_p), ("threads", ctypes.c_int32))


class CpuOptions(ctypes.Structure):
    """`k25_cpu_options`."""

    _fields_ = (("mode", ctypes.c_int), ("isa", ctypes.c_int), ("parallel", ctypes.POINTER(Parallel)))


@dataclass(frozen=True)
class NativeLibrary:
    """A loaded library. `handle` has every function of the C interface."""

    path: Path
    handle: ctypes.CDLL

    @property
    def version(self) -> str:
        """Its version and how it was built."""
        text: bytes = self.handle.k25_version()
        return text.decode()

    @property
    def isa(self) -> Isa:
        """The code path that it takes on this machine."""
        isa: Isa = ISAS[self.handle.k25_isa_best()]
        return isa

    def supports(self, isa: Isa) -> bool:
        """Whether this machine, and this build, have a code path."""
        return bool(self.handle.k25_isa_supported(ISAS.index(isa)))

    @contextlib.contextmanager
    def settings_of_sessions(self, *, mode: Mode, threads: int) -> Iterator[None]:
        """Mode and threads of the ONNX Runtime sessions that this thread makes inside."""
        before = self.handle.k25_session_mode(), self.handle.k25_session_threads()
        self.set_session_mode(mode)
        self.set_session_threads(threads)
        try:
            yield
        finally:
            self.handle.k25_set_session_mode(before[0])
            self.handle.k25_set_session_threads(before[1])

    def set_session_mode(self, mode: Mode) -> None:
        """The mode of the ONNX Runtime sessions that this thread makes from now on."""
        self.handle.k25_set_session_mode(MODES.index(mode))

    def set_session_threads(self, threads: int) -> None:
        """The threads of the ONNX Runtime sessions that this thread makes from now on: 0 for those of the session.

        Others are the library's own, the same for all sessions, and stay awake for a moment between operators.
        """
        self.handle.k25_set_session_threads(threads)


def load_library(path: Path) -> NativeLibrary:
    """Load a library; `InputError` where it cannot be, or is of another interface."""
    try:
        handle = ctypes.CDLL(str(path))
        found = handle.k25_abi_version()
    except (OSError, AttributeError) as error:
        raise InputError(f"native library {path}: cannot be loaded: {error}. Build it again: make setup") from error
    if found != ABI_VERSION:
        raise InputError(
            f"native library {path}: expected version {ABI_VERSION} of its interface, found {found}. "
            "Build it again: make setup"
        )
    handle.k25_version.restype = ctypes.c_char_p
    return NativeLibrary(path, handle)


def native_library() -> NativeLibrary | None:
    """The library, or None: without it every operator runs from its function body."""
    return _found(os.environ.get(NATIVE_VARIABLE, "on"))


@functools.cache
def _found(setting: str) -> NativeLibrary | None:
    if setting == "off":
        return None
    path = LIBRARY if setting in ("", "on") else Path(setting)
    if not path.is_file():
        if path != LIBRARY:
            raise InputError(f"{NATIVE_VARIABLE}={setting}: expected off, on or the path of a library, found no file")
        _warn(f"no native library at {path}")
        return None
    try:
        return load_library(path)
    except InputError as error:
        if path != LIBRARY:
            raise
        _warn(str(error))
        return None


def _warn(why: str) -> None:
    print(
        f"k25: {why}; the operators run from their function bodies, many times slower. To get the fast path, with a "
        f"C++ compiler and cmake: make setup, or sh scripts/native.sh. To silence this: {NATIVE_VARIABLE}=off",
        file=sys.stderr,
    )
