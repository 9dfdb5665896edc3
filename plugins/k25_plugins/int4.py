"""INT4 `pack-quantized` words, in numpy: the storage of the routed experts.

A row of `in` columns is `in / 8` little-endian int32 words; column j is nibble `j % 8` of word `j // 8`, least
significant nibble first. A stored nibble is q + 8 with q in -8..7, and a weight is exactly
`(nibble - 8) * scale[row, j // group_size]` in float32 (compressed-tensors, format `pack-quantized`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

NIBBLES_PER_WORD = 8
GROUP_SIZE = 32
ZERO_POINT = 8


def pack_int4(values: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    """Integers in -8..7, shape [..., in] with `in` a multiple of 8, as int32 words [..., in / 8].

    Raises `ValueError` for a value outside the range or a width that is no multiple of 8.
    """
    if values.shape[-1] % NIBBLES_PER_WORD:
        raise ValueError(f"expected a multiple of {NIBBLES_PER_WORD} columns, found shape {values.shape}")
    if values.size and (values.min() < -ZERO_POINT or values.max() >= ZERO_POINT):
        raise ValueError(f"expected values in -8..7, found {values.min()}..{values.max()}")
    nibbles = (values + ZERO_POINT).astype(np.uint8)
    pairs = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return np.ascontiguousarray(pairs).view("<i4").astype(np.int32, copy=False)


def unpack_int4(words: npt.NDArray[np.int32]) -> npt.NDArray[np.int8]:
    """The inverse of `pack_int4`: int32 words [..., n] as int8 values in -8..7, [..., 8 n]."""
    octets = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
    values = np.empty((*octets.shape[:-1], octets.shape[-1] * 2), np.int8)
    values[..., 0::2] = octets & 15
    values[..., 1::2] = octets >> 4
    values -= ZERO_POINT
    return values


def dequantize_int4(
    words: npt.NDArray[np.int32], scales: npt.NDArray[np.float32], *, group_size: int = GROUP_SIZE
) -> npt.NDArray[np.float32]:
    """int32 words [out, in / 8] and float32 scales [out, in / group_size] as float32 weights [out, in]."""
    values = unpack_int4(words).astype(np.float32)
    return values * np.repeat(scales, group_size, axis=-1)


def bfloat16_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bfloat16 given as its 16 bits, as float32 (exact)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """float32 as the 16 bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)
