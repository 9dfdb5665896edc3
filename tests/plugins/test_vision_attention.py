"""`k25.VisionAttention`, the eager reference and the ONNX function body, against a float64 oracle."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch

from k25_plugins import torch_ops
from k25_plugins.errors import InputError
from k25_plugins.onnx_functions import functions_for

assert torch_ops.REFERENCES  # importing it registers the ops

Array = npt.NDArray[Any]
# Around the ends of a block of 512 queries, and where three blocks are longer than the patches.
PATCHES = [1, 2, 7, 511, 512, 513, 1024, 1025, 1090]
HEADS, HEAD_DIM = 3, 4

each_form = pytest.mark.parametrize("form", ["eager", "onnx"])


def random_call(patches: int, *, heads: int = HEADS, head_dim: int = HEAD_DIM, spread: float = 1.0) -> list[Array]:
    generator = np.random.default_rng([patches, heads, head_dim])
    return [(spread * generator.normal(size=(patches, heads * head_dim))).astype(np.float32) for _ in range(3)]


def oracle(q: Array, k: Array, v: Array, heads: int, scale: float) -> Array:
    """Every query of every head over all keys, in float64."""
    split = [x.astype(np.float64).reshape(len(x), heads, -1) for x in (q, k, v)]
    scores = np.einsum("qnd,knd->nqk", split[0], split[1]) * scale
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    return np.einsum("nqk,knd->qnd", shares, split[2]).reshape(q.shape)


def model(heads: int, scale: float) -> bytes:
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(name, floats, ["patches", "width"]) for name in "qkv"]
    outputs = [helper.make_tensor_value_info("out", floats, ["patches", "width"])]
    node = helper.make_node(
        "VisionAttention", ["q", "k", "v"], ["out"], domain="k25", num_heads=heads, softmax_scale=scale
    )
    graph = helper.make_graph([node], "g", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("k25", 1)]
    functions = functions_for(["VisionAttention"])
    made = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    data: bytes = made.SerializeToString()
    return data


@functools.cache
def session(heads: int, scale: float) -> ort.InferenceSession:
    return ort.InferenceSession(model(heads, scale), providers=["CPUExecutionProvider"])


def run(form: str, q: Array, k: Array, v: Array, *, heads: int = HEADS, scale: float = 0.5) -> Array:
    if form == "onnx":
        found: Array = session(heads, scale).run(None, {"q": q, "k": k, "v": v})[0]
        return found
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    out: torch.Tensor = torch.ops.k25.vision_attention(*tensors, heads, scale)
    assert out.dtype == torch.float32
    return np.asarray(out.numpy())


@each_form
@pytest.mark.parametrize("patches", PATCHES)
def test_every_patch_sees_every_patch(form: str, patches: int) -> None:
    call = random_call(patches)
    found, expected = run(form, *call), oracle(*call, HEADS, 0.5)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@each_form
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 8), (5, 1), (2, 72)])
def test_heads_and_widths(form: str, heads: int, head_dim: int) -> None:
    call = random_call(29, heads=heads, head_dim=head_dim)
    found = run(form, *call, heads=heads, scale=0.25)
    np.testing.assert_allclose(found, oracle(*call, heads, 0.25), rtol=0, atol=5e-6)


@each_form
def test_large_scores_do_not_overflow(form: str) -> None:
    call = random_call(33, spread=40.0)
    expected = oracle(*call, HEADS, 0.5)
    np.testing.assert_allclose(run(form, *call), expected, rtol=0, atol=2e-3 * np.abs(expected).max())


@each_form
def test_order_of_the_keys_does_not_matter_but_that_of_the_queries_does(form: str) -> None:
    q, k, v = random_call(600)
    order = np.random.default_rng(1).permutation(600)
    out = run(form, q, k, v)
    np.testing.assert_allclose(run(form, q, k[order], v[order]), out, rtol=0, atol=2e-6)
    np.testing.assert_allclose(run(form, q[order], k, v), out[order], rtol=0, atol=2e-6)


def test_eager_bfloat16_rounds_only_the_result() -> None:
    q, k, v = (torch.from_numpy(x).bfloat16() for x in random_call(40))
    found = torch.ops.k25.vision_attention(q, k, v, HEADS, 0.5)
    assert found.dtype == torch.bfloat16
    expected = oracle(*(x.float().numpy() for x in (q, k, v)), HEADS, 0.5)
    error = np.abs(found.double().numpy() - expected)
    assert (error <= 2.0**-8 * np.abs(expected) + 1e-5).all(), error.max()


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    call = [torch.zeros(4, 10)] * 3
    with pytest.raises(InputError, match=r"k25\.VisionAttention: input k, axis width: .* num_heads 3, found 10"):
        torch.ops.k25.vision_attention(*call, 3, 1.0)


MEMORY_PROGRAM = """
import sys
import numpy as np, onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
x = np.random.default_rng(0).normal(size=(int(sys.argv[2]), 4)).astype(np.float32)
before = peak()
session.run(None, {"q": x, "k": x, "v": x})
print(peak() - before)
"""


def test_a_full_image_does_not_hold_all_scores(tmp_path: Any) -> None:
    """8192 patches: the scores of one head would take 256 MiB, a block of them takes 16 MiB."""
    (tmp_path / "attention.onnx").write_bytes(model(1, 0.5))
    command = [sys.executable, "-c", MEMORY_PROGRAM, str(tmp_path / "attention.onnx"), "8192"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 128 << 20
