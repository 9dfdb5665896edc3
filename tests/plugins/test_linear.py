"""`k25.Linear`, the eager reference and the ONNX function body, against a float64 oracle."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch

from k25_plugins import torch_ops
from k25_plugins.onnx_functions import functions_for

assert torch_ops.REFERENCES  # importing it registers the ops

Array = npt.NDArray[Any]
BFLOAT16, FLOAT = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
SHAPES = [((1, 1), 1), ((1, 37), 5), ((7, 96), 50), ((3, 5, 24), 11), ((1, 1, 8), 3), ((2, 1, 3, 9), 7)]
each_shape = pytest.mark.parametrize(("shape", "out_features"), SHAPES)


def bfloat16(values: Array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, np.float32)).bfloat16()


def random_call(shape: tuple[int, ...], out_features: int) -> tuple[Array, torch.Tensor, Array]:
    """x float32, weight bfloat16 [out, in], and x @ weight^T in float64, one dot product at a time."""
    generator = np.random.default_rng([*shape, out_features])
    x = generator.normal(size=shape).astype(np.float32)
    weight = bfloat16(generator.normal(size=(out_features, shape[-1])))
    columns = weight.double().numpy()
    rows = x.astype(np.float64).reshape(-1, shape[-1])
    products = [[float((row * column).sum()) for column in columns] for row in rows]
    return x, weight, np.array(products).reshape(*shape[:-1], out_features)


@functools.cache
def session(rank: int) -> ort.InferenceSession:
    helper = onnx.helper
    inputs = [
        helper.make_tensor_value_info("x", FLOAT, [None] * rank),
        helper.make_tensor_value_info("weight", BFLOAT16, [None, None]),
    ]
    outputs = [helper.make_tensor_value_info("y", FLOAT, [None] * rank)]
    graph = helper.make_graph([helper.make_node("Linear", ["x", "weight"], ["y"], domain="k25")], "g", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("k25", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions_for(["Linear"]), ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run_onnx(x: Array, weight: torch.Tensor) -> Array:
    bits = weight.view(torch.uint16).numpy()
    feeds = {
        "x": ort.OrtValue.ortvalue_from_numpy(x),
        "weight": ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, BFLOAT16),
    }
    return session(x.ndim).run_with_ort_values(None, feeds)[0].numpy()


@each_shape
def test_eager_float32(shape: tuple[int, ...], out_features: int) -> None:
    x, weight, expected = random_call(shape, out_features)
    found = torch.ops.k25.linear(torch.from_numpy(x), weight)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)


@each_shape
def test_eager_bfloat16(shape: tuple[int, ...], out_features: int) -> None:
    x, weight, _ = random_call(shape, out_features)
    x = bfloat16(x).float().numpy()
    expected = x.astype(np.float64) @ weight.double().numpy().T
    found = torch.ops.k25.linear(bfloat16(x), weight)
    assert found.dtype == torch.bfloat16
    assert found.shape == expected.shape
    error = np.abs(found.double().numpy() - expected)
    assert (error <= 2.0**-8 * np.abs(expected) + 1e-4).all(), error.max()


@each_shape
def test_onnx_function_body(shape: tuple[int, ...], out_features: int) -> None:
    x, weight, expected = random_call(shape, out_features)
    found = run_onnx(x, weight)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["eager", "onnx"])
def test_activations_are_not_rounded_to_the_dtype_of_the_weight(form: str) -> None:
    x = np.array([[1 + 2.0**-20, 1 - 2.0**-20]], np.float32)
    weight = bfloat16(np.array([[1, 0], [0, 1], [1, -1]]))
    found = torch.ops.k25.linear(torch.from_numpy(x), weight).numpy() if form == "eager" else run_onnx(x, weight)
    assert found.tolist() == [[1 + 2.0**-20, 1 - 2.0**-20, 2.0**-19]]


def test_eager_takes_a_vector() -> None:
    x, weight, expected = random_call((1, 12), 4)
    np.testing.assert_allclose(torch.ops.k25.linear(torch.from_numpy(x[0]), weight).numpy(), expected[0], atol=1e-5)
