"""How fast this machine reads memory: the mark for everything that streams weights."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from k25_plugins.native_library import NativeLibrary
from k25_runtime.cores import usable_cores

#: Far past any cache.
PROBE_BYTES = 2**29


class ReadBandwidth:
    """Reads the same `size` bytes of memory, once a call, with all cores and with one: whichever is faster counts.

    `how` says with what: the native library's vector loads, or numpy's reductions in threads, which may reach less.
    """

    def __init__(self, library: NativeLibrary | None, *, size: int = PROBE_BYTES) -> None:
        self._data: npt.NDArray[np.int64] = np.ones(size // 8, np.int64)
        self._threads = sorted({1, usable_cores()})
        self._read: Any = getattr(library.handle, "k25_read_bandwidth", None) if library is not None else None
        if self._read is not None:
            self._read.restype = ctypes.c_double
            self._read.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32)
        self.how = "numpy" if self._read is None else "the native library"

    def __call__(self) -> float:
        """Bytes a second."""
        return max(self._with_threads(count) for count in self._threads)

    def _with_threads(self, count: int) -> float:
        if self._read is not None:
            return float(self._read(self._data.ctypes.data, self._data.nbytes, count))
        parts = np.array_split(self._data, count)
        threads = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self._data.nbytes / (time.perf_counter() - started)
