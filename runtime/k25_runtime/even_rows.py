"""Experts of an engine start at multiples of 128 bytes, so the GPU kernels with wide loads may run: tell the libraries.

The promise is one for a whole library; in this package only engines use its GPU kernels.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from k25_plugins.errors import InputError
from k25_plugins.gpu_launch import gpu_kernel_count, set_even_rows
from k25_plugins.native_library import native_library


def promise_even_rows() -> None:
    """Tell the native library, from which the plugins in Python launch; one without GPU kernels is left alone."""
    library = native_library()
    if library is not None and gpu_kernel_count(library):
        set_even_rows(library, is_even=True)


def promise_even_rows_to(plugins: Path) -> None:
    """Tell a library of plugin creators that TensorRT has loaded, if it has our kernels. Raises `InputError`."""
    try:
        handle = ctypes.CDLL(str(plugins.resolve()))
    except OSError as error:
        raise InputError(f"plugin library {plugins}: cannot be loaded: {error}") from error
    if hasattr(handle, "k25_gpu_set_even_rows"):
        handle.k25_gpu_set_even_rows(1)
