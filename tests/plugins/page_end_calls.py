"""Run by test_native_page_ends: kernels on weights that end where memory may not be read. A fault ends this process."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from k25_plugins.native_calls import call_native
from k25_plugins.native_library import ISAS, native_library

Array = npt.NDArray[Any]
PAGE = mmap.PAGESIZE
PROT_NONE = 0
KEPT: list[mmap.mmap] = []


def at_the_end(values: Array, shift: int = 0) -> Array:
    """A copy of the array whose last byte is `shift` bytes before a page that may not be read."""
    room = -(-(values.nbytes + shift) // PAGE) * PAGE
    memory = mmap.mmap(-1, room + PAGE)
    KEPT.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start + room), ctypes.c_size_t(PAGE), PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    begin = room - shift - values.nbytes
    found: Array = np.frombuffer(memory, values.dtype, values.size, begin).reshape(values.shape)
    found[...] = values
    return found


def call_linear(isa: Any, tokens: int, out: int, width: int, shift: int) -> Array:
    x = np.linspace(-1, 1, tokens * width, dtype=np.float32).reshape(tokens, width)
    weight = np.full((out, width), 0x3F80, np.uint16)  # ones
    library = native_library()
    assert library is not None
    return call_native(library, "Linear", [x, at_the_end(weight, shift)], {}, mode="fast", isa=isa)[0]


def call_experts(isa: Any, tokens: int, hidden: int, width: int, shift: int) -> Array:
    """One expert; the words of down are the last of the region, behind all scales."""
    words, scales = hidden * width // 8 * 4, hidden * width // 32 * 2
    rows = np.cumsum([0, scales, scales, scales, words, words]) // 8
    table = np.array([[rows[3], rows[0], rows[4], rows[1], rows[5], rows[2]]], np.int64)
    region = np.full(3 * (words + scales), 0x3C, np.uint8)
    placed = at_the_end(region, shift)
    x = np.linspace(-1, 1, tokens * hidden, dtype=np.float32).reshape(tokens, hidden)
    ids, weights = np.zeros((tokens, 1), np.int32), np.ones((tokens, 1), np.float32)
    inputs = [x, ids, weights, placed.view(np.int32).reshape(-1, 2), placed.view(np.uint16).reshape(-1, 4), table]
    library = native_library()
    assert library is not None
    attributes = {"intermediate_size": width, "group_size": 32}
    return call_native(library, "MoEDispatch", inputs, attributes, mode="fast", isa=isa)[0]


def main() -> None:
    library = native_library()
    assert library is not None
    for isa in ISAS[1:]:
        if not library.supports(isa):
            continue
        for shift in (0, 2, 8, 24, 62):
            for tokens, out, width in ((1, 1, 1), (1, 5, 33), (1, 70, 256), (1, 3, 1024), (3, 5, 544), (9, 33, 95)):
                call_linear(isa, tokens, out, width, shift)
            if shift % 8 == 0:
                for tokens, hidden, width in ((1, 64, 32), (1, 1024, 128), (1, 32, 2048), (3, 96, 160), (9, 128, 512)):
                    call_experts(isa, tokens, hidden, width, shift)
    print("read nothing behind")


if __name__ == "__main__":
    sys.exit(main())
