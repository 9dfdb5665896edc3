"""Calls of the native library's C interface on numpy arrays, for tests."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from k25_plugins.native_library import (
    ISAS,
    LIBRARY,
    MODES,
    CpuOptions,
    Isa,
    Message,
    Mode,
    NativeLibrary,
    Parallel,
    Run,
    Tensor,
    native_library,
)
from k25_plugins.signatures import ONNX_DTYPES

Array = npt.NDArray[Any]
REASON = f"the native library is not built ({LIBRARY.name}): run sh scripts/native.sh"
#: K25_NATIVE may name another one (scripts/sanitize.sh does).
LIBRARY_OR_NONE: NativeLibrary | None = native_library()
#: Code paths of this machine.
PATHS: tuple[Isa, ...] = tuple(isa for isa in ISAS[1:] if LIBRARY_OR_NONE is not None and LIBRARY_OR_NONE.supports(isa))
OK, INVALID, UNAVAILABLE = 0, 1, 2


@dataclass(frozen=True)
class Named:
    """An array and its dtype; bfloat16 as its bits."""

    array: Array
    dtype: str


def bfloat16_bits(values: Array) -> npt.NDArray[np.uint16]:
    """float32 to the nearest bfloat16, ties to even, as bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bfloat16_values(bits: Array) -> npt.NDArray[np.float32]:
    """Exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def named(values: Array, dtype: str) -> Named:
    """float32 values in a float dtype."""
    return Named(bfloat16_bits(values) if dtype == "bfloat16" else np.ascontiguousarray(values, np.float32), dtype)


def values_of(tensor: Named) -> npt.NDArray[np.float32]:
    """As float32."""
    return bfloat16_values(tensor.array) if tensor.dtype == "bfloat16" else tensor.array


def described(tensor: Named) -> Tensor:
    """The `k25_tensor` of an array, which must stay alive."""
    array = tensor.array
    assert array.flags.c_contiguous
    found = Tensor(data=array.ctypes.data, dtype=ONNX_DTYPES.get(tensor.dtype, 10), rank=array.ndim)
    for axis, size in enumerate(array.shape[:8]):
        found.dims[axis] = size
    return found


def run_on_threads(count: int) -> Parallel:
    """A `k25_parallel` of `count` threads that take tasks in turn, the last task first."""

    def run(context: Any, task: Any, state: Any, tasks: int) -> None:
        left = list(range(tasks))

        def work() -> None:
            while True:
                try:
                    index = left.pop()
                except IndexError:
                    return
                task(state, index)

        threads = [threading.Thread(target=work) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return Parallel(run=Run(run))


def own_threads(count: int) -> Parallel:
    """A `k25_parallel` of `count` threads of the library's own."""
    return Parallel(Run(), None, count)


def call(
    op: str,
    inputs: list[Named],
    outputs: list[Named],
    attributes: Any = None,
    *,
    mode: Mode = "fast",
    isa: Isa = "best",
    threads: int | Parallel = 1,
    library: NativeLibrary | None = None,
) -> tuple[int, str]:
    """`k25_<op>_cpu`: its status and message."""
    library = library or LIBRARY_OR_NONE
    assert library is not None
    parallel = threads if isinstance(threads, Parallel) else run_on_threads(threads) if threads > 1 else None
    options = CpuOptions(MODES.index(mode), ISAS.index(isa), ctypes.pointer(parallel) if parallel else None)
    text = ctypes.create_string_buffer(512)
    arguments: list[Any] = [(Tensor * len(inputs))(*map(described, inputs))]
    if attributes is not None:
        arguments.append(ctypes.byref(attributes))
    arguments += [(Tensor * len(outputs))(*map(described, outputs)), ctypes.byref(options)]
    message = Message(ctypes.cast(text, ctypes.c_char_p), len(text))
    status = getattr(library.handle, f"k25_{op}_cpu")(*arguments, message)
    return status, text.value.decode()
