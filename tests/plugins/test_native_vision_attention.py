"""The native CPU kernel of `k25.VisionAttention`, every code path, against float64 and the eager reference."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_plugins import torch_ops
from k25_plugins.errors import InputError
from k25_plugins.native_calls import call_native
from k25_plugins.native_library import Isa, Mode, NativeLibrary, Parallel, Run, native_library

assert torch_ops.REFERENCES  # importing it registers the ops

Array = npt.NDArray[Any]
ISAS: tuple[Isa, ...] = ("portable", "avx2", "avx512", "avx512_bf16")
#: Relative L2 against float64: float32 sums; queries, keys, weights and values rounded to bfloat16; the output rounded.
EXACT, FAST, ROUNDED = 1e-5, 2.0**-8, 2.0**-8


@pytest.fixture(scope="module")
def library() -> NativeLibrary:
    found = native_library()
    if found is None:
        pytest.skip("the native library is not built: sh scripts/native.sh")
    return found


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, library: NativeLibrary) -> Isa:
    chosen: Isa = request.param
    if not library.supports(chosen):
        pytest.skip(f"this machine has no {chosen}")
    return chosen


def bits_of(values: Array) -> Array:
    rounded = torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)


def floats_of(values: Array) -> Array:
    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values


def inputs_of(patches: int, heads: int, width: int, dtype: str = "float32", seed: int = 0) -> list[Array]:
    generator = np.random.default_rng(seed)
    arrays = [generator.normal(size=(patches, heads * width)).astype(np.float32) for _ in range(3)]
    return [bits_of(array) for array in arrays] if dtype == "bfloat16" else arrays


def native(library: NativeLibrary, inputs: list[Array], heads: int, **options: Any) -> Array:
    width = inputs[0].shape[1] // heads
    attributes = {"num_heads": heads, "softmax_scale": options.pop("scale", width**-0.5)}
    return call_native(library, "VisionAttention", inputs, attributes, **options)[0]


def expected(inputs: list[Array], heads: int, scale: float | None = None) -> Array:
    patches = inputs[0].shape[0]
    q, k, v = (floats_of(a).astype(np.float64).reshape(patches, heads, -1).transpose(1, 0, 2) for a in inputs)
    scores = (q.shape[2] ** -0.5 if scale is None else scale) * (q @ k.transpose(0, 2, 1))
    chances = np.exp(scores - scores.max(axis=2, keepdims=True))
    out = (chances / chances.sum(axis=2, keepdims=True)) @ v
    return out.transpose(1, 0, 2).reshape(patches, -1)


def relative_l2(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(floats_of(found) - wanted) / np.linalg.norm(wanted))


def tolerance(dtype: str, isa: Isa, mode: Mode) -> float:
    return (FAST if mode == "fast" and isa == "avx512_bf16" else EXACT) + (ROUNDED if dtype == "bfloat16" else 0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("patches", "heads", "width"),
    [
        (1, 1, 1),
        (2, 3, 5),
        (63, 2, 8),
        (64, 1, 16),
        (65, 2, 17),
        (129, 3, 33),
        (700, 2, 72),
        (515, 1, 80),
        (40, 1, 130),
    ],
)
def test_is_attention(library: NativeLibrary, isa: Isa, patches: int, heads: int, width: int, dtype: str) -> None:
    inputs = inputs_of(patches, heads, width, dtype)
    wanted = expected(inputs, heads)
    for mode in ("fast", "exact"):
        assert relative_l2(native(library, inputs, heads, isa=isa, mode=mode), wanted) <= tolerance(dtype, isa, mode)


def test_is_the_eager_reference(library: NativeLibrary, isa: Isa) -> None:
    inputs = inputs_of(150, 3, 24)
    wanted = torch.ops.k25.vision_attention(*map(torch.from_numpy, inputs), 3, 0.3).numpy()
    np.testing.assert_allclose(native(library, inputs, 3, isa=isa, scale=0.3), wanted, rtol=1e-4, atol=2e-6)


def test_large_scores_neither_overflow_nor_vanish(library: NativeLibrary, isa: Isa) -> None:
    """Weights from 1 down to nothing, tile after tile, in rising order: the sums are rescaled at every tile."""
    inputs = inputs_of(300, 1, 8)
    inputs[1] += np.linspace(-60, 60, 300, dtype=np.float32)[:, None]
    assert relative_l2(native(library, inputs, 1, isa=isa, scale=1.0), expected(inputs, 1, 1.0)) <= 5e-5
    inputs[1] = inputs[1][::-1].copy()
    assert relative_l2(native(library, inputs, 1, isa=isa, scale=1.0), expected(inputs, 1, 1.0)) <= 5e-5


def test_what_is_not_a_number_stays_in_its_query(library: NativeLibrary, isa: Isa) -> None:
    inputs = inputs_of(100, 2, 9)
    clean = native(library, inputs, 2, isa=isa)
    inputs[0][37, 3] = np.nan  # of head 0
    out = native(library, inputs, 2, isa=isa)
    assert np.isnan(out[37, :9]).all()
    out[37, :9] = clean[37, :9]
    np.testing.assert_array_equal(out, clean)


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_any_number_of_threads_gives_the_same_bits(library: NativeLibrary, isa: Isa, mode: Mode) -> None:
    inputs = inputs_of(600, 3, 20)
    alone = native(library, inputs, 3, isa=isa, mode=mode)
    for threads in (1, 2, 5):
        pool = ThreadPoolExecutor(threads)

        def run(
            context: int | None,
            task: Callable[[int | None, int], None],
            state: int | None,
            count: int,
            pool: ThreadPoolExecutor = pool,
        ) -> None:
            order = np.random.default_rng(count).permutation(count).tolist()
            list(pool.map(lambda index: task(state, index), order))

        again = native(library, inputs, 3, isa=isa, mode=mode, parallel=Parallel(Run(run), None))
        np.testing.assert_array_equal(alone, again)


def test_inputs_that_do_not_fit_are_named(library: NativeLibrary) -> None:
    inputs = inputs_of(6, 2, 4)
    with pytest.raises(InputError, match=r"k25.VisionAttention: input k, axis width: .* num_heads 3, found 8"):
        native(library, inputs, 3)
    with pytest.raises(InputError, match=r"k25.VisionAttention: input v, axis patches: expected 6, found 5"):
        native(library, [*inputs[:2], inputs[2][:5]], 2)
    with pytest.raises(InputError, match=r"k25.VisionAttention: input k: expected dtype float32, found bfloat16"):
        native(library, [inputs[0], bits_of(inputs[1]), inputs[2]], 2)


@settings(max_examples=60, deadline=None)
@given(
    patches=st.integers(1, 200),
    heads=st.integers(1, 4),
    width=st.integers(1, 90),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    mode=st.sampled_from(["fast", "exact"]),
    isa=st.sampled_from(ISAS),
)
def test_any_shape(patches: int, heads: int, width: int, dtype: str, mode: Mode, isa: Isa) -> None:
    found = native_library()
    if found is None or not found.supports(isa):
        pytest.skip("the native library is not built, or this machine lacks the code path")
    inputs = inputs_of(patches, heads, width, dtype, seed=patches + width)
    out = native(found, inputs, heads, isa=isa, mode=mode)
    # Where values cancel, the error is no part of their sum but of their size.
    size = np.linalg.norm(expected([*inputs[:2], np.abs(floats_of(inputs[2]))], heads))
    error = np.linalg.norm(floats_of(out) - expected(inputs, heads))
    assert error <= tolerance(dtype, isa, mode) * size
