"""`k25.RMSNorm`, the eager reference and the ONNX function body, against a float64 oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch
from native_calls import bfloat16_bits, bfloat16_values
from onnx.reference import ReferenceEvaluator

from k25_plugins import torch_ops
from k25_plugins.errors import InputError
from k25_plugins.onnx_functions import functions_for

assert torch_ops.REFERENCES  # importing it registers the ops

Array = npt.NDArray[Any]
Run = Callable[..., Array]
BFLOAT16, FLOAT = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
#: Float32 sums of thousands of squares, a root and two products.
TOLERANCE = 1e-6
SHAPES = [
    *((1,), (3,), (17,), (1, 1), (5, 1), (1, 3), (9, 7), (130, 17), (3, 255), (2, 7168)),
    *((1, 1, 1), (2, 3, 7), (4, 1, 255), (2, 5, 96)),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def random_call(shape: tuple[int, ...], spread: float = 1.0) -> tuple[Array, Array]:
    """x float32, and a weight as float32 that bfloat16 holds."""
    generator = np.random.default_rng([*shape, len(shape)])
    weight = bfloat16_values(bfloat16_bits(generator.normal(size=shape[-1:])))
    return (spread * generator.normal(size=shape)).astype(np.float32), weight


def normed(x: Array, eps: float) -> Array:
    wide = x.astype(np.float64)
    return np.asarray(wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + eps))


def oracle(x: Array, weight: Array, eps: float) -> Array:
    return np.asarray(normed(x, eps) * weight.astype(np.float64))


def model(rank: int, eps: float, kind: int = FLOAT) -> onnx.ModelProto:
    helper = onnx.helper
    inputs = [
        helper.make_tensor_value_info("x", kind, [None] * rank),
        helper.make_tensor_value_info("weight", BFLOAT16, [None]),
    ]
    outputs = [helper.make_tensor_value_info("y", kind, [None] * rank)]
    node = helper.make_node("RMSNorm", ["x", "weight"], ["y"], domain="k25", eps=eps)
    graph = helper.make_graph([node], "g", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("k25", 1)]
    made = helper.make_model(graph, opset_imports=opsets, functions=functions_for(["RMSNorm"]), ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


@functools.cache
def session(rank: int, eps: float) -> ort.InferenceSession:
    return ort.InferenceSession(model(rank, eps).SerializeToString(), providers=["CPUExecutionProvider"])


def eager(x: Array, weight: Array, eps: float = 1e-5) -> Array:
    out: torch.Tensor = torch.ops.k25.rms_norm(torch.from_numpy(x), torch.from_numpy(weight).bfloat16(), eps)
    assert out.dtype == torch.float32
    return np.asarray(out.numpy())


def body(x: Array, weight: Array, eps: float = 1e-5) -> Array:
    feeds = {
        "x": ort.OrtValue.ortvalue_from_numpy(x),
        "weight": ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bfloat16_bits(weight), BFLOAT16),
    }
    found: Array = session(x.ndim, eps).run_with_ort_values(None, feeds)[0].numpy()
    return found


def eager_bfloat16(x: Array, weight: Array, eps: float = 1e-5) -> Array:
    out = torch.ops.k25.rms_norm(torch.from_numpy(x).bfloat16(), torch.from_numpy(weight).bfloat16(), eps)
    assert out.dtype == torch.bfloat16
    return np.asarray(out.float().numpy())


def body_bfloat16(x: Array, weight: Array, eps: float = 1e-5) -> Array:
    """ONNX Runtime's CPU provider multiplies no bfloat16: ONNX's own evaluator does."""
    kind = onnx.helper.tensor_dtype_to_np_dtype(BFLOAT16)
    feeds = {"x": bfloat16_bits(x).view(kind), "weight": bfloat16_bits(weight).view(kind)}
    (found,) = ReferenceEvaluator(model(x.ndim, eps, BFLOAT16)).run(None, feeds)
    assert found.dtype == kind
    return np.asarray(found.astype(np.float32))


each_form = pytest.mark.parametrize("run", [eager, body], ids=["eager", "onnx"])
each_bfloat16_form = pytest.mark.parametrize("run", [eager_bfloat16, body_bfloat16], ids=["eager", "onnx"])
every_form = pytest.mark.parametrize(
    "run", [eager, body, eager_bfloat16, body_bfloat16], ids=["eager", "onnx", "eager-bf16", "onnx-bf16"]
)


@each_form
@each_shape
def test_float32(run: Run, shape: tuple[int, ...]) -> None:
    x, weight = random_call(shape)
    found = run(x, weight)
    assert found.shape == shape
    np.testing.assert_allclose(found, oracle(x, weight, 1e-5), rtol=TOLERANCE)


@each_bfloat16_form
@each_shape
def test_bfloat16(run: Run, shape: tuple[int, ...]) -> None:
    x, weight = random_call(shape)
    found, expected = run(x, weight), oracle(bfloat16_values(bfloat16_bits(x)), weight, 1e-5)
    assert found.shape == shape
    np.testing.assert_allclose(found, expected, rtol=1.01 * 2.0**-7)  # rounded twice, 2^-8 each


@each_bfloat16_form
def test_the_normed_value_is_rounded_before_it_meets_the_weight(run: Run) -> None:
    x, weight = random_call((40, 255))
    x = bfloat16_values(bfloat16_bits(x))
    exact = normed(x, 1e-5)
    lower, upper = (bfloat16_bits((exact * (1 + sign * 1e-5)).astype(np.float32)) for sign in (-1, 1))
    certain = lower == upper  # no float32 error turns the rounding
    expected = bfloat16_values(bfloat16_bits(bfloat16_values(lower) * weight))
    once = bfloat16_values(bfloat16_bits((exact * weight).astype(np.float32)))
    assert certain.mean() > 0.98
    assert (certain & (expected != once)).sum() > 1000
    np.testing.assert_array_equal(run(x, weight)[certain], expected[certain])


@each_form
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.25])
@pytest.mark.parametrize("spread", [1e-30, 1e-4, 1e-2, 1e6])
def test_eps_is_added_to_the_mean(run: Run, eps: float, spread: float) -> None:
    x, weight = random_call((3, 17), spread)
    np.testing.assert_allclose(run(x, weight, eps), oracle(x, weight, eps), rtol=TOLERANCE)


@every_form
def test_a_row_of_zeros_stays_zero(run: Run) -> None:
    x, weight = random_call((3, 17))
    x[1] = 0
    found = run(x, weight)
    assert not found[1].any()
    assert found[[0, 2]].all()


@each_form
def test_squares_that_float32_holds_are_summed(run: Run) -> None:
    x, weight = random_call((3, 17), 1e18)
    np.testing.assert_allclose(run(x, weight), oracle(x, weight, 1e-5), rtol=TOLERANCE)


@every_form
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_squares_that_overflow_give_zeros(run: Run) -> None:
    """The mean is infinite, one over its root 0."""
    x, weight = random_call((3, 17))
    x[1] *= np.float32(1e25)
    found = run(x, weight)
    assert not found[1].any()
    assert found[[0, 2]].all()


@every_form
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(run: Run, value: float) -> None:
    x, weight = random_call((5, 17))
    clean = run(x, weight)
    x[3, 4] = value
    found = run(x, weight)
    others = np.arange(17) != 4
    assert np.isnan(found[3, 4])
    if np.isnan(value):
        assert np.isnan(found[3]).all()
    else:
        assert not found[3, others].any()
    rows = [0, 1, 2, 4]
    np.testing.assert_array_equal(found[rows], clean[rows])


def test_the_weight_counts_even_where_it_is_not_finite() -> None:
    x, weight = random_call((2, 5))
    weight[[1, 3]] = np.inf, np.nan
    for run in (eager, body):
        found = run(x, weight)
        assert np.isinf(found[:, 1]).all()
        assert np.isnan(found[:, 3]).all()
        np.testing.assert_allclose(found[:, ::2], oracle(x, weight, 1e-5)[:, ::2], rtol=TOLERANCE)


def test_each_row_is_normed_by_itself() -> None:
    x, weight = random_call((2, 5, 96))
    for run in (eager, body):
        flat = run(x.reshape(10, 96), weight)
        np.testing.assert_array_equal(run(x, weight), flat.reshape(x.shape))
        for row in (0, 7):
            np.testing.assert_allclose(run(x.reshape(10, 96)[row], weight), flat[row], rtol=TOLERANCE)


def test_a_weight_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"k25\.RMSNorm: input weight, axis size: expected 6, found 5"):
        torch.ops.k25.rms_norm(torch.zeros(4, 6), torch.zeros(5, dtype=torch.bfloat16), 1e-5)
    with pytest.raises(InputError, match=r"k25\.RMSNorm: input weight: expected dtype bfloat16, found float32"):
        torch.ops.k25.rms_norm(torch.zeros(4, 6), torch.zeros(6), 1e-5)
    with pytest.raises(InputError, match=r"k25\.RMSNorm: input x: expected axes \[\.\.\., size\], found shape \[\]"):
        torch.ops.k25.rms_norm(torch.tensor(1.0), torch.zeros(1, dtype=torch.bfloat16), 1e-5)


class Norm(torch.nn.Module):
    """The op on a weight without memory."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.k25.rms_norm(x, self.weight, 1e-5)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(6,), (3, 6)])
def test_it_is_traced_without_data_for_any_number_of_tokens(dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    with torch.device("meta"):
        module, x = Norm(24), torch.empty(*leading, 24, dtype=dtype)
    tokens = {len(leading) - 1: torch.export.Dim("tokens", min=1)}
    program = torch.export.export(module, (x,), dynamic_shapes={"x": tokens})
    (call,) = [node for node in program.graph.nodes if node.target is torch.ops.k25.rms_norm.default]
    value = call.meta["val"]
    assert value.dtype == dtype
    assert not isinstance(value.shape[-2], int)
    assert [*value.shape[:-2], value.shape[-1]] == [*leading[:-1], 24]
