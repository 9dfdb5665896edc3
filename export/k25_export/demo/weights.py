"""Random values for demo tensors: a table of rules by name, and bytes that depend on (seed, name) only.

The values keep a random model lively: activations of order one, router choices spread over the experts, logits
of a few units. Everything is computed from raw PCG64 words with integer and single float32 operations, because
neither numpy's distributions nor a platform's `log` promise the same bits everywhere.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from k25_export.demo.layout import TensorSpec
from k25_plugins.int4 import GROUP_SIZE, float32_to_bfloat16

_CHUNK_ELEMENTS = 1 << 20
# A sum of four uniform 16-bit integers: mean 2 * 65535, variance 4 * (65536^2 - 1) / 12.
_SUM_MEAN = 2 * 65535
_SUM_STD = math.sqrt(4 * (65536**2 - 1) / 12)
# How many of 256 weights have the value -8, -7, ... 7: bell-shaped, as quantised weights are, and of mean zero. With
# all values equally often the mean is -0.5, and the all-ones direction grows from layer to layer until it drowns the
# rest.
_INT4_COUNTS = (3, 4, 7, 10, 15, 20, 25, 29, 29, 29, 25, 20, 15, 12, 7, 6)
_NIBBLE_OF_BYTE = np.repeat(np.arange(16, dtype=np.uint8), _INT4_COUNTS)
_OCTET_OF_PAIR = (_NIBBLE_OF_BYTE[None, :] | (_NIBBLE_OF_BYTE[:, None] << 4)).reshape(-1)
_INT4_MEAN_SQUARE = sum(count * q * q for count, q in zip(_INT4_COUNTS, range(-8, 8), strict=True)) / 256
# Mean square of a uniform factor in [0.5, 1.5).
_FACTOR_MEAN_SQUARE = 1 + 1 / 12

_Values = npt.NDArray[Any]
_Fill = Callable[[np.random.PCG64, int, tuple[int, ...]], _Values]


def tensor_bytes(spec: TensorSpec, *, seed: int) -> Iterator[bytes]:
    """The little-endian data of a tensor, in pieces of at most 4 MiB, always the same for (seed, name, shape)."""
    if spec.constant:
        yield _ENCODERS[spec.dtype](np.array(spec.constant))
        return
    digest = hashlib.sha256(f"k25-demo/{seed}/{spec.name}".encode()).digest()
    generator = np.random.PCG64(int.from_bytes(digest[:16], "little"))
    fill = _fill_for(spec.name)
    total = math.prod(spec.shape)
    for start in range(0, total, _CHUNK_ELEMENTS):
        values = fill(generator, min(_CHUNK_ELEMENTS, total - start), spec.shape)
        yield _ENCODERS[spec.dtype](values)


def _fill_for(name: str) -> _Fill:
    for pattern, fill in _RULES:
        if pattern.search(name):
            return fill
    raise AssertionError(f"no rule for the values of {name}")


def _gaussian(generator: np.random.PCG64, count: int, *, mean: float, std: float) -> npt.NDArray[np.float32]:
    """About N(mean, std), cut at 3.46 std: the sum of four uniform integers (Irwin-Hall)."""
    raw = generator.random_raw(count).astype("<u8", copy=False).view("<u2").reshape(count, 4)
    total = raw[:, 0].astype(np.int32)
    for column in (1, 2, 3):
        total += raw[:, column]
    total -= _SUM_MEAN
    return total.astype(np.float32) * np.float32(std / _SUM_STD) + np.float32(mean)


def _constant_spread(mean: float, std: float) -> _Fill:
    return lambda generator, count, shape: _gaussian(generator, count, mean=mean, std=std)


def _linear(gain: float) -> _Fill:
    """Std `gain / sqrt(fan_in)`, where fan_in is every axis but the first."""

    def fill(generator: np.random.PCG64, count: int, shape: tuple[int, ...]) -> _Values:
        return _gaussian(generator, count, mean=0.0, std=gain / math.sqrt(math.prod(shape[1:])))

    return fill


def _packed_words(generator: np.random.PCG64, count: int, shape: tuple[int, ...]) -> _Values:
    """int32 words of eight nibbles drawn from `_INT4_COUNTS`: every value -8..7 is used."""
    pairs = generator.random_raw(count).astype("<u8", copy=False).view("<u2")
    words: npt.NDArray[np.int32] = _OCTET_OF_PAIR[pairs].view("<i4")
    return words


def _group_scales(generator: np.random.PCG64, count: int, shape: tuple[int, ...]) -> _Values:
    """Positive scales, spread by a factor of three, that give dequantised weights a std of 1 / sqrt(fan_in)."""
    fan_in = shape[1] * GROUP_SIZE
    typical = 1 / math.sqrt(fan_in * _INT4_MEAN_SQUARE * _FACTOR_MEAN_SQUARE)
    uniform = (generator.random_raw(count) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return (uniform + np.float32(0.5)) * np.float32(typical)


_RULES: tuple[tuple[re.Pattern[str], _Fill], ...] = tuple(
    (re.compile(pattern), fill)
    for pattern, fill in (
        (r"\.weight_packed$", _packed_words),
        (r"\.weight_scale$", _group_scales),
        (r"\.e_score_correction_bias$", _constant_spread(0.0, 0.05)),
        (r"norm\d?\.weight$", _constant_spread(1.0, 0.1)),
        (r"\.bias$", _constant_spread(0.0, 0.05)),
        (r"\.embed_tokens\.weight$", _constant_spread(0.0, 1.0)),
        (r"\.pos_emb\.weight$", _constant_spread(0.0, 0.5)),
        (r"\.lm_head\.weight$", _linear(2.0)),
        # What is added to the residual stream is kept smaller, so that it grows slowly with depth.
        (r"\.(o_proj|down_proj|wo|mlp\.fc1)\.weight$", _linear(0.5)),
        (r"\.weight$", _linear(1.0)),
    )
)


def _bfloat16_bytes(values: _Values) -> bytes:
    return float32_to_bfloat16(values).astype("<u2", copy=False).tobytes()


_ENCODERS: dict[str, Callable[[_Values], bytes]] = {
    "BF16": _bfloat16_bytes,
    "F32": lambda values: values.astype("<f4", copy=False).tobytes(),
    "I32": lambda values: values.astype("<i4", copy=False).tobytes(),
}
