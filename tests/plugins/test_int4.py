"""INT4 words and bfloat16 bits, against integer arithmetic written out here and against torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from k25_plugins.int4 import bfloat16_to_float32, dequantize_int4, float32_to_bfloat16, pack_int4, unpack_int4

MIN_WORD, MAX_WORD = -(2**31), 2**31 - 1
EXTREME_WORDS = [MIN_WORD, MIN_WORD + 1, -1, 0, 1, MAX_WORD, -0x12345678, 0x7654321F]

words_arrays = hnp.arrays(
    np.int32,
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=5),
    elements=st.integers(MIN_WORD, MAX_WORD) | st.sampled_from(EXTREME_WORDS),
)
value_arrays = hnp.array_shapes(min_dims=1, max_dims=3, max_side=4).flatmap(
    lambda shape: hnp.arrays(np.int8, (*shape[:-1], 8 * shape[-1]), elements=st.integers(-8, 7))
)


def word_of(values: list[int]) -> int:
    """Eight values in -8..7 as one signed 32-bit word: value i in bits 4i..4i+3, offset by 8."""
    unsigned = sum((value + 8) << (4 * place) for place, value in enumerate(values))
    return unsigned - (1 << 32) if unsigned >= 1 << 31 else unsigned


def values_of(word: int) -> list[int]:
    return [((word % (1 << 32)) >> (4 * place)) % 16 - 8 for place in range(8)]


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("value", range(-8, 8))
def test_every_value_at_every_place_is_its_nibble(place: int, value: int) -> None:
    values = [0] * 8
    values[place] = value
    packed = pack_int4(np.array([values], np.int8))
    assert packed.dtype == np.int32
    assert packed.tolist() == [[word_of(values)]]
    assert unpack_int4(packed).tolist() == [values]


def test_columns_follow_the_bytes_of_the_file() -> None:
    # Byte b of a row holds column 2b in its low nibble and column 2b + 1 in its high nibble.
    values = np.arange(-8, 8, dtype=np.int8).reshape(1, 16)
    octets = pack_int4(values).astype("<i4").tobytes()
    assert list(octets) == [(2 * b) | ((2 * b + 1) << 4) for b in range(8)]


def test_last_nibble_sets_the_sign_of_the_word() -> None:
    assert pack_int4(np.array([[-8] * 7 + [0]], np.int8)).tolist() == [[MIN_WORD]]
    assert pack_int4(np.array([[7] * 7 + [-1]], np.int8)).tolist() == [[MAX_WORD]]
    assert pack_int4(np.array([[7] * 8], np.int8)).tolist() == [[-1]]
    assert pack_int4(np.array([[-8] * 8], np.int8)).tolist() == [[0]]


@settings(deadline=None)
@given(value_arrays)
def test_packing_is_word_by_word_and_comes_back(values: npt.NDArray[np.int8]) -> None:
    packed = pack_int4(values)
    assert packed.shape == (*values.shape[:-1], values.shape[-1] // 8)
    assert packed.ravel().tolist() == [word_of(group) for group in values.reshape(-1, 8).tolist()]
    assert unpack_int4(packed).dtype == np.int8
    np.testing.assert_array_equal(unpack_int4(packed), values)


@settings(deadline=None)
@given(words_arrays)
def test_any_word_unpacks_by_shifts_and_comes_back(words: npt.NDArray[np.int32]) -> None:
    values = unpack_int4(words)
    assert values.reshape(-1, 8).tolist() == [values_of(word) for word in words.ravel().tolist()]
    np.testing.assert_array_equal(pack_int4(values), words)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64])
def test_packing_takes_any_integer_dtype_and_layout(dtype: type[np.signedinteger]) -> None:
    values = np.arange(-8, 8, dtype=dtype).reshape(2, 8)
    strided = np.repeat(values, 2, axis=1)[:, ::2]
    assert not strided.flags.c_contiguous
    np.testing.assert_array_equal(pack_int4(strided), pack_int4(values.astype(np.int8)))
    np.testing.assert_array_equal(unpack_int4(pack_int4(values).T.copy().T), values)


@pytest.mark.parametrize("value", [-9, 8, 100, -128])
def test_values_that_do_not_fit_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=str(value)):
        pack_int4(np.array([[0] * 7 + [value]], np.int16))


@pytest.mark.parametrize("columns", [1, 7, 9, 20])
def test_widths_that_fill_no_word_are_refused(columns: int) -> None:
    with pytest.raises(ValueError, match=str(columns)):
        pack_int4(np.zeros((2, columns), np.int8))


@settings(deadline=None)
@given(
    words=hnp.arrays(np.int32, (3, 8), elements=st.integers(MIN_WORD, MAX_WORD)),
    scales=hnp.arrays(np.float32, (3, 2), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
)
def test_a_weight_is_exactly_nibble_minus_eight_times_its_scale(
    words: npt.NDArray[np.int32], scales: npt.NDArray[np.float32]
) -> None:
    weights = dequantize_int4(words, scales)
    assert weights.dtype == np.float32
    for row in range(3):
        columns = [value for word in words[row].tolist() for value in values_of(word)]
        expected = [np.float32(value) * scales[row, column // 32] for column, value in enumerate(columns)]
        assert weights[row].tolist() == expected


def test_scale_changes_exactly_at_the_group_boundary() -> None:
    words = pack_int4(np.ones((1, 64), np.int8))
    weights = dequantize_int4(words, np.array([[2.0, 3.0]], np.float32))
    assert weights[0, :32].tolist() == [2.0] * 32
    assert weights[0, 32:].tolist() == [3.0] * 32
    narrow = dequantize_int4(words, np.array([[2.0, 3.0, 5.0, 7.0]], np.float32), group_size=16)
    assert narrow[0, ::16].tolist() == [2.0, 3.0, 5.0, 7.0]
    assert narrow[0, 15::16].tolist() == [2.0, 3.0, 5.0, 7.0]


@settings(deadline=None)
@given(
    hnp.arrays(
        np.uint32,
        20,
        elements=st.integers(0, 2**32 - 1)
        | st.sampled_from([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 1]),
    )
)
def test_bfloat16_rounds_as_torch_does(bits: npt.NDArray[np.uint32]) -> None:
    values = bits.view(np.float32)
    rounded = float32_to_bfloat16(values)
    assert rounded.dtype == np.uint16
    expected = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    np.testing.assert_array_equal(bfloat16_to_float32(rounded), expected)  # NaN equals NaN here
    assert np.isnan(bfloat16_to_float32(rounded)).tolist() == np.isnan(values).tolist()


def test_bfloat16_bits_are_the_upper_half_of_float32() -> None:
    every = np.arange(2**16, dtype=np.uint16)
    widened = bfloat16_to_float32(every)
    np.testing.assert_array_equal(widened.view(np.uint32), every.astype(np.uint32) << 16)
    is_number = ~np.isnan(widened)
    np.testing.assert_array_equal(float32_to_bfloat16(widened)[is_number], every[is_number])
