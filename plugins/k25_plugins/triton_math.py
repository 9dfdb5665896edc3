"""What the GPU kernels share: rounding, dots and the unpacking of INT4 words. Triton language.

`UP` is true only in Triton's interpreter, which truncates float32 to bfloat16 and cannot multiply bfloat16: there the
rounding is done by hand and operands of a dot are widened, which changes no value.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(x, dtype: tl.constexpr, UP: tl.constexpr):
    """float32 `x` as `dtype`, rounded to nearest even."""
    if UP and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, UP: tl.constexpr):
    """acc + a @ b with float32 sums."""
    if UP:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def unpacked_slice(words, scales, j: tl.constexpr, dtype: tl.constexpr, UP: tl.constexpr):
    """Nibble `j` of every word times its scale: `words` int32 and `scales` of one shape, the result in `dtype`.

    The value is (nibble - 8) * scale, rounded once. In bfloat16 0x4300 | n is 128 + n, so subtracting 136 is exact.
    """
    nibble = (words >> (4 * j)) & 15
    if UP or dtype != tl.bfloat16:
        value = rounded((nibble - 8).to(tl.float32) * scales.to(tl.float32), dtype, UP)
    else:
        value = ((nibble | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - 136.0) * scales
    return value
