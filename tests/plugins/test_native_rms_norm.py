"""The native kernel of `k25.RMSNorm`, each code path of this machine in turn, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_calls import LIBRARY_OR_NONE, PATHS, REASON, bfloat16_bits, bfloat16_values, own_threads, run_on_threads
from test_rms_norm import SHAPES, oracle, random_call

from k25_plugins import torch_ops
from k25_plugins.errors import InputError
from k25_plugins.native_calls import call_native
from k25_plugins.native_library import Isa, Mode

assert torch_ops.REFERENCES  # importing it registers the ops
pytestmark = pytest.mark.skipif(LIBRARY_OR_NONE is None, reason=REASON)

Array = npt.NDArray[Any]
#: Relative L2 against float64: float32 throughout; bfloat16 rounds twice, by 2^-8 at most and by half of it mostly.
EXACT, BFLOAT16 = 1e-6, 2.0**-8
#: Of one value.
TOLERANCES = {"float32": 2 * EXACT, "bfloat16": 2.02 * BFLOAT16}
NAN_BITS, CANARY = 0x7FC0, 0x1234
each_isa = pytest.mark.parametrize("isa", [pytest.param(isa, id=isa) for isa in PATHS] or ["best"])
each_mode = pytest.mark.parametrize("mode", ["fast", "exact"])
each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def stored(values: Array, dtype: str) -> Array:
    return bfloat16_bits(values) if dtype == "bfloat16" else np.ascontiguousarray(values, np.float32)


def floats(array: Array) -> Array:
    return bfloat16_values(array) if array.dtype == np.uint16 else array


def norm(x: Array, weight: Array, eps: float = 1e-6, **options: Any) -> Array:
    """x as stored (bfloat16 as bits), the weight as float32."""
    assert LIBRARY_OR_NONE is not None
    (y,) = call_native(LIBRARY_OR_NONE, "RMSNorm", [x, bfloat16_bits(weight)], {"eps": eps}, **options)
    return y


def error(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(floats(found).astype(np.float64) - wanted) / np.linalg.norm(wanted))


def shifted(values: Array, shift: int, around: Any) -> Array:
    """A copy that begins `shift` elements after a cache line, between elements of another value."""
    size = values.dtype.itemsize
    room = np.full(values.size + 192 // size, around, values.dtype)
    line = -room.ctypes.data % 64 // size
    view = room[line + shift :][: values.size].reshape(values.shape)
    view[...] = values
    return view


@each_isa
@each_mode
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(isa: Isa, mode: Mode, dtype: str, shape: tuple[int, ...]) -> None:
    values, weight = random_call(shape)
    x = stored(values, dtype)
    y, wanted = norm(x, weight, isa=isa, mode=mode), oracle(floats(x), weight, 1e-6)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    np.testing.assert_allclose(floats(y), wanted, rtol=TOLERANCES[dtype])
    if dtype == "float32" or y.size > 100:
        assert error(y, wanted) < (EXACT if dtype == "float32" else BFLOAT16)


@each_isa
@each_dtype
def test_is_the_eager_reference(isa: Isa, dtype: str) -> None:
    values, weight = random_call((5, 3, 331))
    x = stored(values, dtype)
    given_x = torch.from_numpy(floats(x)).to(getattr(torch, dtype))
    wanted = torch.ops.k25.rms_norm(given_x, torch.from_numpy(weight).bfloat16(), 1e-6).float().numpy()
    found = floats(norm(x, weight, isa=isa))
    if dtype == "float32":
        np.testing.assert_allclose(found, wanted, rtol=2e-6)
    else:  # a tie may fall to either side, before the weight and after
        np.testing.assert_allclose(found, wanted, rtol=2.0**-6)
        assert (found != wanted).mean() < 0.01


@each_isa
@each_dtype
@pytest.mark.parametrize("spread", [1e-30, 1e-4, 1e6])
def test_eps_is_added_to_the_mean(isa: Isa, dtype: str, spread: float) -> None:
    values, weight = random_call((3, 131), spread)
    x = stored(values, dtype)
    for eps in (1e-6, 1e-5, 0.25):
        limit = EXACT if dtype == "float32" else BFLOAT16
        assert error(norm(x, weight, eps, isa=isa), oracle(floats(x), weight, eps)) < limit


@each_isa
@each_dtype
@pytest.mark.parametrize("size", [1, 7, 17, 1000])
def test_a_row_of_zeros_stays_zero(isa: Isa, dtype: str, size: int) -> None:
    values, weight = random_call((3, size))
    values[1] = 0
    y = floats(norm(stored(values, dtype), weight, isa=isa))
    assert not y[1].any()
    assert y[[0, 2]].all()


@each_isa
def test_squares_that_float32_holds_are_summed(isa: Isa) -> None:
    x, weight = random_call((3, 97), 1e18)
    assert error(norm(x, weight, isa=isa), oracle(x, weight, 1e-6)) < EXACT


@each_isa
@each_dtype
@pytest.mark.parametrize("size", [1, 7, 17, 1000])
def test_squares_that_overflow_give_zeros(isa: Isa, dtype: str, size: int) -> None:
    """The mean is infinite, one over its root 0."""
    values, weight = random_call((3, size))
    values[1] = np.where(np.arange(size) % 2, 1e25, -1e25)
    y = floats(norm(stored(values, dtype), weight, isa=isa))
    assert not y[1].any()
    assert y[[0, 2]].all()


@each_isa
@each_mode
@each_dtype
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(isa: Isa, mode: Mode, dtype: str, value: float) -> None:
    values, weight = random_call((5, 67))
    clean = norm(stored(values, dtype), weight, isa=isa, mode=mode)
    for column in (0, 40, 66):
        values[3] = 1
        values[3, column] = value
        y = norm(stored(values, dtype), weight, isa=isa, mode=mode)
        row = floats(y[3])
        assert np.isnan(row[column])
        if np.isnan(value):
            assert np.isnan(row).all()
        else:
            assert not row[np.arange(67) != column].any()
        rows = [0, 1, 2, 4]
        np.testing.assert_array_equal(y[rows], clean[rows])


@each_isa
@each_mode
@each_dtype
@pytest.mark.parametrize("shape", [(1, 7168), (9, 20000), (90, 1023), (3000, 33)], ids=str)
def test_the_number_of_threads_changes_no_bit(isa: Isa, mode: Mode, dtype: str, shape: tuple[int, ...]) -> None:
    values, weight = random_call(shape)
    x = stored(values, dtype)
    alone = norm(x, weight, isa=isa, mode=mode)
    for parallel in [*map(run_on_threads, (1, 2, 5)), own_threads(3)]:
        again = norm(x, weight, isa=isa, mode=mode, parallel=parallel)
        np.testing.assert_array_equal(again, alone)


@each_isa
@each_dtype
def test_any_number_of_leading_axes(isa: Isa, dtype: str) -> None:
    for leading in ((), (1,), (2, 3), (1, 2, 3, 1, 2, 1, 2)):
        values, weight = random_call((*leading, 37))
        x = stored(values, dtype)
        wanted = oracle(floats(x), weight, 1e-6)
        np.testing.assert_allclose(floats(norm(x, weight, isa=isa)), wanted, rtol=TOLERANCES[dtype])


@each_isa
@each_dtype
@pytest.mark.parametrize("size", [1, 7, 17, 255, 2048])
def test_a_row_alone_has_the_bits_that_it_has_in_a_batch(isa: Isa, dtype: str, size: int) -> None:
    values, weight = random_call((33, size))
    x = stored(values, dtype)
    batch = norm(x, weight, isa=isa)
    for row in (0, 13, 32):
        np.testing.assert_array_equal(norm(x[row], weight, isa=isa), batch[row])
    np.testing.assert_array_equal(norm(x.reshape(3, 11, size), weight, isa=isa).reshape(x.shape), batch)


@each_isa
@each_dtype
@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 31, 33, 63, 65, 200])
@pytest.mark.parametrize("rows", [1, 3])
def test_nothing_beyond_an_array_is_read_or_written(isa: Isa, dtype: str, size: int, rows: int) -> None:
    """Arrays that begin anywhere in a cache line: NaN beside what is read, a mark beside what is written."""
    assert LIBRARY_OR_NONE is not None
    values, weight = random_call((rows, size))
    x, found = stored(values, dtype), []
    not_a_number = NAN_BITS if dtype == "bfloat16" else np.nan
    for shift in (0, 1, 3, 8, 15):
        inputs = [shifted(x, shift, not_a_number), shifted(bfloat16_bits(weight), 2 * shift + 1, NAN_BITS)]
        y = shifted(np.zeros_like(x), shift + 1, CANARY)
        room = y.base
        assert room is not None
        call_native(LIBRARY_OR_NONE, "RMSNorm", inputs, {"eps": 1e-6}, outputs={0: y}, isa=isa)
        found.append(y.copy())
        y[...] = CANARY
        assert (room == CANARY).all()
    np.testing.assert_allclose(floats(found[0]), oracle(floats(x), weight, 1e-6), rtol=TOLERANCES[dtype])
    for y in found:
        np.testing.assert_array_equal(y, found[0])


@each_isa
@each_dtype
def test_inputs_keep_their_values(isa: Isa, dtype: str) -> None:
    assert LIBRARY_OR_NONE is not None
    values, weight = random_call((9, 77))
    inputs = [stored(values, dtype), bfloat16_bits(weight)]
    before = [array.copy() for array in inputs]
    call_native(LIBRARY_OR_NONE, "RMSNorm", inputs, {"eps": 1e-6}, isa=isa)
    for array, kept in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(array, kept)


def test_inputs_that_do_not_fit_are_named() -> None:
    assert LIBRARY_OR_NONE is not None
    x, weight = np.zeros((2, 6), np.float32), np.zeros(6, np.uint16)
    refusals: list[tuple[list[Array], str]] = [
        ([x, weight[:5]], "input weight, axis size: expected 6, found 5"),
        ([x, weight.astype(np.float32)], "input weight: expected dtype bfloat16, found float32"),
        ([x.astype(np.int32), weight], "input x: expected dtype float32 or bfloat16, found int32"),
        ([x, weight[None]], "input weight: expected axes [size], found shape [1, 6]"),
        ([np.array(1, np.float32), weight], "input x: expected axes [..., size], found shape []"),
    ]
    for inputs, message in refusals:
        with pytest.raises(InputError) as caught:
            call_native(LIBRARY_OR_NONE, "RMSNorm", inputs, {"eps": 1e-6})
        assert str(caught.value) == f"k25.RMSNorm: {message}"
    empty: list[list[Array]] = [[x[:0], weight], [x[:, :0], weight[:0]]]
    for inputs in empty:
        with pytest.raises(InputError, match=r"k25\.RMSNorm: input x: expected no empty axis"):
            call_native(LIBRARY_OR_NONE, "RMSNorm", inputs, {"eps": 1e-6})


@settings(max_examples=150, deadline=None)
@given(
    leading=st.lists(st.integers(1, 7), max_size=3),
    size=st.integers(1, 90) | st.integers(1, 3000),
    shift=st.integers(0, 31),
    threads=st.sampled_from([1, 1, 3]),
    spread=st.sampled_from([1e-3, 1.0, 1e4]),
    eps=st.sampled_from([1e-6, 1e-5, 0.5]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    mode=st.sampled_from(["fast", "exact"]),
    isa=st.sampled_from(PATHS or ("best",)),
)
def test_any_shape(
    leading: list[int], size: int, shift: int, threads: int, spread: float, eps: float, dtype: str, mode: Mode, isa: Isa
) -> None:
    values, weight = random_call((*leading, size), spread)
    x = shifted(stored(values, dtype), shift, 0)
    parallel = run_on_threads(threads) if threads > 1 else None
    y = norm(x, weight, eps, isa=isa, mode=mode, parallel=parallel)
    np.testing.assert_allclose(floats(y), oracle(floats(x), weight, eps), rtol=TOLERANCES[dtype])
