"""The native kernel of `k25.Linear`, each code path of this machine in turn, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_calls import LIBRARY_OR_NONE, OK, PATHS, REASON, Named, bfloat16_values, call, named, own_threads, values_of

from k25_plugins.native_library import Isa, Mode, Parallel

pytestmark = pytest.mark.skipif(LIBRARY_OR_NONE is None, reason=REASON)

Array = npt.NDArray[Any]
EXACT, FAST, BFLOAT16 = 1e-5, 3e-3, 2**-8
each_isa = pytest.mark.parametrize("isa", [pytest.param(isa, id=isa) for isa in PATHS] or ["best"])
each_mode = pytest.mark.parametrize("mode", ["fast", "exact"])


def linear(
    x: Array,
    weight: Array,
    *,
    isa: Isa = "best",
    mode: Mode = "exact",
    dtype: str = "float32",
    threads: int | Parallel = 1,
) -> tuple[Array, npt.NDArray[np.float64]]:
    """y as computed, and in float64 from the same inputs."""
    w, inputs = named(weight, "bfloat16"), named(x, dtype)
    y = named(np.full((*x.shape[:-1], len(weight)), np.nan, np.float32), dtype)
    status, message = call("linear", [inputs, w], [y], isa=isa, mode=mode, threads=threads)
    assert status == OK, message
    wanted = values_of(inputs).astype(np.float64) @ bfloat16_values(w.array).astype(np.float64).T
    return values_of(y), wanted


def random_pair(out: int, columns: int, *leading: int, seed: int = 0) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    return (
        generator.standard_normal((*leading, columns), np.float32),
        generator.standard_normal((out, columns), np.float32),
    )


def limit(mode: str, dtype: str) -> float:
    return (EXACT if mode == "exact" else FAST) + (BFLOAT16 if dtype == "bfloat16" else 0)


def error(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@each_isa
@each_mode
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("out", "columns", "tokens"),
    [
        *((1, 1, 1), (5, 3, 2), (50, 96, 7), (33, 31, 5), (64, 2048, 9), (31, 100, 130), (300, 1023, 3)),
        *((385, 33, 5), (450, 96, 7), (401, 31, 130), (390, 2080, 66)),
    ],
)
def test_values(isa: Isa, mode: Mode, dtype: str, out: int, columns: int, tokens: int) -> None:
    x, weight = random_pair(out, columns, tokens)
    assert error(*linear(x, weight, isa=isa, mode=mode, dtype=dtype)) < limit(mode, dtype)


@each_isa
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (1, 2, 3, 1, 2)])
def test_any_number_of_leading_axes(isa: Isa, leading: tuple[int, ...]) -> None:
    x, weight = random_pair(7, 40, *leading)
    found, wanted = linear(x, weight, isa=isa)
    assert found.shape == wanted.shape == (*leading, 7)
    assert error(found, wanted) < EXACT


@each_isa
@each_mode
@pytest.mark.parametrize("tokens", [1, 4, 5, 30])
def test_nothing_beyond_a_row_is_read(isa: Isa, mode: Mode, tokens: int) -> None:
    """Rows that are followed by NaN: whatever is read too far shows."""
    weight = np.full((40, 45), np.nan, np.float32)
    rows = np.random.default_rng(1).standard_normal((9, 33), np.float32)
    flat = weight.reshape(-1)
    flat[: rows.size] = rows.reshape(-1)
    x = np.random.default_rng(2).standard_normal((tokens, 33), np.float32)
    w = named(flat, "bfloat16")
    y = named(np.zeros((tokens, 9), np.float32), "float32")
    view = type(w)(w.array[: rows.size].reshape(9, 33), "bfloat16")
    assert call("linear", [named(x, "float32"), view], [y], isa=isa, mode=mode)[0] == OK
    assert error(y.array, x.astype(np.float64) @ bfloat16_values(view.array).astype(np.float64).T) < FAST


@each_isa
@each_mode
@pytest.mark.parametrize("tokens", [3, 20])
def test_a_token_that_is_not_finite_reaches_no_other(isa: Isa, mode: Mode, tokens: int) -> None:
    x, weight = random_pair(410, 70, tokens)
    x[1] = np.nan
    found, wanted = linear(x, weight, isa=isa, mode=mode)
    others = np.arange(tokens) != 1
    assert np.isnan(found[1]).all()
    assert error(found[others], wanted[others]) < FAST


@each_isa
@each_mode
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_number_of_threads_changes_no_bit(isa: Isa, mode: Mode, tokens: int) -> None:
    x, weight = random_pair(533, 130, tokens)
    one, _ = linear(x, weight, isa=isa, mode=mode)
    for threads in (2, 5, own_threads(2), own_threads(5)):
        assert np.array_equal(linear(x, weight, isa=isa, mode=mode, threads=threads)[0], one)


@each_isa
def test_a_narrow_matrix_is_exact_in_any_mode(isa: Isa) -> None:
    """A router chooses by small differences."""
    x, weight = random_pair(384, 200, 50)
    assert error(*linear(x, weight, isa=isa, mode="fast")) < EXACT


@each_isa
@each_mode
@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("columns", [64, 520, 1024])
def test_where_the_weight_begins_changes_no_bit(isa: Isa, mode: Mode, tokens: int, columns: int) -> None:
    """Tensors of a shard begin where its header ends: anywhere in a cache line."""
    x, weight = random_pair(40, columns, tokens)
    bits = named(weight, "bfloat16").array
    room = np.full(bits.size + 64, 0x7FC0, np.uint16)  # NaN, should anything beside the weight be used
    line = -room.ctypes.data // 2 % 32
    found = []
    for shift in (0, 1, 4, 16, 20, 31):
        room[:] = 0x7FC0
        moved = room[line + shift :][: bits.size].reshape(bits.shape)
        moved[:] = bits
        y = named(np.zeros((tokens, len(bits)), np.float32), "float32")
        assert call("linear", [named(x, "float32"), Named(moved, "bfloat16")], [y], isa=isa, mode=mode)[0] == OK
        found.append(y.array)
    assert all(np.array_equal(y, found[0]) for y in found)
    assert error(found[0], x.astype(np.float64) @ bfloat16_values(bits).astype(np.float64).T) < limit(mode, "float32")


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 90) | st.integers(380, 450),
    columns=st.integers(1, 200),
    tokens=st.integers(1, 80),
    isa=st.sampled_from(PATHS or ("best",)),
    mode=st.sampled_from(["fast", "exact"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_any_shape(out: int, columns: int, tokens: int, isa: Isa, mode: Mode, dtype: str) -> None:
    x, weight = random_pair(out, columns, tokens, seed=out)
    found, wanted = linear(x, weight, isa=isa, mode=mode, dtype=dtype)
    # An output near 0 is a difference of large terms: errors are measured against those.
    scale = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T
    assert (np.abs(found - wanted) <= limit(mode, dtype) * scale * 2).all()
