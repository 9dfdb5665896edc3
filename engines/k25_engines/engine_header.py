"""The first bytes of a TensorRT-RTX engine, as seen in files built here. NVIDIA does not document them.

They serve sanity checks only: a file that is cut, damaged or built for another GPU is told from a good one before a
driver refuses it. Where a field is not as known, nothing is concluded.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from k25_plugins.errors import mismatch

MAGIC = b"vtrt"
HEADER_BYTES = 64
#: Bits of the mask, from engines that were built for one target each.
TARGET_BITS: Mapping[str, int] = {"sm75": 1, "sm80": 2, "sm86": 4, "sm89": 8, "sm120": 16, "sm121": 32}

_FIELDS = struct.Struct("<16xQ4B4xI28x")  # size at 16, version at 24, mask of targets at 32
assert _FIELDS.size == HEADER_BYTES


@dataclass(frozen=True, kw_only=True)
class EngineHeader:
    """The engine's length, the version of TensorRT-RTX (1, 7, 1, 116), the targets that the mask names."""

    bytes: int
    version: tuple[int, ...]
    targets: tuple[str, ...]
    mask: int


def header_from_bytes(data: bytes, *, where: str) -> EngineHeader:
    """The header of an engine. Raises `InputError` where this is none, or where bytes are missing."""
    if len(data) < HEADER_BYTES or data[: len(MAGIC)] != MAGIC:
        found = f"{len(data)} bytes that begin with {data[:4]!r}"
        raise mismatch(where, expected="a TensorRT-RTX engine", found=found)
    size, *version, mask = _FIELDS.unpack(data[:HEADER_BYTES])
    targets = tuple(name for name, bit in TARGET_BITS.items() if mask & bit)
    return EngineHeader(bytes=size, version=tuple(version), targets=targets, mask=mask)


def require_whole(header: EngineHeader, data: bytes, *, where: str) -> None:
    """Raise `InputError` where the engine has another length than its header says."""
    if len(data) != header.bytes:
        raise mismatch(where, expected=f"{header.bytes} bytes, as its header says", found=len(data))
