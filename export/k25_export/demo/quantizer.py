"""Routed experts to INT4: symmetric, one bf16 scale for each group of 32 columns, as `pack-quantized` stores them.

A group's scale is its largest magnitude / 7, rounded to bf16; a value is the nearest code, ties to even, in -8..7.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from k25_plugins.int4 import GROUP_SIZE, bfloat16_to_float32, float32_to_bfloat16, pack_int4

STEPS = 7


def quantize_int4(weight_OC: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint16]]:
    """float32 weights [O, C], C a multiple of 32, as words [O, C / 8] and bf16 bits of scales [O, C / 32].

    The inverse, up to half a step, is `k25_plugins.int4.dequantize_int4`; weights that it made come back as the same
    words and scales where each group holds a code of magnitude 7. Raises `ValueError` for another width and for values
    that are not finite.
    """
    if weight_OC.ndim != 2 or weight_OC.shape[1] % GROUP_SIZE:
        raise ValueError(f"expected shape [rows, a multiple of {GROUP_SIZE}], found {weight_OC.shape}")
    if not np.isfinite(weight_OC).all():
        raise ValueError("expected finite weights, found NaN or infinity")
    groups = weight_OC.reshape(weight_OC.shape[0], -1, GROUP_SIZE)
    scale_bits = float32_to_bfloat16(np.abs(groups).max(axis=-1) / np.float32(STEPS))
    scales = bfloat16_to_float32(scale_bits)
    steps = np.maximum(scales, np.finfo(np.float32).tiny)[..., None]
    codes = np.clip(np.rint(groups / steps), -STEPS - 1, STEPS).astype(np.int8)
    return pack_int4(codes.reshape(weight_OC.shape)), scale_bits
